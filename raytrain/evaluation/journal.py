"""Verdicts on disk, one line each, as they come: an evaluation that was interrupted goes on from here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.core.files import write_atomically
from raytrain.core.types import TrainingFailed
from raytrain.evaluation.work_item import Verdict, WorkItem


class Journal:
    """The verdicts under one `key`: whatever decides them. A file of another key is begun anew.

    A line that was torn by a crash is forgotten, with all after it.

    Raises:
        TrainingFailed: if the file cannot be written.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        self._file = file
        self._known: dict[WorkItem, Verdict] = {}
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
        """What all its verdicts cost, in forward-equivalents."""
        return sum(verdict.fe for verdict in self._known.values())

    @property
    def seconds(self) -> float:
        """The same in seconds of the processes that attacked."""
        return math.fsum(verdict.seconds for verdict in self._known.values())

    def get(self, unit: WorkItem) -> Verdict | None:
        """What came of a unit, if it is known."""
        return self._known.get(unit)

    def add(self, verdict: Verdict) -> None:
        """Write a verdict down; it is on the disk when this returns."""
        unit = verdict.work_item
        line = {"stage": unit.stage, "rows": unit.rows, "values": verdict.values}
        line |= {"fe": verdict.fe, "seconds": round(verdict.seconds, 3)}
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from error
        self._known[unit] = verdict

    def _read(self, first: str) -> list[str]:
        """Lines of whole verdicts of a file that has the same key; they are known from now on."""
        if not self._file.is_file():
            return []
        key, *lines = [*self._file.read_text(errors="replace").splitlines(keepends=True), ""]
        whole: list[str] = []
        for line in lines if key == first else []:
            verdict = _verdict(line)
            if verdict is None:
                break
            self._known[verdict.work_item] = verdict
            whole.append(line)
        return whole

    def _refused(self, error: OSError) -> TrainingFailed:
        return TrainingFailed(f"{self._file}: could not be written ({error.strerror or error})")


def _verdict(line: str) -> Verdict | None:
    if not line.endswith("\n"):
        return None
    try:
        told = json.loads(line)
        unit = WorkItem(told["stage"], tuple(told["rows"]))
        values = tuple(told["values"])
        if len(values) != len(unit.rows):
            return None
        return Verdict(unit, values, told["fe"], told["seconds"])
    except (ValueError, KeyError, TypeError):
        return None
