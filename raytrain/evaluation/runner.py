"""The stages of an evaluation in order, each on the images that it is about, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from raytrain.evaluation.journal import Journal
from raytrain.evaluation.settings import CLEAN, NOISE, EvaluationSettings, standard_stage
from raytrain.evaluation.work_item import Verdict, WorkItem

Work = Callable[[list[WorkItem]], Iterable[Verdict]]
"""Whoever attacks: verdicts come in any order."""


@dataclass(frozen=True)
class Standing:
    """How far an evaluation is, for who watches."""

    stage: str
    done: int  # units of this stage
    work_items: int
    images: int  # that the stage is about
    left: int  # of those judged so far, the ones that kept their label
    judged: int


Watch = Callable[[Standing], None]


@dataclass
class Verdicts:
    """Per image of the test set and per stage: survived (1), fallen (0) or not attacked (-1)."""

    labels: np.ndarray
    predicted: np.ndarray
    by_stage: dict[str, np.ndarray]

    @property
    def clean(self) -> np.ndarray:
        """Which are classified correctly: (n,) bool."""
        return self.predicted == self.labels

    def survived(self, stages: Iterable[str]) -> np.ndarray:
        """Which are classified correctly and fell to none of the stages: (n,) bool."""
        left = self.clean.copy()
        for stage in stages:
            left &= self.by_stage[stage] != 0
        return left


def run(
    exam: EvaluationSettings,
    labels: np.ndarray,
    work: Work,
    journal: Journal,
    watch: Watch | None = None,
) -> Verdicts:
    """All stages of an exam on the images with these labels; what the journal knows is not done again.

    A stage is cut into units in the order of the images, so that who does them, and how often the
    work was interrupted, changes no verdict. Only images that are classified correctly are attacked,
    and AutoAttack's stages only what the stages before have left.
    """
    count = len(labels)
    verdicts = Verdicts(labels, np.full(count, -1), {})
    for stage in exam.every_stage:
        rows = _due(stage, verdicts, exam)
        values = np.full(count, -1)
        for verdict in _told(stage, rows, exam.batch_size, work, journal, watch, verdicts):
            values[list(verdict.work_item.rows)] = verdict.values
        if stage == CLEAN:
            verdicts.predicted = values
        else:
            verdicts.by_stage[stage] = values
    return verdicts


def _due(stage: str, so_far: Verdicts, exam: EvaluationSettings) -> np.ndarray:
    """The images that a stage is about."""
    if stage == CLEAN:
        return np.arange(len(so_far.labels))
    if standard_stage(stage) is not None:
        before = [name for name in so_far.by_stage if standard_stage(name) is not None]
        return so_far.survived(before).nonzero()[0]
    if stage == NOISE:
        return so_far.survived(exam.with_gradients).nonzero()[0]
    return so_far.clean.nonzero()[0]


def _told(
    stage: str,
    rows: np.ndarray,
    size: int,
    work: Work,
    journal: Journal,
    watch: Watch | None,
    so_far: Verdicts,
) -> Iterator[Verdict]:
    """The verdicts on a stage's images, known ones first."""
    starts = range(0, len(rows), size)
    work_items = [WorkItem(stage, tuple(rows[at : at + size].tolist())) for at in starts]
    known = {unit: verdict for unit in work_items if (verdict := journal.get(unit)) is not None}
    left = judged = 0

    def news(verdicts: Iterable[Verdict], are_new: bool) -> Iterator[Verdict]:
        nonlocal left, judged
        for done, verdict in enumerate(verdicts, start=1 + (len(known) if are_new else 0)):
            if are_new:
                journal.add(verdict)
            right = so_far.labels[list(verdict.work_item.rows)] if stage == CLEAN else 1
            left += int((np.array(verdict.values) == right).sum())
            judged += len(verdict.values)
            if watch is not None:
                watch(Standing(stage, done, len(work_items), len(rows), left, judged))
            yield verdict

    yield from news(known.values(), are_new=False)
    todo = [unit for unit in work_items if unit not in known]
    if todo:
        yield from news(work(todo), are_new=True)
