"""Parquet files -> images: batch by batch, two columns only, whatever the layout of the pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, UInt8

from raytrain.data.arrays import unpack
from raytrain.data.columns import class_names, image_column, label_column
from raytrain.data.encoded import decode, is_encoded
from raytrain.data.images import Images, Location
from raytrain.types import RequestError

BATCH_ROWS = 1024
MAX_CLASSES = 65_536


@dataclass(frozen=True)
class _Chunk:
    """One batch of rows, and where it came from."""

    pixels: UInt8[np.ndarray, "n c h w"]
    labels: Int64[np.ndarray, " n"]
    pixels_at: Location
    labels_at: Location
    names: tuple[str, ...] | None


def read_parquet(
    files: list[Path],
    *,
    image: str | None = None,
    label: str | None = None,
    every_class: bool = True,
) -> Images:
    """The rows of all files, in order, as one tensor.

    `every_class` demands that each of 0..C-1 occurs, as it must in training images; test images
    may lack some. C is the number of class names in the file's metadata, else the largest label
    plus one: without metadata, test images may therefore show fewer classes than training ones.
    """
    chunks = [chunk for file in files for chunk in _chunks(file, image, label)]
    whole = files[0] if len(files) == 1 else Path(os.path.commonpath(files))
    if not chunks:
        raise RequestError(f"{whole}: expected at least one row, found none")
    labels = np.concatenate([chunk.labels for chunk in chunks])
    at = replace(chunks[0].labels_at, file=whole)
    classes = _classes(labels, _common_names(chunks), at, every_class)
    return Images(torch.from_numpy(_join(chunks)), torch.from_numpy(labels), classes)


def _chunks(file: Path, image: str | None, label: str | None) -> Iterator[_Chunk]:
    with _readable(file):
        schema = pq.read_schema(file, memory_map=True)
    pixels_at = Location(file, image_column(file, schema, image))
    labels_at = Location(file, label_column(file, schema, label))
    names = class_names(schema, labels_at.column)
    for batch in _batches(file, [pixels_at.column, labels_at.column]):
        column = batch.column(pixels_at.column)
        to_pixels = decode if is_encoded(column.type) else unpack
        yield _Chunk(
            pixels=to_pixels(column, pixels_at),
            labels=_labels(batch.column(labels_at.column), labels_at),
            pixels_at=pixels_at,
            labels_at=labels_at,
            names=names,
        )
        pixels_at = replace(pixels_at, row=pixels_at.row + batch.num_rows)
        labels_at = replace(labels_at, row=labels_at.row + batch.num_rows)


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _readable(file), pq.ParquetFile(file, memory_map=True) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            if batch.num_rows:
                yield batch


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise RequestError(f"{file}: expected a whole Parquet file ({reason})") from error


def _labels(column: pa.Array, location: Location) -> Int64[np.ndarray, " n"]:
    if column.null_count:
        row = column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise location.error("expected an integer, found null", int(row))
    values = column.to_numpy(zero_copy_only=False)
    outside = np.flatnonzero((values < 0) | (values >= MAX_CLASSES))
    if len(outside):
        raise location.error(
            f"expected a class 0..C-1 with C at most {MAX_CLASSES}, found {values[outside[0]]}",
            int(outside[0]),
        )
    return values.astype(np.int64)


def _common_names(chunks: list[_Chunk]) -> tuple[str, ...] | None:
    """The class names of the files that give any: they must agree on what a label means."""
    named = [chunk for chunk in chunks if chunk.names]
    for chunk in named:
        if chunk.names != named[0].names:
            raise chunk.labels_at.error(
                f"expected the class names of {named[0].labels_at.file}, found others"
            )
    return named[0].names if named else None


def _classes(
    labels: Int64[np.ndarray, " n"],
    names: tuple[str, ...] | None,
    location: Location,
    every_class: bool,
) -> tuple[str, ...]:
    classes = names or tuple(str(label) for label in range(int(labels.max()) + 1))
    if labels.max() >= len(classes):
        raise location.error(
            f"expected labels 0..{len(classes) - 1}, the {len(classes)} classes named in the "
            f"metadata, found {labels.max()}"
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if every_class and len(missing):
        first = ", ".join(str(label) for label in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise location.error(
            f"expected every class 0..{len(classes) - 1} in the training images, "
            f"found no image of {first}{more}"
        )
    return classes


def _join(chunks: list[_Chunk]) -> UInt8[np.ndarray, "n c h w"]:
    """One array of square images; grey ones become three equal channels beside colour."""
    height, width = chunks[0].pixels.shape[2:]
    if height != width:
        found = f"found {height}x{width}"
        raise chunks[0].pixels_at.error(f"expected square images, {found}")
    channels = max(chunk.pixels.shape[1] for chunk in chunks)
    num_rows = sum(len(chunk.pixels) for chunk in chunks)
    joined = np.empty((num_rows, channels, height, width), dtype=np.uint8)
    start = 0
    for chunk in chunks:
        size = chunk.pixels.shape[2:]
        if size != (height, width):
            raise chunk.pixels_at.error(
                f"expected {height}x{width} pixels as in the image before it, "
                f"found {size[0]}x{size[1]}",
                row=0,
            )
        joined[start : start + len(chunk.pixels)] = chunk.pixels
        start += len(chunk.pixels)
    return joined
