"""Results of work items on disk, from which an interrupted evaluation resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.core.errors import TrainingFailed
from raytrain.core.files import write_atomically
from raytrain.evaluation.work_item import WorkItem, WorkResult


class ResultLog:
    """The results under one `key`, which holds everything they depend on; one JSON line each.

    A file of another key is replaced; a torn line is dropped with all after it.

    Raises:
        TrainingFailed: if the file cannot be written.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        self._file = file
        self._known: dict[WorkItem, WorkResult] = {}
        first = json.dumps({"key": dict(key)}, sort_keys=True) + "\n"
        lines = self._read(first)
        try:
            write_atomically(file, "".join([first, *lines]))
        except OSError as error:
            raise self._refused(error) from error

    def __len__(self) -> int:
        return len(self._known)

    @property
    def fe(self) -> int:
        """Cost of all results in forward-equivalents."""
        return sum(result.fe for result in self._known.values())

    @property
    def seconds(self) -> float:
        """Cost of all results in seconds, summed over processes."""
        return math.fsum(result.seconds for result in self._known.values())

    def get(self, item: WorkItem) -> WorkResult | None:
        """The result of a work item; None if it is not known."""
        return self._known.get(item)

    def add(self, result: WorkResult) -> None:
        """Append a result, flushed to the disk."""
        item = result.work_item
        line = {"stage": item.stage, "rows": item.rows, "values": result.values}
        line |= {"fe": result.fe, "seconds": round(result.seconds, 3)}
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._known[item] = result

    def _read(self, first: str) -> list[str]:
        """Read the results of a file with the same key; return their lines."""
        if not self._file.is_file():
            return []
        key, *lines = [*self._file.read_text(errors="replace").splitlines(keepends=True), ""]
        whole: list[str] = []
        for line in lines if key == first else []:
            result = _result(line)
            if result is None:
                break
            self._known[result.work_item] = result
            whole.append(line)
        return whole

    def _refused(self, error: OSError) -> TrainingFailed:
        return TrainingFailed(f"{self._file}: could not be written ({error.strerror or error})")


def _result(line: str) -> WorkResult | None:
    if not line.endswith("\n"):
        return None
    try:
        read = json.loads(line)
        item = WorkItem(read["stage"], tuple(read["rows"]))
        values = tuple(read["values"])
        if len(values) != len(item.rows):
            return None
        return WorkResult(item, values, read["fe"], read["seconds"])
    except (ValueError, KeyError, TypeError):
        return None
