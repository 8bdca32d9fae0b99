"""The smallest work of an evaluation, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkItem:
    """Work that is done whole or not at all: one stage on some images of the test set."""

    stage: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a unit: for each row the predicted class (clean), or whether it kept its label."""

    work_item: WorkItem
    values: tuple[int, ...]
    fe: int
    seconds: float
