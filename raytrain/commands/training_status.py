"""How a training is doing: its folder and its outbox, read by another process than its driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from raytrain.commands.observed import ObservedStatus, Place, Signs, State, next_steps, store_of
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.core.storage import changed_at, shown
from raytrain.tracking.outbox_look import OutboxView, outboxes
from raytrain.training.run_folder import (
    LAST,
    ROWS,
    RUN_FILE,
    RUN_ID,
    recent_rows,
    resume_run,
    run_id_of,
    short_id,
)

_OUTBOXES = ".mlflow"  # in the folder of an experiment


@dataclass(frozen=True, repr=False)
class TrainingStatus(ObservedStatus):
    """A training at a moment."""

    kind: ClassVar[str] = "training"

    run_id: str | None
    epoch: int  # epochs done
    epochs: int | None  # of how many; None where training is measured by its cost
    fe_per_image: float | None  # then: forward-equivalents per image in all
    share: float  # of training that is done, at the last row
    metrics: dict[str, float]  # of the last row
    checkpoint: float | None  # since the last checkpoint

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, its state, and how far it is."""
        done = f"{self.epoch} ({self.share:.0%} of training)"
        return self.name, {"state": self.state, "epochs": done, "folder": shown(self.folder)}


def training_status(where: Place) -> TrainingStatus:
    """The status of the training in a folder.

    Raises:
        RequestError: if its storage does not answer.
    """
    folder = where.folder
    signs = Signs(_outbox_of(run_id_of(folder), folder.parent / _OUTBOXES))
    if not signs.held:
        where.fetch(RUN_FILE, ROWS, RUN_ID)
    run, rows, run_id = _run_of(folder), recent_rows(folder), run_id_of(folder)
    row_at, saved_at = changed_at(folder / ROWS), changed_at(folder / LAST)
    begun_at, outbox = changed_at(folder / RUN_FILE), signs.outbox
    signs.times += [one for one in (row_at, saved_at, begun_at) if one is not None]
    if outbox is not None and (signs.held or not where.is_copy):
        signs.times.append(outbox.changed)
    last = rows[-1] if rows else None
    state = _state(last, signs, where.is_copy)
    name = run.get("run_name") or (folder.name if run_id is None else short_id(run_id))
    experiment = str(run.get("experiment", folder.parent.name))
    uri = store_of(outbox, run.get("tracking_uri"))
    again = resume_run(run_id or str(folder), where.storage, run.get("tracking_uri"))
    by_cost = run.get("fe_per_image")
    return TrainingStatus(
        name=name,
        experiment=experiment,
        folder=folder,
        state=state,
        host=None if outbox is None else outbox.host,
        here=signs.held,
        changed=signs.changed,
        row=signs.since(row_at),
        waiting=None if outbox is None else outbox.waiting,
        outbox=None if outbox is None else outbox.file,
        tracking_uri=uri,
        next=next_steps(
            state,
            folder.name if run_id is None else short_id(run_id),
            where,
            experiment,
            uri,
            {"continue": again} if state == "interrupted" else {},
        ),
        run_id=run_id,
        epoch=0 if last is None else last.epoch,
        epochs=run.get("epochs") if by_cost is None else None,
        fe_per_image=by_cost,
        share=0.0 if last is None else last.progress,
        metrics={} if last is None else last.metrics(),
        checkpoint=signs.since(saved_at),
    )


def _state(last: EpochMetrics | None, signs: Signs, is_copy: bool) -> State:
    if signs.held:
        return "running"
    if last is not None and last.final:
        return "finished"
    # One that ended in order has left no outbox; that of another machine is not seen through a URL.
    is_over = signs.is_dead or (signs.outbox is None and not is_copy)
    is_silent = signs.is_silent(0.0 if last is None else last.seconds / last.epoch)
    return "interrupted" if is_over or is_silent else "running"


def _outbox_of(run_id: str | None, folder: Path) -> OutboxView | None:
    """The outbox that has a run; of several one that is held."""
    found = [one for one in outboxes(folder) if run_id in one.run_ids]
    return max(found, key=lambda one: (bool(one.held), one.changed), default=None)


def _run_of(folder: Path) -> dict[str, Any]:
    """The run file, not validated: for that all algorithms are imported.

    Raises:
        RequestError: naming the file.
    """
    file = folder / RUN_FILE
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not a run file ({str(error).splitlines()[0]})") from None
    if not isinstance(run, dict):
        raise RequestError(f"{file}: not a run file")
    return run
