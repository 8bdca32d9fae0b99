"""Run the jobs of a trial manager by Ray Tune."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raytrain.config.run import RunConfig
from raytrain.core.signals import raise_if_interrupted
from raytrain.distributed.ray_session import room_for_trials, worker_resources
from raytrain.distributed.trial_steps import TrialStepsReader
from raytrain.training.progress import SECONDS_BETWEEN_STEPS, RateLimit
from raytrain.tuning.trainable import GroupTrainable, SingleTrainable
from raytrain.tuning.trial_manager import TrialManager

_ROOM_SECONDS = 1.0  # at least, between two looks at the size of the cluster


def execute(manager: TrialManager, slot: Any, concurrent: int | None) -> None:
    """Run the trial manager's jobs until there are none: `concurrent` at a time, or as many as the cluster
    has room for, which may change, and one that waits for more.

    Tune is started afresh at every launch; all state is the trial manager's.
    """
    notes, name = manager.folder / "ray", f"launch-{time.time_ns():x}"
    steps = TrialStepsReader(name)
    try:
        ray_tune.Tuner(
            slot,
            tune_config=ray_tune.TuneConfig(
                num_samples=-1,
                metric="epoch",
                mode="max",
                search_alg=_Search(manager, name),
                scheduler=_Pruning(manager),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                name=name,
                storage_path=str(notes),
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=0),
                callbacks=[_WithinEpochs(manager, steps)],
            ),
        ).fit()
    finally:
        steps.close()
        shutil.rmtree(notes, ignore_errors=True)  # Tune's notes: never read again


def trainable_for(base: RunConfig) -> Any:
    """The Trainable that trials of this size run in, with what it needs of the cluster."""
    if base.workers == 1:
        needs = {name: need for name, need in worker_resources(base).items() if need}
        return ray_tune.with_resources(SingleTrainable, ray_tune.PlacementGroupFactory([needs]))
    # The workers are Ray Train's; the slot only passes rows on, and must not take their place.
    return ray_tune.with_resources(
        GroupTrainable, ray_tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    )


class _Search(Searcher):
    """Tune's searcher interface over the trial manager."""

    def __init__(self, manager: TrialManager, steps: str) -> None:
        super().__init__(metric="epoch", mode="max")
        self._manager, self._steps = manager, steps
        base = manager.space.base_run
        self._room = None if base.workers == 1 else _GroupRoom(base)

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        del metric, mode, config, spec
        return True

    def suggest(self, trial_id: str) -> Any:
        raise_if_interrupted()
        if self._room is not None and self._manager.running >= self._room():
            return None
        try:
            job = self._manager.begin(trial_id)
        except StopIteration:
            return Searcher.FINISHED
        return None if job is None else {**job, "steps": self._steps}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._manager.end(trial_id, result, lost=error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # the study is the state

    def restore(self, checkpoint_path: str) -> None:
        del checkpoint_path

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher; the trial manager holds files and threads


class _GroupRoom:
    """How many trials of several workers may be under way: those that fit, and one that waits for more.

    Tune does not see that they need room, since a slot takes none itself.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run, self._due, self._most = run, RateLimit(_ROOM_SECONDS), 1

    def __call__(self) -> int:
        if self._due():
            self._most = room_for_trials(self._run) + 1
        return self._most


class _WithinEpochs(ray_tune.Callback):
    """Passes on how far trials are within their epochs; Tune's loop calls it ten times a second."""

    def __init__(self, manager: TrialManager, steps: TrialStepsReader) -> None:
        self._manager, self._steps = manager, steps
        self._due = RateLimit(SECONDS_BETWEEN_STEPS)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        del iteration, trials, info
        if self._due():
            self._manager.within_epochs(self._steps.read())

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Pruning(FIFOScheduler):
    """Early stopping by Optuna's pruner, whose state is in the study and survives a restart."""

    def __init__(self, manager: TrialManager) -> None:
        super().__init__()
        self._manager = manager

    @property
    def metric(self) -> str:
        return "epoch"

    def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
        del metric, mode, spec
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        del tune_controller
        raise_if_interrupted()
        stop = self._manager.row(trial.trial_id, dict(result))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = trial.get_error()
        self._manager.note_loss(trial.trial_id, "it died" if error is None else str(error))

    def __getstate__(self) -> dict[str, Any]:
        return {}
