"""Split of the training images into validation and training."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from raytrain.core.types import RequestError
from raytrain.data.spec import DataSpec


def split_validation(labels: Tensor, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the validation and of the training images, with the classes in proportion.

    Both have at least one image of every class, even if its share rounds to none.

    Raises:
        RequestError: naming the field, where no such split exists.
    """
    every = labels.numpy()
    counts = np.bincount(every)
    num_images, num_classes = len(every), np.count_nonzero(counts)
    if (counts == 1).any():
        raise RequestError(
            "data.validation: expected two images or more of every class, to train and to "
            f"validate on, found one of class {np.flatnonzero(counts == 1)[0]}"
        )
    share = spec.validation
    held_back = math.ceil(share * num_images) if share < 1 else int(share)
    if not num_classes <= held_back <= num_images - num_classes:
        raise RequestError(
            f"data.validation: {share:.15g} of {num_images} images cannot be taken with every "
            f"class represented; expected {num_classes} to {num_images - num_classes} images, "
            "or a share that comes to as many"
        )
    training, validation = _divide(np.arange(num_images), every, held_back, spec.split_seed)
    _exchange(validation, training, every)
    if spec.train_size is not None:
        training = _part(training, every, spec.train_size, spec.split_seed)
    return np.sort(validation), np.sort(training)


def _part(training: np.ndarray, labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Select `size` of the training images, in proportion, with every class."""
    num_classes = len(np.unique(labels[training]))
    if size > len(training):
        raise RequestError(
            f"data.train_size: {size} images were asked for and {len(training)} are left "
            "after the validation split"
        )
    if size < num_classes:
        raise RequestError(
            f"data.train_size: {size} of {len(training)} images cannot be taken with every class "
            f"represented; expected {num_classes} to {len(training)} images"
        )
    return training if size == len(training) else _divide(training, labels, size, seed)[1]


def _divide(
    indices: np.ndarray, labels: np.ndarray, take: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rest and `take` random indices, in proportion, with every class among the latter."""
    from sklearn.model_selection import train_test_split

    strata, counts = labels[indices], np.bincount(labels[indices])
    strata = np.where(
        counts[strata] == 1, counts.argmax(), strata
    )  # a class of one cannot be divided
    is_stratified = len(indices) - take >= len(np.unique(strata))
    parts = train_test_split(
        indices, test_size=take, stratify=strata if is_stratified else None, random_state=seed
    )
    rest, taken = np.asarray(parts[0]), np.asarray(parts[1])
    _exchange(rest, taken, labels)
    return rest, taken


def _exchange(giver: np.ndarray, taker: np.ndarray, labels: np.ndarray) -> None:
    """Swap an image of each class that `taker` lacks for one of its most frequent class, in place."""
    for label in np.setdiff1d(labels[giver], labels[taker]):
        most = np.bincount(labels[taker]).argmax()
        given = np.flatnonzero(labels[giver] == label)[0]
        taken = np.flatnonzero(labels[taker] == most)[0]
        giver[given], taker[taken] = taker[taken], giver[given]
