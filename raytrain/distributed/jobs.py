"""A job: one training as plain values, and its rows, here or on a worker; does not import Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.failures import as_failure, is_lost
from raytrain.core.file_systems import is_url
from raytrain.core.files import write_atomically
from raytrain.core.storage import later, pull, push
from raytrain.training.checkpoint import LAST, load
from raytrain.training.run_folder import ROWS, recent_rows

if TYPE_CHECKING:
    from raytrain.training.progress import OnStep


@dataclass(frozen=True)
class Job:
    """One training for a group: everything a worker needs, as plain values."""

    run: str  # RunConfig as JSON
    folder: (
        str  # for checkpoints; of a storage behind a URL, below its working copy on each machine
    )
    resume: bool  # from last.pt in `folder`, where there is one
    until: float = 1.0  # share of training at which it pauses

    @classmethod
    def of(cls, run: RunConfig, folder: Path, resume: bool, until: float = 1.0) -> Job:
        """The job of a run, wherever its workers are started."""
        located = run.model_copy(update={"data": run.data.located()})
        where = folder.relative_to(run.root) if is_url(run.storage) else folder.resolve()
        return cls(located.model_dump_json(), str(where), resume, until)

    @property
    def path(self) -> Path:
        """The folder for checkpoints on this machine."""
        return RunConfig.model_validate_json(self.run).root / self.folder


def local_rows(
    job: Job, context: DistributedContext, on_step: OnStep = lambda done: None
) -> Iterator[EpochMetrics]:
    """The rows of a job that this process trains alone.

    Raises:
        RequestError, TrainingFailed: whatever its parts raise becomes one of these, unless the
            process itself is no longer fit for work.
    """
    try:
        yield from job_rows(job, context, job.resume, on_step)
    except Exception as error:
        if is_lost(error):
            raise
        raise as_failure(error) from error


def job_rows(
    job: Job,
    context: DistributedContext,
    resume: bool,
    on_step: OnStep = lambda done: None,
) -> Iterator[EpochMetrics]:
    """The rows of a job on this worker, from its last checkpoint if `resume` and there is one."""
    from raytrain.training.trainer import fit_and_checkpoint

    folder = job.path
    if resume:
        pull(folder)
        if context.leads:
            # What a process before this one has written here, and could not copy any more.
            push(folder)
    saved = load(folder / LAST) if resume and (folder / LAST).is_file() else None
    recent = RecentRows(folder, resume)
    if saved is not None and recent.reached(saved.epoch, job.until):
        return
    note = recent.add if context.leads else None
    run = RunConfig.model_validate_json(job.run)
    for report in fit_and_checkpoint(run, context, folder, saved, note, on_step):
        yield report
        if report.progress >= job.until:
            return  # not one epoch further: a paused trial keeps its checkpoint as it is


class RecentRows:
    """The last rows of a job, in a file beside its checkpoints and written before them.

    A driver, or a worker, may die before the driver received rows that precede the last checkpoint: up
    to two, since a group runs ahead. On resume, and after a restart of the group, they are replayed
    from here. The copy of a sweep's rows in a storage is older than these by some seconds.
    """

    _MOST = 16

    def __init__(self, folder: Path, resume: bool = True) -> None:
        self._file = folder / ROWS
        self.rows: list[EpochMetrics] = []
        if resume:
            pull(self._file)
            self.rows = recent_rows(folder)

    def between(self, epoch: int, other: int | None = None) -> list[EpochMetrics]:
        """The rows of the epochs after one and, if given, before another."""
        end = math.inf if other is None else other
        return [row for row in self.rows if epoch < row.epoch < end]

    def reached(self, epoch: int, until: float) -> bool:
        """Whether a job that pauses at `until` was to do so after `epoch`."""
        return until < 1 and any(r.epoch == epoch and r.progress >= until for r in self.rows)

    def add(self, report: EpochMetrics) -> None:
        """Keep a row; rows of this epoch and later ones are dropped, since they are trained again."""
        before = [row for row in self.rows if row.epoch < report.epoch]
        self.rows = [*before, report][-self._MOST :]
        with later():
            write_atomically(self._file, json.dumps([asdict(row) for row in self.rows]))
