"""Split of the training images into validation and training."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from raytrain.core.errors import RequestError
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
    strata, counts = labels[indices], np.bincount(labels[indices])
    strata = np.where(
        counts[strata] == 1, counts.argmax(), strata
    )  # a class of one cannot be divided
    is_stratified = len(indices) - take >= len(np.unique(strata))
    parts = stratified(strata, take, seed) if is_stratified else shuffled(len(strata), take, seed)
    rest, taken = (indices[part] for part in parts)
    _exchange(rest, taken, labels)
    return rest, taken


def _exchange(giver: np.ndarray, taker: np.ndarray, labels: np.ndarray) -> None:
    """Swap an image of each class that `taker` lacks for one of its most frequent class, in place."""
    for label in np.setdiff1d(labels[giver], labels[taker]):
        most = np.bincount(labels[taker]).argmax()
        given = np.flatnonzero(labels[giver] == label)[0]
        taken = np.flatnonzero(labels[taker] == most)[0]
        giver[given], taker[taken] = taker[taken], giver[given]


def stratified(strata: np.ndarray, take: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of `take` elements at random, in proportion to their strata.

    The division of scikit-learn's `train_test_split` with `stratify`, to which it is equal (tested);
    scikit-learn takes longer to import than a short training.
    """
    rng = np.random.RandomState(seed)
    _, inverse, counts = np.unique(strata, return_inverse=True, return_counts=True)
    kept = _in_proportion(counts, len(strata) - take, rng)
    given = _in_proportion(counts - kept, take, rng)  # all others; it draws among equal remainders
    rest, taken = [], []
    for stratum, (first, last) in enumerate(zip(kept, kept + given, strict=True)):
        order = np.flatnonzero(inverse == stratum)[rng.permutation(counts[stratum])]
        rest.append(order[:first])
        taken.append(order[first:last])
    return rng.permutation(np.concatenate(rest)), rng.permutation(np.concatenate(taken))


def shuffled(count: int, take: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of `take` of `count` elements, as scikit-learn without `stratify`."""
    order = np.random.RandomState(seed).permutation(count)
    return order[take:], order[:take]


def _in_proportion(counts: np.ndarray, total: int, rng: np.random.RandomState) -> np.ndarray:
    """`total` shared out in proportion to `counts`: the largest remainders first, at random among equals."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact).astype(int)
    remainders, missing = exact - shares, total - shares.sum()
    for value in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        equal = np.flatnonzero(remainders == value)
        chosen = rng.choice(equal, size=min(len(equal), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares
