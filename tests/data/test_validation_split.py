"""The validation split and `data.train_size`: in proportion, with every class, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.data.loader import open_splits
from raytrain.data.spec import DataSpec
from raytrain.data.validation_split import shuffled, split_validation, stratified


def _labels(*counts: int) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _counts(labels: Tensor, indices: np.ndarray) -> list[int]:
    return labels[torch.from_numpy(indices)].bincount(minlength=int(labels.max()) + 1).tolist()


@pytest.mark.parametrize("validation", [0.1, 0.25, 30])
@pytest.mark.parametrize("train_size", [None, 40])
def test_where_no_class_is_rare_the_split_is_that_of_scikit_learn(
    validation: float, train_size: int | None
) -> None:
    labels = _labels(90, 60, 50)
    held, kept = split_validation(labels, DataSpec(validation=validation, train_size=train_size))
    rest, wanted = train_test_split(
        np.arange(200), test_size=validation, stratify=labels.numpy(), random_state=0
    )
    assert held.tolist() == sorted(wanted)
    if train_size is not None:
        rest = train_test_split(
            rest, test_size=train_size, stratify=labels.numpy()[rest], random_state=0
        )[1]
    assert kept.tolist() == sorted(rest)


@pytest.mark.parametrize("seed", range(60))
def test_a_division_is_that_of_scikit_learn_image_by_image(seed: int) -> None:
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(1, 12))
    strata = draw.permutation(np.repeat(np.arange(classes), draw.integers(2, 40, classes)))
    take = int(draw.integers(classes, len(strata) - classes + 1))
    for found, given in (
        (stratified(strata, take, seed), strata),
        (shuffled(len(strata), take, seed), None),
    ):
        wanted = train_test_split(
            np.arange(len(strata)), test_size=take, stratify=given, random_state=seed
        )
        assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("counts", [(97, 3), (2, 198), (100, 90, 2, 2), (50,) + (2,) * 20])
@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_is_in_both_parts(counts: tuple[int, ...], seed: int) -> None:
    labels, size = _labels(*counts), sum(counts) // 4
    held, kept = split_validation(labels, DataSpec(validation=size, split_seed=seed))
    assert len(held) == size and sorted([*held, *kept]) == list(range(len(labels)))
    assert min(_counts(labels, held)) >= 1 and min(_counts(labels, kept)) >= 1
    found, share = np.array(_counts(labels, held)), np.array(counts) / sum(counts) * size
    assert (found[share < 1] <= 1).all()  # no more of a rare class than it takes


@pytest.mark.parametrize("train_size", [3, 50, 85, 88, 89, 90])
def test_train_size_may_be_anything_from_an_image_of_each_class_to_all_images(
    train_size: int,
) -> None:
    labels = _labels(60, 38, 2)  # the last class is left with one image to train on
    held, kept = split_validation(labels, DataSpec(validation=10, train_size=train_size))
    assert len(kept) == len(set(kept)) == train_size and not set(kept) & set(held)
    assert min(_counts(labels, kept)) == 1


@pytest.mark.parametrize(
    ("validation", "found"),
    [(2, "2"), (98, "98"), (100, "100"), (101, "101"), (0.001, "0.001"), (0.999, "0.999")],
)
def test_a_validation_split_without_some_class_is_refused(validation: float, found: str) -> None:
    sentence = (
        f"data.validation: {found} of 100 images cannot be taken with every class represented; "
        "expected 3 to 97 images, or a share that comes to as many"
    )
    with pytest.raises(RequestError) as caught:
        split_validation(_labels(60, 20, 20), DataSpec(validation=validation))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("train_size", "sentence"),
    [
        (2, "2 of 90 images cannot be taken with every class represented; expected 3 to 90"),
        (91, "91 images were asked for and 90 are left after the validation split"),
    ],
)
def test_a_train_size_out_of_range_is_refused(train_size: int, sentence: str) -> None:
    with pytest.raises(RequestError, match=rf"^data\.train_size: {sentence}"):
        split_validation(_labels(60, 20, 20), DataSpec(validation=10, train_size=train_size))


def test_a_class_of_one_image_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        split_validation(_labels(50, 50, 1), DataSpec(validation=10))
    assert str(caught.value) == (
        "data.validation: expected two images or more of every class, to train and to validate "
        "on, found one of class 2"
    )


WRONG = {
    "data.validation=0": "expected greater than 0, found 0",
    "data.validation=-0.1": "expected greater than 0, found -0.1",
    "data.validation=1.5": "expected a whole number of images, or a share below 1, found 1.5",
    "data.validation=.inf": "expected a finite number, found inf",
    "data.validation=.nan": "expected a finite number, found nan",
    "data.validation=1400": "1400 of 1400 images cannot be taken with every class represented",
    "data.validation=1.0e+30": "1e+30 of 1400 images cannot be taken with every class",
    "data.train_size=0": "expected greater than 0, found 0",
    "data.train_size=2.5": "expected an integer, found 2.5",
    "data.train_size=9": "9 of 1260 images cannot be taken with every class represented",
    "data.split_seed=-1": "expected greater than or equal to 0, found -1",
    "data.split_seed=4294967296": "expected less than 4294967296, found 4294967296",
    "data.pad=8": "expected less than the 8 pixels of an image, found 8",
    "data.pad=-1": "expected greater than or equal to 0, found -1",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_number_that_cannot_be_is_refused_by_its_name(word: str) -> None:
    with pytest.raises(RequestError) as caught:
        open_splits(as_run(None, [word]).data, DistributedContext())
    assert str(caught.value).startswith(f"{word.partition('=')[0]}: {WRONG[word]}")
