"""A sweep as its study and its folder have it, for other processes than its driver; nothing is written.

Imports neither torch nor Ray, which take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial
from pydantic import ConfigDict, ValidationError

from raytrain.config.names import EXPERIMENT
from raytrain.core.errors import RequestError
from raytrain.core.spec import Spec
from raytrain.training.run_folder import SPACE
from raytrain.tuning.budget import BudgetState, Running, SweepProgress
from raytrain.tuning.history import History, current_params
from raytrain.tuning.launch import Launch
from raytrain.tuning.space.settings import Budget, Objective, Objectives, Search
from raytrain.tuning.study import stored_study


class StoredSpace(Spec):
    """What `space.yaml` says without the base run, which takes the algorithms to be read."""

    model_config = ConfigDict(extra="ignore")

    base: dict[str, Any] = {}
    objective: Objectives = (Objective(),)
    search: Search = Search()
    budget: Budget = Budget()
    study: str | None = None

    @classmethod
    def read(cls, folder: Path) -> StoredSpace:
        """The space of the sweep in a folder.

        Raises:
            RequestError: naming the file.
        """
        file = folder / SPACE
        try:
            return cls.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (OSError, ValidationError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise RequestError(f"{file}: not the search space of a sweep ({reason})") from None

    @property
    def experiment(self) -> str:
        """The name of the MLflow experiment."""
        return str(self.base.get("experiment", EXPERIMENT))

    @property
    def tracking_uri(self) -> str | None:
        """The store that the file names."""
        return self.base.get("tracking_uri")

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as they are."""
        return dict(params)


class _StoredHistory(History):
    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """As the driver has written them, in the units of the run; else raw parameters."""
        values = trial.user_attrs.get("values")
        return current_params(trial) if values is None else values


@dataclass(frozen=True)
class StoredSweep:
    """A sweep that some driver works on, or has worked on."""

    folder: Path
    space: StoredSpace
    study: optuna.Study | None  # None: not made yet

    @classmethod
    def open(cls, folder: Path) -> StoredSweep:
        """The sweep in a folder.

        Raises:
            RequestError: naming its file, or the database of its study.
        """
        space = StoredSpace.read(folder)
        return cls(folder, space, stored_study(folder.name, folder, space.study))

    @cached_property
    def history(self) -> History | None:
        """Its trials; None before there is a study."""
        return None if self.study is None else _StoredHistory(self.study, self.space)

    @cached_property
    def launch(self) -> Launch | None:
        """What its last driver has recorded of itself."""
        return None if self.study is None else Launch.of(self.study)

    @property
    def host(self) -> str | None:
        """The machine of its last driver."""
        return None if self.launch is None else self.launch.host

    def launched_at(self) -> list[float]:
        """When its last driver last recorded that it works, and when it ended, in seconds since 1970."""
        times = () if self.launch is None else (self.launch.latest, self.launch.ended)
        return [when for when in times if when is not None]

    def progress(self, lasts: bool) -> SweepProgress:
        """As the driver's display has it; of the time that is left only if the launch `lasts`."""
        state = BudgetState(self.space.budget, self.space.objective[0].sign)
        if self.history is None:
            return state.progress((), 0.0, 0.0)
        queued = self.history.count(state, _cost)
        launch = self.launch
        if launch is not None:
            until = time.time() if launch.ended is None else launch.ended
            state.launched_elsewhere(until - launch.began, launch.used)
        under_way = self.history.under_way()
        last = [t.user_attrs.get("last", {}) for t in (*under_way, *queued)]
        progress = state.progress(
            tuple(map(self._running, under_way)),
            sum(map(_cost, last)),
            sum(one.get("progress", 0.0) for one in last),
        )
        if launch is None:
            progress = replace(progress, seconds=None)
        return progress if lasts and launch else replace(progress, seconds_left=None)

    def rows_at(self) -> list[float]:
        """When the last row of each trial was recorded, in seconds since 1970."""
        trials = [] if self.history is None else self.history.trials()
        times = (trial.user_attrs.get("last", {}).get("time") for trial in trials)
        return [when for when in times if when is not None]

    def seconds_per_epoch(self) -> float:
        """Training of the slowest trial, per epoch."""
        trials = [] if self.history is None else self.history.trials()
        last = [trial.user_attrs["last"] for trial in trials if "last" in trial.user_attrs]
        each = (one["metrics"].get("cost/seconds", 0.0) / max(1, one["epoch"]) for one in last)
        return max(each, default=0.0)

    def _running(self, trial: FrozenTrial) -> Running:
        assert self.history is not None
        row, last = self.history.row(trial), trial.user_attrs.get("last", {})
        rate = row.metrics.get("cost/images_per_second")
        share = last.get("progress", 0.0)
        return Running(row.number, row.epochs + 1, share, row.value, row.params, rate)


def _cost(last: Mapping[str, Any]) -> float:
    """Of a trial with this last row; an older version has recorded it per image of each epoch only."""
    of_epochs = last.get("metrics", {}).get("cost/fe_per_sample", 0.0) * last.get("epoch", 0)
    return last.get("fe_per_image", of_epochs)
