"""The images of Parquet files, read once per machine and mapped into memory by all its processes.

A folder in `RAYTRAIN_CACHE` holds either the pixels of all images, or, where these need more memory than
there is, the images as they are encoded. It is made by the first process, and made anew when the files have
changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.files import locked
from raytrain.core.storage import cache_folder
from raytrain.data.images import ImageSet, Origin
from raytrain.data.parquet import (
    Images,
    Rows,
    decoded_bytes,
    image_set,
    joined,
    read_rows,
)
from raytrain.data.stored_images import StoredImages, Writer

_EDITION = 1  # of the layout of the folder
_WORTH_KEEPING = 2**24  # bytes of pixels, below which reading again takes less than half a second
_RECORD = "record.json"  # written last
_PIXELS, _IMAGES, _LABELS, _LEVELS = "pixels.bin", "images.arrow", "labels.npy", "levels.npy"


@dataclass(frozen=True)
class ParquetSplit:
    """The Parquet files of a split, and how they are read: see `read_rows`."""

    files: list[Path]
    image: str | None
    label: str | None
    like: ImageSet | None
    training: bool

    def read(self) -> ImageSet:
        """Read all images into the memory of this process, as one tensor."""
        parts: list[np.ndarray] = []
        rows = self.rows(lambda images: parts.append(images.pixels))
        return image_set(torch.from_numpy(joined(parts, rows)), rows)

    def rows(self, take: Callable[[Images], None]) -> Rows:
        """Read and check all rows; pass the images to `take`, a batch at a time."""
        return read_rows(
            self.files,
            take,
            image=self.image,
            label=self.label,
            like=self.like,
            training=self.training,
        )

    def name(self) -> tuple[str, str]:
        """Digests of what is read, and of its present state."""
        like = self.like
        kind = None if like is None else (like.classes, like.pixels.shape[1:], str(like.origin))
        files = [file.resolve() for file in self.files]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        request = (_EDITION, [str(f) for f in files], self.image, self.label, kind, self.training)
        return _digest(request), _digest(states)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def open_images(split: ParquetSplit, in_memory: bool | None, memory: int) -> ImageSet:
    """The images of a split: in memory, or decoded where they are read (`in_memory` false).

    By default they are in memory if their pixels need at most `memory` bytes.

    Raises:
        RequestError: naming the file, column and row that is at fault.
    """
    size = decoded_bytes(split.files, split.image, split.like)
    if in_memory is None:
        in_memory = size <= memory
    if in_memory and size < _WORTH_KEEPING:
        return split.read()
    what, state = split.name()
    parent = Path("RAYTRAIN_CACHE")
    try:
        parent = cache_folder() / "data" / "prepared"
        folder = parent / f"{what}-{state}-{'pixels' if in_memory else 'images'}"
        return _opened(folder) or _prepared(split, folder, in_memory)
    except OSError as error:
        reason = error.strerror or str(error)
        if in_memory:
            log_line(
                f"raytrain: data: the images cannot be shared with other processes of this machine, "
                f"since {parent} cannot be written ({reason})"
            )
            return split.read()
        raise RequestError(
            f"data.in_memory: the images cannot be copied to {parent} ({reason}); expected a folder "
            "with room for them in RAYTRAIN_CACHE"
        ) from None


def _prepared(split: ParquetSplit, folder: Path, in_memory: bool) -> ImageSet:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name[:16]}.lock"):
        if found := _opened(folder):  # by another process meanwhile
            return found
        for left in folder.parent.glob(f".{folder.name[:16]}-*"):  # by a process that was killed
            shutil.rmtree(left)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            temporary.mkdir()
            if in_memory:
                _write_pixels(split, temporary)
            else:
                _write_images(split, temporary)
            for old in folder.parent.glob(f"{folder.name[:16]}-*{folder.name[-7:]}"):
                shutil.rmtree(old)  # processes that have it mapped keep it until they end
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = _opened(folder)
    assert found is not None
    return found


def _write_pixels(split: ParquetSplit, folder: Path) -> None:
    parts: list[np.ndarray] = []
    rows = split.rows(lambda images: parts.append(images.pixels))
    with (folder / _PIXELS).open("wb") as file:
        parts.reverse()
        while parts:  # a part is given up as soon as it is written
            part = parts.pop()
            shape = (len(part), *rows.shape)  # grey images become equal channels of coloured ones
            file.write(np.ascontiguousarray(np.broadcast_to(part, shape)).data)
    _write_record(folder, rows, _PIXELS)


def _write_images(split: ParquetSplit, folder: Path) -> None:
    log_line(
        "raytrain: data: the images are decoded while training; they are checked now, and copied once, to "
        f"{folder.parent}"
    )
    with closing(Writer(folder / _IMAGES)) as writer:
        rows = split.rows(writer.add)
    _write_record(folder, rows, _IMAGES)


def _write_record(folder: Path, rows: Rows, file: str) -> None:
    np.save(folder / _LABELS, rows.labels)
    np.save(folder / _LEVELS, rows.levels)
    origin = rows.origin
    record = {
        "shape": rows.shape,
        "classes": rows.classes,
        "origin": {**asdict(origin), "file": str(origin.file)},
        "bytes": (folder / file).stat().st_size,
    }
    for name in (file, _LABELS, _LEVELS):
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())  # after a power failure the record is of whole files
    (folder / _RECORD).write_text(json.dumps(record, default=str))


def _opened(folder: Path) -> ImageSet | None:
    """The images of a folder, if it is there and whole."""
    in_memory = folder.name.endswith("pixels")
    file = folder / (_PIXELS if in_memory else _IMAGES)
    try:
        record = json.loads((folder / _RECORD).read_text())
        labels, levels = np.load(folder / _LABELS), np.load(folder / _LEVELS)
        if file.stat().st_size != record["bytes"]:
            return None
    except (OSError, ValueError, EOFError):
        return None
    shape = tuple(record["shape"])
    return image_set(
        _mapped(file, (len(labels), *shape)) if in_memory else StoredImages(file, shape),
        Rows(labels, tuple(record["classes"]), _origin(record["origin"]), shape, levels),
        is_shared=True,
    )


def _origin(record: dict[str, Any]) -> Origin:
    named_by = record["named_by"]
    paths = {
        "file": Path(record["file"]),
        "named_by": None if named_by is None else Path(named_by),
    }
    return Origin(**record | paths)


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The file's bytes; what a process would write to them is its own."""
    flat = torch.from_file(str(file), shared=False, size=int(np.prod(shape)), dtype=torch.uint8)
    return flat.view(shape)
