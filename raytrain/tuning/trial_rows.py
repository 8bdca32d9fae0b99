"""Every row of every trial, appended to a file, read as one Parquet table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.core.epoch_metrics import METRICS
from raytrain.core.files import atomic_writer

CHUNK = 20_000  # rows of the journal held in memory at once

SCHEMA = pa.schema(
    [
        pa.field(
            "trial", pa.int32(), nullable=False, metadata={"about": "number of its first attempt"}
        ),
        pa.field("attempt", pa.int32(), nullable=False, metadata={"about": "number in the study"}),
        pa.field("epoch", pa.int32(), nullable=False, metadata={"about": "epochs finished"}),
        pa.field("progress", pa.float64(), metadata={"about": "share of the run that is done"}),
        pa.field("time", pa.timestamp("ms", "UTC"), metadata={"about": "when it was recorded"}),
        pa.field(
            "params", pa.string(), metadata={"about": "JSON: path -> value in the run's units"}
        ),
        *(
            pa.field(name, pa.float64(), metadata={"about": about})
            for name, about in METRICS.items()
        ),
    ]
)
"""One row per trial and epoch. A metric that was not measured is null."""


class RowLog:
    """The journal of a sweep's rows: one JSON object per line, appended before anything else learns of it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(
        self,
        trial: int,
        attempt: int,
        epoch: int,
        progress: float,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        at: float | None = None,
    ) -> None:
        """Append a row; a torn line of a killed driver before it is closed first.

        It was recorded `at` so many seconds since 1970; now, if that is None.
        """
        row = {
            "trial": trial,
            "attempt": attempt,
            "epoch": epoch,
            "progress": progress,
            "time": int((time.time() if at is None else at) * 1000),
            "params": json.dumps(dict(params), default=str),
            **metrics,
        }
        torn = self._torn()
        with self.file.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in the order they came; unreadable lines are passed over."""
        if not self.file.is_file():
            return
        with self.file.open(encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def write_parquet(self, target: Path) -> int:
        """All rows as `SCHEMA`, each trial's epochs once; returns how many."""
        seen: set[tuple[int, int]] = set()
        count = 0
        with atomic_writer(target) as file, pq.ParquetWriter(file, SCHEMA) as writer:
            chunk: list[dict[str, Any]] = []
            for row in self.rows():
                key = (row["trial"], row["epoch"])
                if key in seen:
                    continue  # an epoch that was trained again after a crash
                seen.add(key)
                chunk.append(row)
                if len(chunk) == CHUNK:
                    count += _write(writer, chunk)
            count += _write(writer, chunk)
        return count

    def _torn(self) -> bool:
        if not self.file.is_file() or self.file.stat().st_size == 0:
            return False
        with self.file.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"


def _write(writer: pq.ParquetWriter, chunk: list[dict[str, Any]]) -> int:
    columns = {name: [row.get(name) for row in chunk] for name in SCHEMA.names}
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
    written = len(chunk)
    chunk.clear()
    return written
