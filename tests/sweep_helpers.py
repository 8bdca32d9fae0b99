"""A driver of a sweep without Ray and MLflow, and what outlives it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.distributed.jobs import Job
from raytrain.tracking import Status, Tracker
from raytrain.tuning.budget import SweepProgress
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.mlflow_runs import PARENT
from raytrain.tuning.population import PopulationManager
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.study import open_study
from raytrain.tuning.trial_manager import TrialManager

METRIC = "valid/robust"


@dataclass
class Store:
    """What MLflow would hold, also after a driver has died."""

    status: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class FakeTracker(Tracker):
    """A tracker whose store is a record in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def open(
        self,
        handle: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
        note: str | None = None,
    ) -> None:
        del params
        assert note and parent == PARENT and handle not in self.store.status
        self.store.status[handle], self.store.rows[handle] = "RUNNING", []
        self.store.tags[handle], self.store.names[handle] = dict(tags), name

    def known(self, handle: str) -> bool:
        return handle in self.store.status

    def reopen(self, handle: str) -> None:
        assert handle in self.store.status
        self.store.status[handle] = "RUNNING"

    def unfinished(self, parent: str) -> list[str]:
        assert parent == PARENT
        return [handle for handle, status in self.store.status.items() if status == "RUNNING"]

    def last_step(self, handle: str) -> int:
        return max(self.store.rows[handle], default=0)

    def log(self, handle: str, metrics: Mapping[str, float], step: int = 0) -> None:
        del metrics
        self.store.rows[handle].append(step)

    def tag(self, handle: str, tags: Mapping[str, str]) -> None:
        self.store.tags[handle].update(tags)

    def text(self, handle: str, text: str, file: str) -> None:
        assert as_run_text(text) is not None and file == "run.yaml" and handle in self.store.rows

    def inputs(self, handle: str, inputs: Sequence[Mapping[str, str]]) -> None:
        assert [one["context"] for one in inputs] == ["training", "validation"]
        assert handle in self.store.rows

    def close(self, handle: str, status: Status) -> None:
        self.store.status[handle] = status

    def flush(self, seconds: float = 60.0) -> bool:
        del seconds
        return True


def as_run_text(text: str) -> RunConfig:
    import yaml

    return as_run(yaml.safe_load(text))


SPACE: dict[str, Any] = {
    "name": "study",
    "base": {"epochs": 4, "threat": {"norm": "linf", "eps": 0.2}},
    "space": {
        "optimizer.lr": {"float": [0.01, 0.3], "log": True},
        "algorithm.step_size": {"float": [0.1, 0.5], "unit": "eps"},
    },
    "search": {"sampler": "random", "pruner": "none"},
    "budget": {"trials": 4},
}


def space_of(**changes: Any) -> SearchSpace:
    return SearchSpace.model_validate({**SPACE, **changes})


def opened(folder: Path, space: SearchSpace, resume: bool, length: float = 4.0) -> optuna.Study:
    return open_study(folder.name, folder, space, space.hash(), resume, length)


@dataclass
class Launch:
    """One driver over a study in `folder`; another one over the same folder is a relaunch."""

    folder: Path
    store: Store = field(default_factory=Store)
    space: SearchSpace = field(default_factory=space_of)
    seen: list[SweepProgress] = field(default_factory=list)
    length: float = 4.0
    deaths: Callable[[str], None] | None = None  # called before everything that outlives a driver

    def __post_init__(self) -> None:
        resume = (self.folder / "study.log").is_file()
        study = opened(self.folder, self.space, resume, self.length)
        fidelity = Fidelity.of(self.space.base_run, 10)
        tracker = FakeTracker(self.store)
        if self.deaths is not None:
            haunt(study._storage, STORED, self.deaths)
            haunt(tracker, TRACKED, self.deaths)
        kind = PopulationManager if self.space.search.sampler == "pbt" else TrialManager
        self.manager = kind(study, self.space, tracker, self.folder, fidelity, self.seen.append)
        if self.deaths is not None:
            haunt(self.manager.journal, ("add",), self.deaths)

    def again(self, space: SearchSpace | None = None) -> Launch:
        """The next driver, after this one was killed."""
        return Launch(self.folder, self.store, space or self.space)

    def begin(self, tune_id: str) -> Job:
        started = self.manager.begin(tune_id)
        assert started is not None
        return started["job"]

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.manager.study.get_trials(states=states or None)

    def complete(self, tune_id: str, *values: float) -> None:
        """Begin a trial and train it to its end."""
        self.begin(tune_id)
        self.finish(tune_id, *values)

    def finish(self, tune_id: str, *values: float, first: int = 1) -> None:
        last = first + len(values) - 1
        for epoch, value in enumerate(values, start=first):
            if epoch < last:
                assert not self.manager.row(tune_id, row(epoch, value))
        self.manager.end(tune_id, row(last, values[-1], final=True), lost=False)


def row(epoch: int, value: float | None, final: bool = False) -> dict[str, Any]:
    """What a slot hands over after an epoch."""
    metrics = {"cost/fe": 10.0 * epoch, **({} if value is None else {METRIC: value})}
    return {"metrics": json.dumps(metrics), "epoch": epoch, "final": final, "done": final}


def diverged(reason: str) -> dict[str, Any]:
    """What a slot hands over when training diverged."""
    return {"metrics": "{}", "epoch": 0, "final": False, "diverged": reason, "done": True}


def failed(reason: str) -> dict[str, Any]:
    """What a slot hands over when a trial cannot be carried out."""
    return {"metrics": "{}", "epoch": 0, "final": False, "failed": reason, "done": True}


STORED = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_study_user_attr",
    "set_study_system_attr",
)
TRACKED = ("open", "reopen", "log", "tag", "text", "close")


def haunt(target: Any, names: tuple[str, ...], before: Callable[[str], None]) -> None:
    """Call `before` whenever one of these methods is about to be called."""

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name)
            return method(*args, **kwargs)

        return call

    for name in names:
        setattr(target, name, wrapped(name, getattr(target, name)))
