"""Work items of an evaluation and their results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkItem:
    """One stage on some images of the test set: the smallest part that is run and stored."""

    stage: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class WorkResult:
    """Per row the predicted class (stage `clean`), or 1 where the label survived and 0 elsewhere."""

    work_item: WorkItem
    values: tuple[int, ...]
    fe: int
    seconds: float
