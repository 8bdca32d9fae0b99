"""The Optuna study is the ledger of a sweep: what was tried, what came of it, what is under way.

Tune only executes. To resume is to open the study again: what was in flight when the driver died is
queued anew, with its parameters, its checkpoints and its MLflow run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from raytrain import provenance
from raytrain.checkpoint import leave_run_file, to_yaml
from raytrain.config import RunConfig
from raytrain.sweep.space import SearchSpace
from raytrain.tracking import Tracker
from raytrain.worker import Job

_OVER = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep stands."""

    finished: int  # trials that count towards the budget
    budget: int
    pruned: int  # stopped early or diverged
    failed: int
    best: float | None
    best_trial: int | None


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the table at the end shows it."""

    number: int
    state: str  # complete, stopped, diverged, failed, running
    value: float | None
    params: dict[str, Any]  # in the units of the run
    metrics: dict[str, float]  # of the last epoch
    epochs: int
    run_id: str  # of MLflow, and the name of the checkpoint folder


@dataclass
class _Live:
    trial: Trial
    run: RunConfig
    run_id: str
    epoch: int = 0  # the last one that was recorded
    metrics: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Trials on their way between Optuna, Tune and MLflow. Lives on the driver."""

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        tracker: Tracker,
        parent: str,
        folder: Path,
        watch: Callable[[SweepProgress], None] | None = None,
    ) -> None:
        self.study, self.space, self._tracker = study, space, tracker
        self._parent, self._folder, self._watch = parent, folder, watch
        self._live: dict[str, _Live] = {}
        self._retries = space.base_run.max_failures

    # ---------------------------------------------------------------- what Tune asks

    def begin(self, tune_id: str) -> dict[str, Any] | None:
        """The next job, or None while live trials may still use up the budget.

        Raises:
            StopIteration: if the budget is spent.
        """
        spent = self.spent()
        if spent >= self.space.budget.trials:
            raise StopIteration
        if spent + len(self._live) >= self.space.budget.trials:
            return None
        trial = self.study.ask()
        chosen = self.space.sample(trial)
        run = self.space.run(chosen)
        attributes = trial.user_attrs
        live = _Live(trial, run, attributes.get("run_id") or self._open(trial, run))
        trial.set_user_attr("run_id", live.run_id)
        if "run_id" in attributes:
            live.epoch = self._tracker.reopen(live.run_id)
            self._replay(trial, attributes["resume_of"])
        else:
            self._tracker.text(live.run_id, to_yaml(run), "run.yaml")
        self._live[tune_id] = live
        folder = self._folder / "trials" / live.run_id
        leave_run_file(run, folder)
        return {"job": Job.of(run, folder, resume="resume_of" in attributes)}

    def row(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Record a row; True if the trial is to be stopped early."""
        live = self._live.get(tune_id)
        if live is None:
            return True
        return self._record(live, result) is not None and live.trial.should_prune()

    def end(self, tune_id: str, result: dict[str, Any] | None, lost: bool) -> None:
        """A trial has ended: it finished, was stopped, failed, or its process died (`lost`)."""
        live = self._live.pop(tune_id, None)
        if live is None:
            return
        if lost:
            self._lost(live)
        elif result is None or result.get("failed"):
            self._failed(live, str((result or {}).get("failed", "it never reported")))
        else:
            value = self._record(live, result)
            if result.get("final") and value is None:
                value = self._reported(live)  # resumed after its last epoch
            if result.get("final") and value is not None:
                live.trial.set_user_attr("outcome", "complete")
                self.study.tell(live.trial, value)
            else:
                live.trial.set_user_attr("outcome", "stopped")
                self.study.tell(live.trial, state=TrialState.PRUNED)
            self._tracker.tag(live.run_id, {"outcome": live.trial.user_attrs["outcome"]})
            self._tracker.close(live.run_id, "FINISHED")
        self._tell_watch()

    # ---------------------------------------------------------------- what others read

    def spent(self) -> int:
        """Trials that count: finished, stopped early, diverged, or given up."""
        return sum(
            t.state in _OVER or bool(t.user_attrs.get("given_up"))
            for t in self.study.get_trials(deepcopy=False)
        )

    def rows(self) -> list[TrialRow]:
        """Every trial that began, retries under the number of the last attempt."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {t.user_attrs.get("resume_of") for t in trials}
        return [
            self._row(t)
            for t in trials
            if "run_id" in t.user_attrs
            and t.state != TrialState.WAITING
            and t.number not in retried
        ]

    def run_of(self, number: int) -> RunConfig:
        """The configuration of a trial."""
        return self.space.run(self.study.get_trials(deepcopy=False)[number].params)

    def best(self) -> TrialRow | None:
        """The best trial that was trained to the end."""
        done = [row for row in self.rows() if row.state == "complete" and row.value is not None]
        sign = 1 if self.space.objective.mode == "max" else -1
        return max(done, key=lambda row: sign * (row.value or 0.0), default=None)

    def progress(self) -> SweepProgress:
        """For the display."""
        trials, best = self.study.get_trials(deepcopy=False), self.best()
        return SweepProgress(
            finished=self.spent(),
            budget=self.space.budget.trials,
            pruned=sum(t.state == TrialState.PRUNED for t in trials),
            failed=sum(bool(t.user_attrs.get("given_up")) for t in trials),
            best=None if best is None else best.value,
            best_trial=None if best is None else best.number,
        )

    def recover(self) -> int:
        """Queue again what was in flight when an earlier driver stopped; returns how many."""
        dead = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in dead:
            self.study.tell(trial.number, state=TrialState.FAIL)
            if "run_id" in trial.user_attrs:
                self._enqueue(trial.params, trial.user_attrs, trial.number, 0)
        self._reconcile()
        return len(dead)

    # ---------------------------------------------------------------- within

    def _reconcile(self) -> None:
        """End the MLflow runs that a dead driver left RUNNING, as the study says they ended."""
        known = {t.user_attrs.get("run_id"): t for t in self.study.get_trials(deepcopy=False)}
        for run_id in self._tracker.unfinished(self._parent):
            trial = known.get(run_id)
            if trial is None or trial.state not in _OVER:
                self._tracker.close(run_id, "KILLED")  # reopened if it is queued again
                continue
            attributes = trial.user_attrs
            if "metrics" in attributes:  # the last row may have died with the driver
                self._tracker.log(run_id, attributes["metrics"], attributes["epochs"])
            self._tracker.tag(run_id, {"outcome": attributes["outcome"]})
            diverged = attributes["outcome"] == "diverged"
            self._tracker.close(run_id, "FAILED" if diverged else "FINISHED")

    def _open(self, trial: Trial, run: RunConfig) -> str:
        """A child run in MLflow; what varies is in its name and its parameters."""
        varied = {path.rsplit(".", 1)[-1]: value for path, value in trial.params.items()}
        words = " ".join(
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in varied.items()
        )
        return self._tracker.open(
            f"t{trial.number:03d} {words}"[:250],
            provenance.parameters(run),
            {**provenance.tags(run), "sweep": self.study.study_name, "trial": str(trial.number)},
            parent=self._parent,
        )

    def _record(self, live: _Live, result: dict[str, Any]) -> float | None:
        """Log a row once; returns the objective if this epoch has one."""
        metrics, epoch = json.loads(result["metrics"]), result["epoch"]
        value = metrics.get(self.space.objective.metric)
        live.metrics = metrics
        if epoch > live.epoch:
            live.epoch = epoch
            self._tracker.log(live.run_id, metrics, epoch)
            live.trial.set_user_attr("metrics", metrics)
            live.trial.set_user_attr("epochs", epoch)
            if value is not None:
                live.trial.report(value, epoch)
            self._tell_watch()
        return None if value is None or not math.isfinite(value) else value

    def _reported(self, live: _Live) -> float | None:
        """The last objective that the trial reported."""
        trial = self.study.get_trials(deepcopy=False)[live.trial.number]
        values = trial.intermediate_values
        return values[max(values)] if values else None

    def _replay(self, trial: Trial, number: int) -> None:
        """Give a resumed trial the intermediate values of its first attempt: pruners look at them."""
        before = self.study.get_trials(deepcopy=False)[number]
        for name in ("metrics", "epochs"):
            if name in before.user_attrs:
                trial.set_user_attr(name, before.user_attrs[name])
        for step, value in before.intermediate_values.items():
            trial.report(value, step)

    def _failed(self, live: _Live, reason: str) -> None:
        """The configuration's own fault (divergence): PRUNED, so that TPE learns to stay away."""
        live.trial.set_user_attr("outcome", "diverged")
        live.trial.set_user_attr("error", reason)
        self.study.tell(live.trial, state=TrialState.PRUNED)
        self._tracker.tag(live.run_id, {"outcome": "diverged", "error": reason[:5000]})
        self._tracker.close(live.run_id, "FAILED")

    def _lost(self, live: _Live) -> None:
        """Not the configuration's fault (a dead process or node): FAIL, and queued again a few times."""
        attributes = dict(live.trial.user_attrs)
        tries = attributes.get("retries", 0)
        number = live.trial.number
        if tries >= self._retries:
            live.trial.set_user_attr("given_up", True)
            live.trial.set_user_attr("outcome", "failed")
            self._tracker.tag(live.run_id, {"outcome": "failed"})
        self.study.tell(live.trial, state=TrialState.FAIL)
        self._tracker.close(live.run_id, "FAILED")
        if tries < self._retries:
            self._enqueue(live.trial.params, attributes, number, tries + 1)

    def _enqueue(
        self, params: dict[str, Any], attributes: dict[str, Any], number: int, tries: int
    ) -> None:
        self.study.enqueue_trial(
            params,
            user_attrs={"run_id": attributes["run_id"], "resume_of": number, "retries": tries},
        )

    def _row(self, trial: FrozenTrial) -> TrialRow:
        attributes = trial.user_attrs
        value = trial.value
        if value is None and trial.intermediate_values:
            value = trial.intermediate_values[max(trial.intermediate_values)]
        return TrialRow(
            number=trial.number,
            state=attributes.get("outcome", "running"),
            value=value,
            params=self.space.in_pixels(trial.params),
            metrics=attributes.get("metrics", {}),
            epochs=attributes.get("epochs", 0),
            run_id=attributes["run_id"],
        )

    def _tell_watch(self) -> None:
        if self._watch is not None:
            self._watch(self.progress())
