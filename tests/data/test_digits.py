"""Digits: 1,797 real images, one fixed stratified split, pixels that stand for value / 16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from raytrain.data.digits import is_test
from raytrain.data.sources import SOURCES, Split, describe, read

SPLITS: tuple[Split, Split] = ("train", "test")
FIRST_TEST_INDICES = [4, 5, 6, 9, 14, 17, 18, 19]
SUM_OF_TEST_INDICES = 337093


def test_the_split_has_1400_training_and_397_test_images_of_8x8_grey_pixels() -> None:
    train, test = read("digits", "train"), read("digits", "test")
    assert train.whole.shape == (1400, 1, 8, 8)
    assert test.whole.shape == (397, 1, 8, 8)
    assert len(train.labels) == 1400 and len(test.labels) == 397
    assert train.classes == test.classes == tuple("0123456789")


def test_each_class_has_its_share_of_test_images_to_within_one() -> None:
    train, test = (read("digits", split).labels.bincount(minlength=10) for split in SPLITS)
    share = (train + test) * 397 / 1797
    assert ((test - share).abs() < 1).all()


def test_the_two_splits_together_are_the_1797_images_each_once() -> None:
    scans = load_digits(return_X_y=True)[0]
    whole = sorted(tuple(row) for row in np.rint(scans * 255 / 16).astype(int).tolist())
    parts = [tuple(row) for split in SPLITS for row in _rows(split)]
    assert sorted(parts) == whole


def test_the_split_is_the_same_in_every_version() -> None:
    labels = np.asarray(load_digits(return_X_y=True)[1]).astype(np.int64)
    chosen = np.flatnonzero(is_test(labels))
    assert len(chosen) == 397
    assert chosen[:8].tolist() == FIRST_TEST_INDICES
    assert int(chosen.sum()) == SUM_OF_TEST_INDICES


def test_no_seed_of_a_run_reaches_the_split() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = read("digits", "test").whole
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, read("digits", "test").whole)


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_return_the_seventeen_values_exactly(split: Split) -> None:
    labels = np.asarray(load_digits(return_X_y=True)[1]).astype(np.int64)
    values = load_digits(return_X_y=True)[0][is_test(labels) == (split == "test")]
    pixels = read("digits", split).whole.double()
    assert torch.equal((pixels / 255 * 16).round().flatten(1), torch.from_numpy(values))
    assert (pixels / 255 - torch.from_numpy(values).view_as(pixels) / 16).abs().max() <= 0.5 / 255


def test_the_catalogue_holds_the_mean_and_deviation_of_the_training_images() -> None:
    known, measured = SOURCES["digits"], describe(read("digits", "train"))
    assert known.mean == pytest.approx(measured.mean, abs=5e-5)
    assert known.std == pytest.approx(measured.std, abs=5e-5)


def _rows(split: Split) -> list[list[int]]:
    return read("digits", split).whole.flatten(1).tolist()
