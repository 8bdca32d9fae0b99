"""Images of a split as files in an Arrow file, mapped into memory and decoded by row where they are read."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from torch import Tensor

from raytrain.data.encoded import contents, decode_one, is_encoded, pillow_warnings
from raytrain.data.images import Location
from raytrain.data.parquet import Images

_SCHEMA = pa.schema(
    {
        "image": pa.large_binary(),
        "mode": pa.string(),
        "encoded": pa.bool_(),
        "sha256": pa.binary(32),
    }
)
_PER_THREAD = 16  # images, below which a thread costs more than it gains


class StoredImages:
    """Pixels of a split, (n, c, h, w), of which only those asked for are in memory.

    Pages of the file are shared by all processes of the machine, and given up where memory is short.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int]) -> None:
        self._image = shape
        with pa.memory_map(str(file)) as source:
            stored = pa.ipc.open_file(source)
            self._batches = [stored.get_batch(k) for k in range(stored.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self._ends[-1]), *self._image)

    def __getitem__(self, rows: Tensor) -> UInt8[Tensor, "n c h w"]:
        """Decode these images in threads."""
        threads = min(os.cpu_count() or 1, 16, 1 + len(rows) // _PER_THREAD)
        return self.read(rows, threads)

    def read(self, rows: Tensor, threads: int = 1) -> UInt8[Tensor, "n c h w"]:
        """Decode these images; grey ones become equal channels of coloured ones."""
        wanted = rows.tolist()
        pixels = np.empty((len(wanted), *self._image), dtype=np.uint8)

        def fill(first: int) -> None:
            for place in range(first, len(wanted), threads):
                pixels[place] = self._decoded(wanted[place])

        with pillow_warnings():
            if threads == 1:
                fill(0)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(fill, range(threads)))
        return torch.from_numpy(pixels)

    def digest(self, rows: Tensor) -> bytes:
        """SHA-256 of those of the pixels of these images; nothing is decoded."""
        found = hashlib.sha256()
        for row in rows.tolist():
            found.update(self._value(row, "sha256"))
        return found.digest()

    def _decoded(self, row: int) -> UInt8[np.ndarray, "c h w"]:
        content = self._value(row, "image")
        if not self._value(row, "encoded"):
            return np.frombuffer(content, np.uint8).reshape(-1, *self._image[1:])
        image = decode_one(content, self._value(row, "mode"))
        return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)

    def _value(self, row: int, column: str) -> Any:
        k = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[k]
        return batch.column(column)[row - int(self._ends[k])].as_py()  # counted from the end


class Writer:
    """Writes the Arrow file of `StoredImages`, a batch at a time."""

    def __init__(self, file: Path) -> None:
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)

    def add(self, images: Images) -> None:
        """Append encoded images as they are, others as bytes of pixels."""
        count, encoded = len(images.pixels), is_encoded(images.column.type)
        if encoded:
            files = contents(images.column, Location(Path(), ""))
        else:
            files = [image.tobytes() for image in images.pixels]
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images.pixels]
        columns = [files, [images.mode] * count, [encoded] * count, digests]
        arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))

    def close(self) -> None:
        self._writer.close()
        self._sink.close()
