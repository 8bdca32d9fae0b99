"""One split of a data set in memory, and locations of errors in its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from raytrain.core.errors import RequestError

Split = Literal["train", "test"]
AnySplit = Literal["train", "test", "extra"]
"""The same, or additional images for training."""
DARK = (
    "expected pixels in 0..255, found none above 1; black and white are stored as 0 and 255, as "
    "truth values or as fractions"
)


@dataclass(frozen=True)
class Origin:
    """The first Parquet file of a split, its image and label columns, and the file with class names."""

    file: Path
    image: str
    label: str
    named_by: Path | None


@runtime_checkable
class Pixels(Protocol):
    """Pixels 0..255 of images, (n, c, h, w): a tensor, or files that are decoded where they are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The pixels of these images, as a tensor."""
        ...


def whole(pixels: Pixels) -> Tensor:
    """All pixels, as one tensor: themselves, if they are one."""
    return pixels if isinstance(pixels, Tensor) else pixels[torch.arange(pixels.shape[0])]


@dataclass(frozen=True)
class ImageSet:
    """Pixels 0..255, one label per image, class names, and what is known of Parquet files."""

    pixels: Pixels
    labels: Int64[Tensor, " n"]
    classes: tuple[str, ...]
    origin: Origin | None = None
    levels: Int64[np.ndarray, "c 256"] | None = None  # pixels of each value, per channel
    is_shared: bool = False  # whether they are in a file that all processes of the machine map

    @property
    def whole(self) -> Tensor:
        """All pixels, as one tensor."""
        return whole(self.pixels)


@dataclass(frozen=True)
class Location:
    """Location in a file: `row` counts from 0 within the file."""

    file: Path
    column: str
    row: int = 0

    def error(self, sentence: str, row: int | None = None) -> RequestError:
        """Return a RequestError with this location; `row` is counted from it."""
        where = f"{self.file}: column '{self.column}'"
        if row is not None:
            where += f", row {self.row + row}"
        return RequestError(f"{where}: {sentence}")


def label_fault(labels: Int64[np.ndarray, " n"], num_classes: int) -> str | None:
    """Return why no classifier can be trained on these labels in 0..C-1: "expected ..., found ..."."""
    missing = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(missing):
        first = ", ".join(str(label) for label in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        return (
            f"expected every class 0..{num_classes - 1} in the training images, "
            f"found no image of {first}{more}"
        )
    if num_classes == 1:
        return "expected training images of at least two classes, found only class 0"
    return None


def pixel_fault(brightest: int, num_equal: int) -> str | None:
    """Return why images are not distinguishable, if they are not: "expected ..., found ...".

    `brightest` is their largest value, `num_equal` their number if all training images are equal, else 0.
    """
    if brightest <= 1:
        return DARK
    if num_equal:
        return f"expected training images that differ, found {num_equal} equal ones"
    return None
