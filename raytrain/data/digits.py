"""scikit-learn's 1,797 scans of handwritten digits: real data without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from raytrain.data.images import ImageSet, Split

NUM_TEST = 397
NUM_CLASSES = 10
LEVELS = 16  # values are counts of dark pixels in 4x4 blocks: 0..16


def read_digits(split: Split) -> ImageSet:
    """8x8 grey images; pixel = round(value * 255 / 16), so pixel / 255 is value / 16."""
    table = _table()
    values, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    chosen = np.flatnonzero(is_test(labels) == (split == "test"))
    pixels = np.rint(values[chosen] * 255 / LEVELS).astype(np.uint8)
    return ImageSet(
        pixels=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels[chosen]),
        classes=tuple(str(digit) for digit in range(NUM_CLASSES)),
    )


def _table() -> np.ndarray:
    """The scans, 64 numbers and the digit in each row.

    Read from the file that scikit-learn installs: its import takes longer than a short training.
    """
    sklearn = find_spec("sklearn")
    for folder in () if sklearn is None else sklearn.submodule_search_locations or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    scans, digits = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(scans), np.asarray(digits)])


def is_test(labels: Int64[np.ndarray, " n"]) -> np.ndarray:
    """The fixed split: of each class, the first quota in one fixed permutation of all images.

    The permutation is `RandomState(0)`, whose stream numpy keeps unchanged between versions;
    it does not depend on the seed of a run, so every result on digits is measured on the same 397 images.
    """
    order = np.random.RandomState(0).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for digit, quota in enumerate(_quotas(np.bincount(labels, minlength=NUM_CLASSES))):
        held_out[order[labels[order] == digit][:quota]] = True
    return held_out


def _quotas(counts: np.ndarray) -> list[int]:
    """Test images per class: proportional, the rest to the largest remainders."""
    exact = NUM_TEST * counts / counts.sum()
    quotas = np.floor(exact).astype(int)
    largest = np.argsort(quotas - exact, kind="stable")
    quotas[largest[: NUM_TEST - quotas.sum()]] += 1
    return quotas.tolist()
