"""Outcome of a trial, as recorded in the Optuna study for its sampler.

A stopped trial is PRUNED, with the values it had reported; a diverged one is infeasible, not merely
bad, and so is one whose metrics are out of bounds or whose values break a constraint of the space.
Samplers that look at finished trials alone (gp, nsga2, several objectives) are given the worst values
seen together with the violation, or they would propose the same again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.trial import Trial, TrialState

from raytrain.tuning.space.settings import Limit, Objectives

Outcome = Literal["complete", "stopped", "infeasible", "diverged", "rejected", "failed"]

_TRAINED = "trained"  # the constraint that a diverged trial breaks


@dataclass(frozen=True)
class OutcomeRecorder:
    """Record how trials ended in `study`, and their `outcome`."""

    study: optuna.Study
    objectives: Objectives
    limits: Mapping[str, Limit]
    sees_stopped: bool  # whether the sampler looks at PRUNED trials

    def finished(
        self, trial: Trial, metrics: Mapping[str, float], kept: Mapping[str, float]
    ) -> Outcome:
        """It was trained to the end; `kept` are the constraints of the space, all at most 0."""
        broken = self._constrain(trial, metrics, kept)
        outcome: Outcome = "infeasible" if broken else "complete"
        trial.set_user_attr("outcome", outcome)
        self.study.tell(trial, [metrics[one.metric] for one in self.objectives])
        return outcome

    def stopped(
        self, trial: Trial, metrics: Mapping[str, float], kept: Mapping[str, float]
    ) -> Outcome:
        """It was stopped early: its last intermediate value stands for what it had reached."""
        broken = self._constrain(trial, metrics, kept)
        outcome: Outcome = "infeasible" if broken else "stopped"
        trial.set_user_attr("outcome", outcome)
        self.study.tell(trial, state=TrialState.PRUNED)
        return outcome

    def diverged(self, trial: Trial, why: str, kept: Mapping[str, float]) -> Outcome:
        """The configuration could not be trained."""
        self._constrain(trial, {}, kept, trained=False)
        trial.set_user_attr("error", why[:2000])
        return self._tell_worst(trial, "diverged")

    def failed(self, trial: Trial, why: str | None) -> Outcome:
        """It could not be carried out: it counts as a trial, and the sampler learns nothing from it."""
        if why is not None:
            trial.set_user_attr("error", why[:2000])
        trial.set_user_attr("outcome", "failed")
        self.study.tell(trial, state=TrialState.FAIL)
        return "failed"

    def rejected(self, trial: Trial, broken: Mapping[str, float], valid: bool = True) -> Outcome:
        """It breaks a constraint of the space, or makes no valid run: nothing was trained."""
        self._constrain(trial, {}, broken, trained=valid)
        return self._tell_worst(trial, "rejected")

    def _tell_worst(self, trial: Trial, outcome: Outcome) -> Outcome:
        trial.set_user_attr("outcome", outcome)
        if self.sees_stopped:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, self._worst())
        return outcome

    def _constrain(
        self,
        trial: Trial,
        metrics: Mapping[str, float],
        of_space: Mapping[str, float],
        trained: bool = True,
    ) -> bool:
        """Set every constraint, the same set for every trial; True if one of them is broken."""
        broken = amounts(metrics, self.limits, of_space, trained)
        for name, amount in broken.items():
            trial.set_constraint(name, amount)
        return any(amount > 0 for amount in broken.values())

    def _worst(self) -> list[float]:
        """The worst finished value of each objective; 0 where nothing has finished."""
        reported = [
            trial.values
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]
        worst = []
        for place, one in enumerate(self.objectives):
            values = [one.sign * values[place] for values in reported]
            worst.append(one.sign * min(values, default=0.0))
        return worst


def amounts(
    metrics: Mapping[str, float],
    limits: Mapping[str, Limit],
    of_space: Mapping[str, float],
    trained: bool = True,
) -> dict[str, float]:
    """By how much every constraint is broken, in the same order for every trial of a sweep."""
    broken = {name: float(amount) for name, amount in of_space.items()}
    for metric, limit in limits.items():
        value = metrics.get(metric, math.nan)
        broken[metric] = limit.excess(value) if math.isfinite(value) else 0.0
    return {**broken, _TRAINED: -1.0 if trained else 1.0}
