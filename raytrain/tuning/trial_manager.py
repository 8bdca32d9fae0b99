"""Trials on their way between Optuna, Tune and MLflow; the study holds what was tried and what came of it.

Tune only executes. To resume is to open the study again: what was in flight when the driver died is
queued anew, with its parameters, its checkpoints and its MLflow run. The order of every two writes is
such that a kill between them is put right by `recover`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.distributed.jobs import Job
from raytrain.distributed.trial_steps import Step
from raytrain.tracking import Tracker
from raytrain.training.progress import StepMetrics
from raytrain.training.run_folder import recent_rows, write_run_file
from raytrain.tuning.budget import BudgetState, Running, SweepProgress, TrialRow
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.history import History, Proposes, followed, queued_params
from raytrain.tuning.mlflow_runs import MlflowRuns
from raytrain.tuning.outcome import OutcomeRecorder
from raytrain.tuning.space.settings import sees_stopped
from raytrain.tuning.sweep_storage import ROW_LOG, SweepStorage
from raytrain.tuning.trial_rows import RowLog

_TRIES = 1000  # proposals in a row that may break the constraints of the space
_CARRIED = (
    "origin",
    "last",
    "values",
    "now",
    "scores",
)  # attributes that the next attempt begins with


@dataclass
class Live:
    """A trial under way."""

    trial: Trial
    values: dict[str, Any]  # by path, in the units of the run
    run: RunConfig
    origin: int  # number of its first attempt
    resumes: bool
    epoch: int = 0  # the last one that was recorded
    step: int = 0  # the last fidelity that was reported
    progress: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    cut: bool = False  # by the end of the budget
    share: float = 0.0  # of training, also within the epoch under way; decides nothing
    step_metrics: StepMetrics = field(default_factory=StepMetrics)
    offset: int = 0  # epochs it has trained that its checkpoint does not know of

    @property
    def shown(self) -> float:
        """Share of training that is done, for the display."""
        return max(self.progress, self.share)


class TrialManager:
    """Trials on their way between Optuna, Tune and MLflow. Lives on the driver."""

    def __init__(
        self,
        study: optuna.Study,
        space: Proposes,
        tracker: Tracker,
        folder: Path,
        fidelity: Fidelity,
        watch: Callable[[SweepProgress], None] | None = None,
        prefix: str = "t",
    ) -> None:
        self.study, self.space, self.folder = study, space, folder
        self.history = History(study, space, prefix)
        self.journal, self._storage = RowLog(folder / ROW_LOG), SweepStorage(folder)
        self._mlflow_runs = MlflowRuns(tracker, study.study_name, folder)
        self.fidelity, self._watch = fidelity, watch
        self._live: dict[str, Live] = {}
        self._retries = space.base_run.max_failures
        self._budget_state = BudgetState(space.budget, space.objective[0].sign)
        self._waiting = 0  # trials that are queued in the study
        self._aside: dict[int, dict[str, Any]] = {}  # origin -> last row of those begun and queued
        learns = sees_stopped(space.search, space.objective)
        self._verdicts = OutcomeRecorder(study, space.objective, space.feasible, learns)

    @property
    def running(self) -> int:
        """How many trials are under way."""
        return len(self._live)

    # ---------------------------------------------------------------- calls of Tune

    def begin(self, tune_id: str) -> dict[str, Any] | None:
        """The next job, or None while live trials may still use up the budget.

        Raises:
            StopIteration: if the budget is spent, or there is nothing left to try.
            TrainingFailed: if no proposal satisfies the constraints.
        """
        if self._budget_state.spent(self._live_fe()) or not self._budget_state.room(0):
            raise StopIteration
        if not self._budget_state.room(len(self._under_way())):
            return None
        live = self._propose()
        if live is None and not self._live:
            raise StopIteration
        if live is None:
            return None
        return self._start(tune_id, live)

    def row(self, tune_id: str, result: dict[str, Any]) -> bool:
        """Record a row; True if the trial is to be stopped."""
        live = self._live.get(tune_id)
        if live is None:
            return True
        finite = self._record(live, result)
        if self._budget_state.spent(self._live_fe()):
            live.cut = True
            return True
        return finite and len(self.space.objective) == 1 and live.trial.should_prune()

    def within_epochs(self, steps: Mapping[str, Step]) -> None:
        """How far trials are within their epochs, by Tune's ids; also called where there is no news."""
        for tune_id, (share, loss) in steps.items():
            if (live := self._live.get(tune_id)) is None:
                continue
            live.share = share
            if (metrics := live.step_metrics(share, loss)) is not None:
                # Its step is an epoch that is recorded: rows of later ones are still to come.
                self._mlflow_runs.note(self._handle(live), metrics, live.epoch)
        self._tell_watch()

    def note_loss(self, tune_id: str, reason: str) -> None:
        """Record why a trial's process died, before its `end`."""
        if (live := self._live.get(tune_id)) is not None:
            said = [line.strip() for line in reason.splitlines() if line.strip()]
            live.trial.set_user_attr("error", (said or ["its process died"])[-1][:2000])

    def end(self, tune_id: str, result: dict[str, Any] | None, lost: bool) -> None:
        """A trial has ended: it finished, was stopped, failed, or its process died (`lost`)."""
        live = self._live.pop(tune_id, None)
        if live is None:
            return
        if lost:
            self._lost(live)
        elif result is None or "failed" in result:
            self._failed(live, str((result or {}).get("failed", "it never reported")))
        elif "diverged" in result:
            self._diverged(live, str(result["diverged"]))
        else:
            self._ended(live, result)
        self._storage.save()
        self._tell_watch()

    # ---------------------------------------------------------------- queries

    def best(self) -> TrialRow | None:
        """The finished, feasible trial that is best in the first objective."""
        return self._budget_state.best

    def progress(self) -> SweepProgress:
        """For the display."""
        running = tuple(
            Running(
                live.origin,
                live.epoch + 1,
                live.shown,
                self._value(live),
                live.values,
                live.metrics.get("cost/images_per_second"),
            )
            for live in self._under_way()
        )
        return self._budget_state.progress(running, self._live_fe(), self._begun_share())

    @property
    def used_before(self) -> float:
        """The share of the budget that earlier launches had used."""
        return self._budget_state.used_before

    # ---------------------------------------------------------------- after a driver has died

    def recover(self) -> int:
        """Count what has ended, queue again what was in flight; returns how many were."""
        trials = self.history.trials()
        again = followed(trials)
        dead = [t for t in trials if t.state == TrialState.RUNNING]
        for trial in dead:
            if trial.number not in again:
                self._requeue(trial, trial.user_attrs.get("retries", 0))
            self.study.tell(trial.number, state=TrialState.FAIL)
        self._fill_rows()
        self._count()
        self._mlflow_runs.reconcile(self.history.rows())
        self._budget_state.launched(self._live_fe(), self._begun_share())
        return len(dead)

    def _fill_rows(self) -> None:
        """Add the rows that a driver took with it, whose machine is lost or whose journal was torn.

        The study has the number of the last one, and the last ones of a trial are beside its checkpoints.
        """
        known = {(row["trial"], row["epoch"]) for row in self.journal.rows()}
        for trial in self.history.attempts():
            origin = trial.user_attrs["origin"]
            if "now" in trial.user_attrs:
                continue  # a member of a population counts the epochs of its checkpoint otherwise
            last, values = trial.user_attrs.get("last", {}), self.history.values(trial)
            for row in recent_rows(self._folder_of(origin)):
                if row.epoch <= last.get("epoch", 0) and (origin, row.epoch) not in known:
                    given = (row.epoch, row.progress, values, row.metrics(), last.get("time"))
                    self.journal.add(origin, trial.number, *given)
                    self._mlflow_runs.fill(self.history.handle(origin), row.metrics(), row.epoch)

    def _count(self) -> None:
        """Restore earlier launches: trials that ended, were lost, or are queued."""
        queued = self.history.count(
            self._budget_state, lambda last: self.fidelity.fe_per_image(last.get("metrics", {}))
        )
        self._waiting = len(queued)
        begun = [trial.user_attrs for trial in queued if "origin" in trial.user_attrs]
        self._aside = {attributes["origin"]: attributes.get("last", {}) for attributes in begun}

    def enqueue(self, params: Mapping[str, Any], **attributes: Any) -> None:
        """Queue a configuration before the sampler's next proposal."""
        self.study.enqueue_trial(dict(params), user_attrs=attributes)
        self._waiting += 1

    # ---------------------------------------------------------------- within: beginning

    def _propose(self) -> Live | None:
        """The next trial; None if there is none, until others end."""
        for _ in range(_TRIES):
            if self.space.search.sampler == "grid" and self._waiting == 0:
                return None
            trial = self.study.ask()
            self._waiting = max(0, self._waiting - 1)
            values = self.space.sample(trial)
            broken = self.space.violations(values)
            if all(amount <= 0 for amount in broken.values()):
                live = self._begun(trial, values)
                if live is not None:
                    return live
                continue
            self._reject(trial, broken)
        raise TrainingFailed(
            f"constraints: {_TRIES} proposals in a row break them; expected a space most of which "
            "satisfies its constraints"
        )

    def _begun(self, trial: Trial, values: dict[str, Any]) -> Live | None:
        """The trial with its MLflow run; None if its values make no valid run."""
        try:
            run = self.space.run(values)
        except RequestError as error:
            trial.set_user_attr("error", str(error)[:2000])
            self._reject(trial, self.space.violations(values), valid=False)
            return None
        attributes = trial.user_attrs
        origin = attributes.get("origin", trial.number)
        live = Live(trial, values, run, origin, resumes="origin" in attributes)
        if "origin" not in attributes:
            trial.set_user_attr("origin", origin)
        trial.set_user_attr("values", values)
        self._mlflow_runs.begin(self._handle(live), run, values)
        if live.resumes:
            self._replay(live, attributes["resume_of"])
        return live

    def _start(self, tune_id: str, live: Live) -> dict[str, Any]:
        self._live[tune_id], live.share = live, 0.0
        self._aside.pop(live.origin, None)
        write_run_file(live.run, self._folder_of(live.origin))
        self._storage.save()
        self._tell_watch()
        return {"job": self._job(live)}

    def _job(self, live: Live) -> Job:
        return Job.of(live.run, self._folder_of(live.origin), resume=live.resumes)

    def _folder_of(self, origin: int) -> Path:
        return self.folder / "trials" / self.history.handle(origin)

    def _replay(self, live: Live, number: int) -> None:
        """Give a resumed trial what its earlier attempt had reported: pruners look at it."""
        for step, value in sorted(self._reported(number).items()):
            live.trial.report(value, step)
            live.step = max(live.step, step)
        if (last := live.trial.user_attrs.get("last")) is not None:
            live.epoch, live.progress = last["epoch"], last["progress"]
            live.metrics = last["metrics"]
            self._report(live)  # its driver may have died just before

    def _reported(self, number: int | None) -> dict[int, float]:
        """What an attempt and those before it reported: it may have died while it was given theirs."""
        trials, reported = self.history.trials(), dict[int, float]()
        while number is not None:
            reported = {**trials[number].intermediate_values, **reported}
            number = trials[number].user_attrs.get("resume_of")
        return reported

    def _reject(self, trial: Trial, broken: Mapping[str, float], valid: bool = True) -> None:
        self._budget_state.outcomes[self._verdicts.rejected(trial, broken, valid)] += 1

    # ---------------------------------------------------------------- within: running

    def _record(self, live: Live, result: dict[str, Any]) -> bool:
        """Log a row once; returns whether it has a finite objective."""
        metrics, epoch = json.loads(result["metrics"]), result["epoch"] + live.offset
        value = metrics.get(self.space.objective[0].metric)
        finite = value is not None and math.isfinite(value)
        if epoch <= live.epoch:
            return finite
        live.epoch, live.metrics, live.progress = epoch, metrics, result.get("progress", 0.0)
        self.journal.add(
            live.origin, live.trial.number, epoch, live.progress, live.values, metrics
        )
        self._storage.save()
        self._mlflow_runs.row(self._handle(live), metrics, epoch)
        if tags := result.get("tags"):
            self._mlflow_runs.tag(self._handle(live), json.loads(tags))
        last = {
            "epoch": epoch,
            "progress": live.progress,
            "metrics": metrics,
            "fe_per_image": self.fidelity.fe_per_image(metrics),
            "time": time.time(),
        }
        live.trial.set_user_attr("last", last)
        self._report(live)
        self._tell_watch()
        return finite

    def _report(self, live: Live) -> None:
        """Tell pruners of the last row, once."""
        value, step = self._value(live), self.fidelity.step(live.metrics, live.epoch)
        if value is not None and len(self.space.objective) == 1 and step > live.step:
            live.step = step
            live.trial.report(value, step)

    def _value(self, live: Live) -> float | None:
        return live.metrics.get(self.space.objective[0].metric)

    def _live_fe(self) -> float:
        """What trials that have begun and not ended have cost, those that are queued again included."""
        rows = [live.metrics for live in self._under_way()]
        rows += [last.get("metrics", {}) for last in self._aside.values()]
        return math.fsum(map(self.fidelity.fe_per_image, rows))

    def _begun_share(self) -> float:
        """How many runs' worth of training they have had."""
        shares = [live.shown for live in self._under_way()]
        shares += [last.get("progress", 0.0) for last in self._aside.values()]
        return math.fsum(shares)

    def _under_way(self) -> list[Live]:
        """All that have begun and not ended."""
        return list(self._live.values())

    # ---------------------------------------------------------------- within: ending

    def _ended(self, live: Live, result: dict[str, Any]) -> None:
        if result["epoch"] > 0:  # a trial resumed after its last epoch has no more rows
            self._record(live, result)
        if live.cut and not result.get("final"):
            self._cut(live)
            return
        missing = [
            one.metric
            for one in self.space.objective
            if not math.isfinite(live.metrics.get(one.metric, math.nan))
        ]
        kept = self.space.violations(live.values)
        if result.get("final") and missing:
            self._diverged(live, f"{missing[0]} was not a number at its last epoch")
        elif result.get("final"):
            self._close(live, self._verdicts.finished(live.trial, live.metrics, kept))
        else:
            self._close(live, self._verdicts.stopped(live.trial, live.metrics, kept))

    def _diverged(self, live: Live, reason: str) -> None:
        """A failure due to the configuration."""
        kept = self.space.violations(live.values)
        self._close(live, self._verdicts.diverged(live.trial, reason, kept), reason)

    def _close(self, live: Live, outcome: str, error: str | None = None) -> None:
        """Count a trial that has ended for good, and end its MLflow run."""
        row = TrialRow(
            number=live.origin,
            state=outcome,
            values=self.history.objectives(live.metrics),
            params=live.values,
            metrics=live.metrics,
            epochs=live.epoch,
            handle=self._handle(live),
        )
        self._budget_state.ended(row, self.fidelity.fe_per_image(live.metrics))
        self._mlflow_runs.end(row.handle, outcome, error)

    def _lost(self, live: Live) -> None:
        """A failure not due to the configuration (a dead process or node): queued again a few times."""
        tries = live.trial.user_attrs.get("retries", 0)
        if tries < self._retries:
            self._budget_state.retries += 1
            self._again(live, "lost", tries + 1)
            return
        self._failed(live, live.trial.user_attrs.get("error"))

    def _failed(self, live: Live, reason: str | None) -> None:
        """Not recorded for the sampler: no information about the objective."""
        outcome = self._verdicts.failed(live.trial, reason)
        self._close(live, outcome, reason)

    def _cut(self, live: Live) -> None:
        """The budget is spent: it continues when the sweep is resumed with a larger one."""
        self._again(live, "cut", live.trial.user_attrs.get("retries", 0))

    def _again(self, live: Live, outcome: str, tries: int) -> None:
        """Queue the next attempt, then end this one: a kill in between leaves both, which `recover` sees."""
        live.trial.set_user_attr("outcome", outcome)
        self._requeue(self.history.trials()[live.trial.number], tries)
        self._aside[live.origin] = live.trial.user_attrs.get("last", {})
        self.study.tell(live.trial, state=TrialState.FAIL)
        self._mlflow_runs.pause(self._handle(live))

    def _requeue(self, trial: FrozenTrial, tries: int) -> None:
        kept = {name: v for name, v in trial.user_attrs.items() if name in _CARRIED}
        self.enqueue(queued_params(trial), **kept, retries=tries, resume_of=trial.number)

    def _handle(self, live: Live) -> str:
        return self.history.handle(live.origin)

    def _tell_watch(self) -> None:
        if self._watch is not None:
            self._watch(self.progress())
