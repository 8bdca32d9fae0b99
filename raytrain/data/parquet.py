"""Reading of images from Parquet files, in batches of two columns, for several layouts of pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, UInt8

from raytrain.core.errors import RequestError
from raytrain.data.arrays import unpack
from raytrain.data.columns import class_names, image_column, image_mode, label_column
from raytrain.data.encoded import decode, is_encoded
from raytrain.data.images import DARK, ImageSet, Location, Origin, Pixels, label_fault
from raytrain.data.levels import Levels

BATCH_ROWS = 1024
_BATCH_BYTES = 2**28  # of pixels, at most
_OTHER = Path("the training images")  # that are not in Parquet files
_ROWS_LOOKED_AT = 8  # the first image may be grey, others coloured
MAX_CLASSES = 65_536


@dataclass(frozen=True)
class _Table:
    """Image and label columns of one file, with their metadata."""

    pixels_at: Location
    labels_at: Location
    names: tuple[str, ...] | None  # of the classes
    mode: str | None  # of the images


@dataclass(frozen=True)
class _Chunk:
    """Labels and shape of one batch of rows, and its location."""

    shape: tuple[int, ...]  # of its pixels
    labels: Int64[np.ndarray, " n"]
    pixels_at: Location
    labels_at: Location
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class _Layout:
    """Common properties of all rows of a data set, and the columns of its first file."""

    channels: int
    size: int  # height and width
    classes: tuple[str, ...]
    origin: Origin


@dataclass(frozen=True)
class Images:
    """One batch of an image column: decoded, and as it is in the file."""

    pixels: UInt8[np.ndarray, "n c h w"]
    column: pa.Array
    mode: str | None  # of the column


@dataclass(frozen=True)
class Rows:
    """Everything about the rows of a split except their pixels."""

    labels: Int64[np.ndarray, " n"]
    classes: tuple[str, ...]
    origin: Origin
    shape: tuple[int, int, int]  # channels, height, width
    levels: Int64[np.ndarray, "c 256"]  # pixels of each value, per channel


def joined(parts: list[np.ndarray], rows: Rows) -> UInt8[np.ndarray, "n c h w"]:
    """Join batches of images; grey ones become equal channels beside coloured ones."""
    pixels = np.empty((len(rows.labels), *rows.shape), dtype=np.uint8)
    start = 0
    for part in parts:
        pixels[start : start + len(part)] = part
        start += len(part)
    return pixels


def image_set(pixels: Pixels, rows: Rows, is_shared: bool = False) -> ImageSet:
    """The images of a split with their pixels."""
    labels = torch.from_numpy(rows.labels)
    return ImageSet(pixels, labels, rows.classes, rows.origin, rows.levels, is_shared)


def read_rows(
    files: list[Path],
    take: Callable[[Images], None],
    *,
    image: str | None = None,
    label: str | None = None,
    like: ImageSet | None = None,
    training: bool = True,
) -> Rows:
    """Read and check the rows of all files, in order; pass the images to `take`, a batch at a time.

    Every file must fit the first one or, where they are given, the images `like` (those that a
    network is trained on): columns, size, channels, labels and class names. Grey images become
    three equal channels beside coloured ones; labels follow the class names where a file lists
    the same names in another order. A file without class names has labels 0..C-1.

    C is the number of class names in the metadata of any file, else the largest label plus one.
    Each of 0..C-1 must occur in images for `training`; test images may lack some.
    """
    first = None if like is None else like.origin
    tables: list[_Table] = []
    for file in files:
        tables.append(_table(file, image, label, first))
        first = first or _origin(tables[0], named_by=None)
    levels = Levels()
    chunks = [chunk for table in tables for chunk in _chunks(table, levels, take)]
    whole = files[0] if len(files) == 1 else Path(os.path.commonpath(files))
    if not chunks:
        raise RequestError(f"{whole}: expected at least one row, found none")
    layout = _layout(chunks) if like is None else _layout_of(like)
    labels = np.concatenate([_relabelled(chunk, layout) for chunk in chunks])
    for chunk in chunks:
        _check_shape(chunk, layout)
    if training and (fault := label_fault(labels, len(layout.classes))):
        raise replace(chunks[0].labels_at, file=whole).error(fault)
    if fault := levels.fault(training):
        raise replace(chunks[0].pixels_at, file=whole).error(fault)
    shape = (layout.channels, layout.size, layout.size)
    return Rows(labels, layout.classes, layout.origin, shape, levels.of(layout.channels))


def decoded_bytes(
    files: list[Path], image: str | None = None, like: ImageSet | None = None
) -> int:
    """Bytes of all images as pixels, if all are as large as the first ones."""
    first = None if like is None else like.origin
    count = 0
    for file in files:
        with _readable(file), pq.ParquetFile(file) as parquet:
            count += parquet.metadata.num_rows
    for file in files:
        with _readable(file):
            schema = pq.read_schema(file, memory_map=True)
        at = Location(file, image_column(file, schema, image, first))
        if each := _bytes_of_one(at, image_mode(schema, at.column)):
            return count * each
    return 0


def _bytes_of_one(at: Location, mode: str | None) -> int:
    """Bytes of an image as pixels; 0 if the file has none."""
    for batch in _batches(at.file, [at.column], _ROWS_LOOKED_AT):
        pixels = _decoded(batch.column(0), at, mode)
        return pixels.nbytes // len(pixels)
    return 0


def _table(file: Path, image: str | None, label: str | None, first: Origin | None) -> _Table:
    with _readable(file):
        schema = pq.read_schema(file, memory_map=True)
    pixels_at = Location(file, image_column(file, schema, image, first))
    labels_at = Location(file, label_column(file, schema, label, first))
    names = class_names(file, schema, labels_at.column)
    return _Table(pixels_at, labels_at, names, image_mode(schema, pixels_at.column))


def _origin(one: _Table | _Chunk, named_by: Path | None) -> Origin:
    return Origin(one.pixels_at.file, one.pixels_at.column, one.labels_at.column, named_by)


def _chunks(table: _Table, levels: Levels, take: Callable[[Images], None]) -> Iterator[_Chunk]:
    pixels_at, labels_at, brightest = table.pixels_at, table.labels_at, 0
    each = _bytes_of_one(pixels_at, table.mode)
    size = max(1, min(BATCH_ROWS, _BATCH_BYTES // max(1, each)))
    for batch in _batches(pixels_at.file, [pixels_at.column, labels_at.column], size):
        column = batch.column(pixels_at.column)
        pixels = _decoded(column, pixels_at, table.mode)
        brightest = max(brightest, levels.add(pixels))
        labels = _labels(batch.column(labels_at.column), labels_at)
        take(Images(pixels, column, table.mode))
        yield _Chunk(pixels.shape, labels, pixels_at, labels_at, table.names)
        pixels_at = replace(pixels_at, row=pixels_at.row + batch.num_rows)
        labels_at = replace(labels_at, row=labels_at.row + batch.num_rows)
    if brightest == 1:  # a black file may be one of several, but not a file of 0 and 1
        raise table.pixels_at.error(DARK)


def _decoded(column: pa.Array, at: Location, mode: str | None) -> UInt8[np.ndarray, "n c h w"]:
    return decode(column, at, mode) if is_encoded(column.type) else unpack(column, at)


def _batches(file: Path, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
    with _readable(file), pq.ParquetFile(file, memory_map=True) as parquet:
        for batch in parquet.iter_batches(batch_size=size, columns=columns):
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


def _layout(chunks: list[_Chunk]) -> _Layout:
    """The layout of the first image, with the class names of the first file that gives any."""
    height, width = chunks[0].shape[2:]
    if height != width:
        raise chunks[0].pixels_at.error(f"expected square images, found {height}x{width}")
    named = next((chunk for chunk in chunks if chunk.names), None)
    num_classes = 1 + max(int(chunk.labels.max()) for chunk in chunks)
    return _Layout(
        channels=max(chunk.shape[1] for chunk in chunks),
        size=height,
        classes=(named and named.names) or _numbers(num_classes),
        origin=_origin(chunks[0], named and named.labels_at.file),
    )


def _layout_of(images: ImageSet) -> _Layout:
    channels, size = images.pixels.shape[1:3]
    return _Layout(channels, size, images.classes, images.origin or Origin(_OTHER, "", "", _OTHER))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _relabelled(chunk: _Chunk, layout: _Layout) -> Int64[np.ndarray, " n"]:
    """The labels as positions in the layout's classes."""
    names = chunk.names or _numbers(len(layout.classes))
    outside = np.flatnonzero(chunk.labels >= len(names))
    if len(outside):
        origin = layout.origin
        named = "named in the metadata" if chunk.names else f"of {origin.named_by or origin.file}"
        raise chunk.labels_at.error(
            f"expected labels 0..{len(names) - 1}, the {len(names)} classes {named}, "
            f"found {chunk.labels[outside[0]]}",
            int(outside[0]),
        )
    if names == layout.classes:
        return chunk.labels
    if set(names) == set(layout.classes):
        position = {name: k for k, name in enumerate(layout.classes)}
        return np.array([position[name] for name in names])[chunk.labels]
    if chunk.names and (layout.origin.named_by or len(names) != len(layout.classes)):
        raise chunk.labels_at.error(_other_names(names, layout))
    return chunk.labels


def _other_names(names: tuple[str, ...], layout: _Layout) -> str:
    count, origin = len(layout.classes), layout.origin
    if origin.named_by is None:
        return f"expected names of the {count} classes of {origin.file}, found {len(names)} names"
    missing = [name for name in layout.classes if name not in names]
    unknown = [name for name in names if name not in layout.classes]
    found = [f"no {_some(missing)}"] if missing else []
    found += [f"an unknown {_some(unknown)}"] if unknown else []
    return f"expected the {count} class names of {origin.named_by}, found {' and '.join(found)}"


def _some(names: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:5])
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed


def _check_shape(chunk: _Chunk, layout: _Layout) -> None:
    channels, height, width = chunk.shape[1:]
    in_file = chunk.pixels_at.file == layout.origin.file
    where = "in the image before it" if in_file else f"in {layout.origin.file}"
    if (height, width) != (layout.size, layout.size):
        raise chunk.pixels_at.error(
            f"expected {layout.size}x{layout.size} pixels as {where}, found {height}x{width}",
            row=0,
        )
    if channels > layout.channels:
        raise chunk.pixels_at.error(f"expected grey images as {where}, found coloured ones")
