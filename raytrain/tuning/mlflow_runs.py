"""A sweep in MLflow: a projection of the study, each trial a child run of the sweep's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raytrain.config.run import RunConfig
from raytrain.tracking import Tracker, provenance
from raytrain.tracking.data_sets import training_inputs
from raytrain.training.run_folder import to_yaml
from raytrain.tuning.budget import ENDED, TrialRow
from raytrain.tuning.space.labels import describe

PARENT = "sweep"
"""The handle of the sweep's own MLflow run."""


class MlflowRuns:
    """Queue the trial manager's records; never waits for MLflow."""

    def __init__(self, tracker: Tracker, sweep: str, folder: Path) -> None:
        self._tracker, self._folder = tracker, folder
        # The last trainings of a sweep lie in a folder of it, in a study that is named after both.
        self._sweep = sweep.removesuffix(f"-{folder.name}")
        self._kind: provenance.Kind = "trial" if self._sweep == sweep else "final"
        self._tags: dict[str, dict[str, str]] = {}  # the last ones that epochs gave

    def begin(self, handle: str, run: RunConfig, values: Mapping[str, Any]) -> None:
        """A trial begins, or goes on: its run is opened once, with what varies in its name."""
        if self._tracker.known(handle):
            self._tracker.reopen(handle)
        else:
            self._tracker.open(
                handle,
                f"{handle} {describe(values)}"[:250],
                provenance.parameters(run),
                {
                    **provenance.tags(run, self._kind),
                    "sweep": self._sweep,
                    "trial": handle,
                    "folder": str((self._folder / "trials" / handle).resolve()),
                },
                parent=PARENT,
                note=provenance.note(run),
            )
        # Also of one that goes on: its driver may have died before this.
        self._tracker.text(handle, to_yaml(run), "run.yaml")
        self._tracker.inputs(handle, training_inputs(run.data))

    def row(self, handle: str, metrics: Mapping[str, float], epoch: int) -> None:
        """Log one epoch, if it is not there: a resumed trial may report its last one again."""
        if epoch > self._tracker.last_step(handle):
            self._tracker.log(handle, metrics, epoch)

    def fill(self, handle: str, metrics: Mapping[str, float], epoch: int) -> None:
        """Log an epoch that an earlier driver has recorded, if its run is known and has it not."""
        if self._tracker.known(handle):
            self.row(handle, metrics, epoch)

    def note(self, handle: str, metrics: Mapping[str, float], epoch: int) -> None:
        """More about an epoch that is there."""
        self._tracker.log(handle, metrics, epoch)

    def tag(self, handle: str, tags: dict[str, str]) -> None:
        """Log the tags of an epoch that are not those of the one before."""
        if self._tags.get(handle) != tags:
            self._tracker.tag(handle, tags)
            self._tags[handle] = tags

    def pause(self, handle: str) -> None:
        """A trial stops for now; `begin` goes on with it."""
        self._tracker.close(handle, "KILLED")

    def end(self, handle: str, outcome: str, error: str | None = None) -> None:
        """A trial has ended for good."""
        tags = (
            {"outcome": outcome} if error is None else {"outcome": outcome, "error": error[:5000]}
        )
        self._tracker.tag(handle, tags)
        well = outcome not in ("diverged", "failed")
        self._tracker.close(handle, "FINISHED" if well else "FAILED")

    def reconcile(self, rows: Iterable[TrialRow]) -> None:
        """End the runs that a dead driver left open, with their state in the study."""
        last = {row.handle: row for row in rows}
        for handle in self._tracker.unfinished(PARENT):
            row = last.get(handle)
            if row is None:
                continue
            if row.state not in ENDED:
                self.pause(handle)
                continue
            if row.metrics:  # the last row may have died with the driver
                self.row(handle, row.metrics, row.epochs)
            self.end(handle, row.state, row.error)
