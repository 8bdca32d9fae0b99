"""Importance of each parameter of a search, by Optuna's evaluators."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator
from optuna.importance import PedAnovaImportanceEvaluator as PedAnova
from optuna.trial import FrozenTrial, TrialState, create_trial

Method = Literal["ped-anova", "fanova"]

_FEWEST = 4  # trials, and values among them, below which nothing is said


@dataclass(frozen=True)
class Importance:
    """One parameter's share."""

    key: str
    value: float  # the shares of all parameters sum to 1
    trials: int  # finished trials that had it


def importances(study: optuna.Study, method: Method = "ped-anova") -> list[Importance]:
    """The shares of all parameters in the first objective, largest first; empty if there are too few trials.

    Only trials that were trained to the end within all constraints count: the values of others are made
    up. A parameter is left out if fewer than four such trials have it, if they have fewer than four
    values of the objective, or if it never varied.

    PED-ANOVA (arXiv 2304.10255, for conditional parameters 2601.20800) tells what it took to be among
    the best tenth. fANOVA shares out the variance; it knows no conditions, so a conditional parameter is
    judged among the trials that have it, together with all that these share, and counts by their number.
    """
    trials = study.get_trials(deepcopy=False)
    done = [_alone(trial) for trial in trials if _counts(trial)]
    having = {key: [t for t in done if key in t.params] for key in _keys(done)}
    having = {key: trials for key, trials in having.items() if _tells(key, trials)}
    direction = study.directions[0]
    tell = _by_ped_anova if method == "ped-anova" else _by_fanova
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few trials, and about what is experimental
        try:
            raw = tell(done, having, direction)
        except Exception:  # of whatever kind: a degenerate study must not fail a sweep at its end
            return []
    raw = {key: value for key, value in raw.items() if math.isfinite(value)}
    total = sum(raw.values())
    if total <= 0:
        return []
    found = [Importance(key, float(value / total), len(having[key])) for key, value in raw.items()]
    return sorted(found, key=lambda one: (-one.value, one.key))


def _counts(trial: FrozenTrial) -> bool:
    done = trial.state == TrialState.COMPLETE and trial.user_attrs.get("outcome") == "complete"
    return done and math.isfinite(trial.values[0])


def _alone(trial: FrozenTrial) -> FrozenTrial:
    """A copy with the first objective alone."""
    return create_trial(
        params=trial.params, distributions=trial.distributions, value=trial.values[0]
    )


def _keys(trials: list[FrozenTrial]) -> list[str]:
    return sorted({key for trial in trials for key in trial.params})


def _tells(key: str, trials: list[FrozenTrial]) -> bool:
    """Whether there are enough trials and values to evaluate a parameter."""
    values = {trial.value for trial in trials}
    return len(values) >= _FEWEST and len({repr(trial.params[key]) for trial in trials}) > 1


def _by_ped_anova(
    done: list[FrozenTrial],
    having: dict[str, list[FrozenTrial]],
    direction: optuna.study.StudyDirection,
) -> dict[str, float]:
    return _evaluated(PedAnova(), done, list(having), direction)


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
