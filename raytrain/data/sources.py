"""Images of a data set by its name: built in, published in torchvision's files, or in Parquet."""

from __future__ import annotations

from pathlib import Path

import torch

from raytrain.core.errors import RequestError
from raytrain.core.memory import machine_memory
from raytrain.core.nearest import nearest
from raytrain.data.catalogue import SOURCES, Source
from raytrain.data.digits import read_digits
from raytrain.data.images import ImageSet, Split
from raytrain.data.levels import count_levels
from raytrain.data.spec import DEFAULT_FOLDER
from raytrain.data.splits import is_parquet, parquet_files, training_files

__all__ = [
    "SOURCES",
    "ImageSet",
    "Source",
    "Split",
    "check_name",
    "describe",
    "read",
    "read_additional",
    "source_of",
]


def read(
    name: str,
    split: Split,
    *,
    path: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    test_path: str | Path | None = None,
    in_memory: bool | None = None,
    memory: int | None = None,
    like: ImageSet | None = None,
) -> ImageSet:
    """Read one split: the images of `name`, which is in `SOURCES` or is a path to Parquet files.

    `path` is the folder of torchvision's files; a Parquet name is a path already. The other arguments are
    for Parquet only; images are in memory if they need at most `memory` bytes (default: half of this
    machine's), or as `in_memory` says; test images must fit `like`, those for training.
    """
    check_name(name)
    if name not in SOURCES:
        from raytrain.data.prepared import ParquetSplit, open_images

        files = parquet_files(name, split, test_path)
        parquet = ParquetSplit(files, image_column, label_column, like, split == "train")
        return open_images(parquet, in_memory, memory or machine_memory() // 2)
    for field, value in {
        "image_column": image_column,
        "label_column": label_column,
        "test_path": test_path,
        "in_memory": in_memory,
    }.items():
        if value is not None:
            raise RequestError(f"data.{field}: expected nothing here, {name} is not Parquet")
    if name == "digits":
        return read_digits(split)
    from raytrain.data.published import read_published

    return read_published(name, split, path or DEFAULT_FOLDER)


def read_additional(name: str, like: ImageSet, in_memory: bool | None, memory: int) -> ImageSet:
    """Read additional training images from Parquet files; they must fit `like`, the training images.

    They are in memory if they need at most `memory` bytes, or as `in_memory` says.
    """
    if not is_parquet(name):
        raise RequestError(
            "data.extra.name: expected a path ending in .parquet or a folder of such files, found "
            f"'{name}'"
        )
    from raytrain.data.prepared import ParquetSplit, open_images

    files = training_files(name, "data.extra.name")
    return open_images(ParquetSplit(files, None, None, like, training=False), in_memory, memory)


def check_name(name: str) -> None:
    """Check that a name is in `SOURCES`, a path ending in .parquet, or a folder; nothing is read."""
    if name in SOURCES or is_parquet(name):
        return
    raise RequestError(
        f"data.name: expected {', '.join(SOURCES)}, a path ending in .parquet or a folder of such "
        f"files, found '{name}'{nearest(name, SOURCES)}"
    )


def source_of(name: str, images: ImageSet) -> Source:
    """Return the properties of a data set, from the catalogue or else from its training images."""
    return SOURCES[name] if name in SOURCES else describe(images)


def describe(images: ImageSet) -> Source:
    """mean = E[x], std = sqrt(E[(x - mean)^2]), x = pixel / 255, per channel over all pixels.

    Exact up to the last rounding: pixels are counted by value, then summed in float64.
    A constant channel gets a standard deviation of 1, so that dividing by it changes nothing.
    """
    count, channels, size = images.pixels.shape[:3]
    counts = images.levels
    if counts is None:
        counts = count_levels(images.whole.numpy())
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in torch.from_numpy(counts):
        share = channel.double() / channel.sum()
        mean = float(share @ levels)
        means.append(mean)
        stds.append(float(share @ (levels - mean).square()) ** 0.5)
    return Source(
        description=f"{count:,} images of {len(images.classes)} classes",
        channels=channels,
        size=size,
        classes=images.classes,
        mean=tuple(means),
        std=tuple(std if std > 1e-6 else 1.0 for std in stds),
        pad=size // 8,
    )
