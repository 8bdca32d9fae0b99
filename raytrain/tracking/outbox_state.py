"""The state of an outbox's runs, from its records alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = dict[str, Any]  # "do", "run" (the handle) and what the deed needs


@dataclass(slots=True)
class Known:
    """A run after its records."""

    step: int = 0  # of its last row
    parent: str | None = None
    open: bool = False
    adopted: str | None = None  # the id it had before it came here


class RunIndex:
    """The runs of an outbox by handle. A few hundred bytes for each; never a row."""

    def __init__(self) -> None:
        self.runs: dict[str, Known] = {}

    def apply(self, record: Record) -> None:
        """Take note of a record."""
        deed = record.get("do")
        if deed in ("open", "adopt"):
            parent = record.get("parent")
            run = self.runs.setdefault(record["run"], Known())
            run.parent = run.parent if parent is None else sys.intern(parent)
        run = self.runs.get(record.get("run", ""))
        if run is None:
            return
        if deed in ("open", "reopen", "end"):
            run.open = deed != "end"
        elif deed == "adopt":
            run.adopted = record["id"]
        elif deed == "row":
            run.step = max(run.step, record["step"])

    def left_open(self) -> list[str]:
        """Handles of runs that were begun and not ended."""
        return [handle for handle, run in list(self.runs.items()) if run.open]

    def adopts(self, run_id: str) -> bool:
        """Whether a run that began elsewhere is continued here."""
        return any(run.adopted == run_id for run in list(self.runs.values()))

    def plain(self) -> dict[str, list[Any]]:
        """As JSON."""
        return {
            handle: [run.step, run.parent, run.open, run.adopted]
            for handle, run in self.runs.items()
        }

    def restore(self, plain: dict[str, list[Any]]) -> None:
        """From JSON."""
        self.runs = {handle: Known(*values) for handle, values in plain.items()}
