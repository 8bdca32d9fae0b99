"""One task in this process: train, evaluate on the test set, record. It pauses when the time is over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from raytrain.commands.evaluate import EvalResult, evaluate
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext, keep_freed_memory, local_context
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import Diverged, RequestError
from raytrain.data.catalogue import SOURCES
from raytrain.data.loader import open_source, open_splits
from raytrain.distributed.jobs import Job, local_rows
from raytrain.evaluation.record import FLAGS, EvaluationRecord
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.report.runs import CURVES
from raytrain.tracking.provenance import parameters, tags
from raytrain.training.run_folder import BEST, recent_rows

from .problem import Problem, Task, read_problem
from .records import Record, Records
from .schedule import Schedule

_ROWS = "rows.jsonl"  # every row of a training, so that one that is resumed has all
_CHECKPOINTS = 0.5  # minutes between checkpoints: what a pause costs at most
_COLUMNS = ("index", "label", "predicted")  # of the table of flags that are no flags


class OutOfTime(BaseException):
    """The time is over. Not an Exception, since any of those is a failure of the training."""


@dataclass(frozen=True)
class Clock:
    """When to stop: at a time, or when an event is set."""

    deadline: float  # seconds since 1970
    stop: Event | None = None

    def check(self, *_: object) -> None:
        """Raise OutOfTime if it is time to stop."""
        if time.time() >= self.deadline or (self.stop is not None and self.stop.is_set()):
            raise OutOfTime


@dataclass(frozen=True)
class Workplace:
    """Where and with what tasks are done."""

    problem: str  # as `read_problem` takes it
    records: Path  # of this problem
    folder: Path  # of checkpoints
    data: str | None = None  # where the images are here, if not under the name of the problem
    device: str = "auto"


_stop: Event | None = None  # of this process


def set_up(stop: Event, threads: int) -> None:
    """Prepare a process for tasks; signals are for its parent, which sets `stop`.

    It ends at once where its parent has died: the next run continues from the last checkpoint.
    """
    global _stop
    _stop = stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(task: Task, place: Workplace, deadline: float) -> Record | None:
    """Do a task and record it; None if the time was over before, and it is to be continued.

    Raises:
        RequestError: if the problem does not fit the data.
        TrainingFailed: if it failed for another reason than that training diverged.
    """
    problem = read_problem(place.problem)
    run = Schedule(problem, []).config(task)
    folder = place.folder / problem.name / f"{task.training}-{run.signature()[:8]}"
    clock = Clock(deadline, _stop)
    try:
        record = _done(problem, task, run, folder, place, clock)
    except OutOfTime:
        return None
    Records(place.records).add(record)
    if task.phase == "tune":
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _done(
    problem: Problem, task: Task, run: RunConfig, folder: Path, place: Workplace, clock: Clock
) -> Record:
    here, state, rows, found = _here(run, place), "finished", [], None
    began = int(1000 * time.time())
    try:
        rows = _trained(here, folder, clock)
        if task.evaluation is not None:
            found = _evaluated(folder, problem.evaluations[task.evaluation], here, clock)
    except Diverged as error:  # the method's own; what a machine causes is no result
        state = str(error)
    return _record(task, run, here, state, rows or _rows(folder), began, found)


def check_data(problem: Problem, place: Workplace) -> None:
    """Check that the images have the classes and the size of those that the problem names.

    Raises:
        RequestError: naming `--data`.
    """
    run = problem.trial(next(iter(problem.methods)), 0)
    expected, found = SOURCES.get(run.data.name), open_source(_here(run, place).data)
    if expected is None or place.data is None:
        return
    for what in ("channels", "size"):
        if getattr(expected, what) != getattr(found, what):
            raise RequestError(
                f"--data: expected images of {run.data.name}, {what} {getattr(expected, what)}; found "
                f"{getattr(found, what)} in {place.data}"
            )
    if len(expected.classes) != len(found.classes):
        raise RequestError(
            f"--data: expected the {len(expected.classes)} classes of {run.data.name}, found "
            f"{len(found.classes)} in {place.data}"
        )


def _here(run: RunConfig, place: Workplace) -> RunConfig:
    """The run with what differs from machine to machine."""
    data = run.data if place.data is None else run.data.model_copy(update={"name": place.data})
    changes = {"data": data, "device": place.device, "checkpoint_minutes": _CHECKPOINTS}
    return run.model_copy(update=changes)


def _trained(run: RunConfig, folder: Path, clock: Clock) -> list[EpochMetrics]:
    """Train to the end, from the last checkpoint if there is one; the rows of all epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    clock.check()
    job = Job.of(run, folder, resume=True)
    with (folder / _ROWS).open("a") as file:
        for row in local_rows(job, local_context(run.device), clock.check):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    return _rows(folder)


def _rows(folder: Path) -> list[EpochMetrics]:
    """The rows so far, the latest of each epoch; the last ones are beside the checkpoint too."""
    found = {row.epoch: row for row in recent_rows(folder)}
    if (folder / _ROWS).is_file():
        lines = [json.loads(line) for line in (folder / _ROWS).read_text().splitlines()]
        for row in lines:
            read = EpochMetrics(**{**row, "fosc_below": tuple(row["fosc_below"])})
            found[read.epoch] = read
    return [found[epoch] for epoch in sorted(found)]


def _evaluated(
    folder: Path, settings: EvaluationSettings, run: RunConfig, clock: Clock
) -> EvalResult:
    """Attack the best checkpoint on the test set; what was attacked before a pause is not repeated."""
    fields = {**settings.model_dump(), "device": run.device}
    return evaluate(folder / BEST, fields, watch=clock.check)


def _record(
    task: Task,
    run: RunConfig,
    here: RunConfig,
    state: str,
    rows: Sequence[EpochMetrics],
    began: int,
    found: EvalResult | None,
) -> Record:
    splits = open_splits(here.data, DistributedContext())
    last = rows[-1] if rows else None
    metrics = {} if last is None else last.metrics()
    own = {} if last is None else last.tags()
    fe = metrics.get("cost/fe", 0.0)
    return Record(
        **asdict(task),
        signature=run.signature(),
        state=state,
        began=began,
        epochs=0 if last is None else last.epoch,
        train_images=splits.train.num_images,
        valid_images=splits.valid.num_images,
        fe_per_image=fe / splits.train.num_images,
        seconds=metrics.get("cost/seconds", 0.0),
        valid_clean=metrics.get("valid/clean"),
        valid_robust=metrics.get("valid/robust"),
        metrics=metrics,
        curves=_curves(rows),
        params={path: str(value) for path, value in parameters(run).items()},
        tags={**tags(run), **own},
        **_of_evaluation(found),
    )


def _curves(rows: Sequence[EpochMetrics]) -> dict[str, dict[int, float]]:
    by_epoch = [(row.epoch, row.metrics()) for row in rows]
    return {
        name: {epoch: metrics[name] for epoch, metrics in by_epoch if name in metrics}
        for name in CURVES
    }


def _of_evaluation(found: EvalResult | None) -> dict[str, Any]:
    if found is None:
        return {}
    flags = pq.read_table(found.folder / FLAGS)
    index, label, predicted = (flags[name].to_pylist() for name in _COLUMNS)
    names = [name for name in flags.column_names if name not in _COLUMNS]
    return {
        "evaluation_seconds": found.seconds,
        "result": found.model_dump(mode="json", include=set(EvaluationRecord.model_fields)),
        "image": index,
        "label": label,
        "predicted": predicted,
        "flags": {name: flags[name].to_pylist() for name in names},
    }
