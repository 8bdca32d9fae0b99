"""Run the stages of an evaluation in order, each cut into work items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from raytrain.evaluation.result_log import ResultLog
from raytrain.evaluation.settings import CLEAN, NOISE, EvaluationSettings, standard_stage
from raytrain.evaluation.work_item import WorkItem, WorkResult

Work = Callable[[list[WorkItem]], Iterable[WorkResult]]
"""Run work items; yields results in any order."""


@dataclass(frozen=True)
class StageProgress:
    """Progress of a stage, passed to `Watch` after every work item."""

    stage: str
    done: int  # work items of this stage
    work_items: int
    images: int  # of this stage
    left: int  # of the images evaluated so far, those that kept their label
    evaluated: int


Watch = Callable[[StageProgress], None]


@dataclass
class StageResults:
    """Per image of the test set and per stage: survived (1), fallen (0) or not attacked (-1)."""

    labels: np.ndarray
    predicted: np.ndarray
    by_stage: dict[str, np.ndarray]

    @property
    def clean(self) -> np.ndarray:
        """Which are classified correctly: (n,) bool."""
        return self.predicted == self.labels

    def survived(self, stages: Iterable[str]) -> np.ndarray:
        """Which are classified correctly and survived all the stages: (n,) bool."""
        left = self.clean.copy()
        for stage in stages:
            left &= self.by_stage[stage] != 0
        return left


def run(
    settings: EvaluationSettings,
    labels: np.ndarray,
    work: Work,
    log: ResultLog,
    watch: Watch | None = None,
) -> StageResults:
    """Run all stages on the images with these labels; results in the log are not computed again.

    A stage is cut into work items in the order of the images, so that results depend neither on the
    worker nor on interruptions. Only correctly classified images are attacked, and by a stage of
    AutoAttack only those that survived its earlier stages.
    """
    count = len(labels)
    results = StageResults(labels, np.full(count, -1), {})
    for stage in settings.every_stage:
        rows = _due(stage, results, settings)
        values = np.full(count, -1)
        for result in _results(stage, rows, settings.batch_size, work, log, watch, results):
            values[list(result.work_item.rows)] = result.values
        if stage == CLEAN:
            results.predicted = values
        else:
            results.by_stage[stage] = values
    return results


def _due(stage: str, so_far: StageResults, settings: EvaluationSettings) -> np.ndarray:
    """The images of a stage."""
    if stage == CLEAN:
        return np.arange(len(so_far.labels))
    if standard_stage(stage) is not None:
        before = [name for name in so_far.by_stage if standard_stage(name) is not None]
        return so_far.survived(before).nonzero()[0]
    if stage == NOISE:
        return so_far.survived(settings.with_gradients).nonzero()[0]
    return so_far.clean.nonzero()[0]


def _results(
    stage: str,
    rows: np.ndarray,
    size: int,
    work: Work,
    log: ResultLog,
    watch: Watch | None,
    so_far: StageResults,
) -> Iterator[WorkResult]:
    """The results of a stage, logged ones first."""
    starts = range(0, len(rows), size)
    work_items = [WorkItem(stage, tuple(rows[at : at + size].tolist())) for at in starts]
    known = {item: result for item in work_items if (result := log.get(item)) is not None}
    left = evaluated = 0

    def observed(results: Iterable[WorkResult], are_new: bool) -> Iterator[WorkResult]:
        nonlocal left, evaluated
        for done, result in enumerate(results, start=1 + (len(known) if are_new else 0)):
            if are_new:
                log.add(result)
            right = so_far.labels[list(result.work_item.rows)] if stage == CLEAN else 1
            left += int((np.array(result.values) == right).sum())
            evaluated += len(result.values)
            if watch is not None:
                watch(StageProgress(stage, done, len(work_items), len(rows), left, evaluated))
            yield result

    yield from observed(known.values(), are_new=False)
    todo = [item for item in work_items if item not in known]
    if todo:
        yield from observed(work(todo), are_new=True)
