"""How a sweep is doing: its study, its folder and its outbox, read by another process than its driver."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from raytrain.commands.observed import ObservedStatus, Place, Signs, State, next_steps, store_of
from raytrain.core.storage import shown
from raytrain.tracking.outbox_look import look_at
from raytrain.training.run_folder import SPACE, resume_sweep
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.stored_sweep import StoredSweep
from raytrain.tuning.sweep_storage import OUTBOX

_MORE = 20  # trials of a continuation that is proposed


@dataclass(frozen=True, repr=False)
class SweepStatus(ObservedStatus):
    """A sweep at a moment."""

    kind: ClassVar[str] = "sweep"

    progress: SweepProgress  # trials under way are those of the last launch, also after its end
    objectives: list[str]
    directions: list[int]  # 1: larger is better, -1: smaller
    best: TrialRow | None
    front: list[TrialRow]  # of several objectives; else empty
    trials: list[TrialRow]

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, its state, and how many trials ended how."""
        ended = ", ".join(f"{count} {how}" for how, count in self.progress.outcomes.items())
        trials = f"{self.progress.finished} ({ended or 'none ended'})"
        return self.name, {"state": self.state, "trials": trials, "folder": shown(self.folder)}

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        progress = {**asdict(self.progress), "budget": self.progress.budget.model_dump()}
        return {**super().json(), "progress": progress}


def sweep_status(where: Place) -> SweepStatus:
    """The status of the sweep in a folder.

    Raises:
        RequestError: if its storage or its study does not answer.
    """
    folder = where.folder
    signs = Signs(look_at(folder / OUTBOX))
    if not signs.held:  # else the working copy is what is pushed to the storage
        where.fetch(SPACE)
    sweep = StoredSweep.open(folder)
    space, history, rows = sweep.space, sweep.history, sweep.rows_at()
    signs.times += [*rows, *sweep.launched_at()]
    outbox = signs.outbox if signs.held or not where.is_copy else None  # else another machine's
    if outbox is not None:
        signs.times.append(outbox.changed)
    state = _state(sweep, signs)
    progress = sweep.progress(lasts=state == "running")
    uri = store_of(outbox, space.tracking_uri)
    return SweepStatus(
        name=folder.name,
        experiment=space.experiment,
        folder=folder,
        state=state,
        host=socket.gethostname() if signs.held else sweep.host,
        here=signs.held,
        changed=signs.changed,
        row=signs.since(max(rows, default=None)),
        waiting=None if outbox is None else outbox.waiting,
        outbox=None if outbox is None else outbox.file,
        tracking_uri=uri,
        next=next_steps(
            state, folder.name, where, space.experiment, uri, _again(sweep, where, state, progress)
        ),
        progress=progress,
        objectives=[one.metric for one in space.objective],
        directions=[one.sign for one in space.objective],
        best=progress.best,
        front=history.front() if history is not None and len(space.objective) > 1 else [],
        trials=[] if history is None else history.rows(),
    )


def _state(sweep: StoredSweep, signs: Signs) -> State:
    launch = sweep.launch
    if signs.held:
        return "running"
    if launch is not None and launch.how is not None:
        return launch.how
    here = launch is None or launch.host == socket.gethostname()
    is_dead = here and signs.is_dead
    return "interrupted" if is_dead or signs.is_silent(sweep.seconds_per_epoch()) else "running"


def _again(
    sweep: StoredSweep, where: Place, state: State, progress: SweepProgress
) -> dict[str, str]:
    """The command that goes on."""
    again = resume_sweep(where.folder.name, sweep.space.experiment, where.storage)
    if state == "interrupted":
        return {"continue": again}
    if sweep.space.search.sampler in ("grid", "pbt"):  # they have an end of their own
        return {}
    return {"more_trials": f"{again} --trials {progress.finished + _MORE}"}
