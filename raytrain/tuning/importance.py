"""Importance of each parameter of a search, by Optuna's evaluators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator
from optuna.importance import PedAnovaImportanceEvaluator as PedAnova
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytrain.tuning.cost_curves import CostCurve, common_cost

Method = Literal["ped-anova", "fanova"]

_FEWEST = 4  # trials, and values among them, below which nothing is said


@dataclass(frozen=True)
class Importance:
    """One parameter's share."""

    key: str
    value: float  # the shares of all parameters sum to 1
    trials: int  # trials that had it, of those that count


@dataclass(frozen=True)
class EqualCost:
    """Importances in the values that finished and stopped trials had at one cost."""

    cost: float  # FE per training image
    trials: int  # that had a value there
    importances: list[Importance]


def importances(study: optuna.Study, method: Method = "ped-anova") -> list[Importance]:
    """The shares of all parameters in the first objective, largest first; empty if there are too few trials.

    Only trials that were trained to the end within all constraints count: the values of others are made
    up. A parameter is left out if fewer than four such trials have it, if they have fewer than four
    values of the objective, or if it never varied.

    PED-ANOVA (arXiv 2304.10255, for conditional parameters 2601.20800) measures what it took to be among
    the best (see `best_share`). fANOVA shares out the variance; it has no
    conditions, so a conditional parameter is judged among the trials that have it, together with all that
    these share, and counts by their number.
    """
    done = [
        _with_value(trial, trial.values[0])
        for trial in study.get_trials(deepcopy=False)
        if trial.state == TrialState.COMPLETE
        and trial.user_attrs.get("outcome") == "complete"
        and math.isfinite(trial.values[0])
    ]
    return _shares(done, study.directions[0], method)


def importances_at_equal_cost(
    study: optuna.Study, curves: Mapping[int, CostCurve], method: Method = "ped-anova"
) -> EqualCost | None:
    """The same over finished and stopped trials alike, at the cost that most of them have a value at.

    `curves` are of the first objective, by number of a trial's first attempt. None where no trial was
    stopped.
    """
    trials = {
        trial.user_attrs.get("origin", trial.number): trial
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("outcome") in ("complete", "stopped")
    }
    known = {number: curves[number] for number in trials if number in curves}
    cost = common_cost(known.values())
    if cost is None or all(trials[n].user_attrs["outcome"] == "complete" for n in known):
        return None
    there = {number: curve for number, curve in known.items() if curve.reaches(cost)}
    valued = [_with_value(trials[number], curve.at(cost)) for number, curve in there.items()]
    return EqualCost(cost, len(valued), _shares(valued, study.directions[0], method))


def most_telling(finished: list[Importance], equal: EqualCost | None) -> list[Importance]:
    """Those of the two that are based on more trials."""
    if equal is None or not equal.importances:
        return finished
    most = max((one.trials for one in finished), default=0)
    return equal.importances if equal.trials > most else finished


def _shares(
    done: list[FrozenTrial], direction: optuna.study.StudyDirection, method: Method
) -> list[Importance]:
    having = {key: [t for t in done if key in t.params] for key in _keys(done)}
    having = {key: trials for key, trials in having.items() if _is_informative(key, trials)}
    method_of = _by_ped_anova if method == "ped-anova" else _by_fanova
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few trials, and about what is experimental
        try:
            raw = method_of(done, having, direction)
        except Exception:  # of whatever kind: a degenerate study must not fail a sweep at its end
            return []
    raw = {key: value for key, value in raw.items() if math.isfinite(value)}
    total = sum(raw.values())
    if total <= 0:
        return []
    found = [Importance(key, float(value / total), len(having[key])) for key, value in raw.items()]
    return sorted(found, key=lambda one: (-one.value, one.key))


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    """A finished trial with these parameters and one objective."""
    return create_trial(params=trial.params, distributions=trial.distributions, value=value)


def _keys(trials: list[FrozenTrial]) -> list[str]:
    return sorted({key for trial in trials for key in trial.params})


def _is_informative(key: str, trials: list[FrozenTrial]) -> bool:
    """Whether there are enough trials and values to evaluate a parameter."""
    values = {trial.value for trial in trials}
    return len(values) >= _FEWEST and len({repr(trial.params[key]) for trial in trials}) > 1


def _by_ped_anova(
    done: list[FrozenTrial],
    having: dict[str, list[FrozenTrial]],
    direction: optuna.study.StudyDirection,
) -> dict[str, float]:
    evaluator = PedAnova(target_quantile=best_share(len(done)))
    return _evaluated(evaluator, done, list(having), direction)


def best_share(trials: int) -> float:
    """The share of so many trials that PED-ANOVA takes for the best: a quarter of up to a hundred, a tenth of
    many. A tenth of few trials leaves none that has a conditional parameter.
    """
    return max(0.1, min(0.25, 25 / max(1, trials)))


def _by_fanova(
    done: list[FrozenTrial],
    having: dict[str, list[FrozenTrial]],
    direction: optuna.study.StudyDirection,
) -> dict[str, float]:
    """Parameters of the same trials are evaluated together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key, trials in having.items():
        groups.setdefault(tuple(map(id, trials)), []).append(key)
    found: dict[str, float] = {}
    for members, keys in groups.items():
        trials = having[keys[0]]
        shared = [key for key in having if all(key in trial.params for trial in trials)]
        shares = _evaluated(FanovaImportanceEvaluator(seed=0), trials, shared, direction)
        found |= {key: shares[key] * len(members) / len(done) for key in keys}
    return found


def _evaluated(
    evaluator: BaseImportanceEvaluator,
    trials: list[FrozenTrial],
    keys: list[str],
    direction: optuna.study.StudyDirection,
) -> dict[str, float]:
    """An evaluator's importances of these parameters in a study of these trials alone."""
    if not keys:
        return {}
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return evaluator.evaluate(study, params=keys)
