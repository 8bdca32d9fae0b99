"""Early stopping of trials, compared with others at equal cost."""

from __future__ import annotations

import math
from statistics import median

import optuna
from optuna.trial import FrozenTrial, TrialState

from raytrain.tuning.space.settings import Pruner, Search


def pruner_for(kind: Pruner, search: Search, length: float) -> optuna.pruners.BasePruner:
    """The pruner `kind` for runs of `length`: epochs, or forward-equivalents per image."""
    first = first_rung(kind, search, length)
    if kind == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first, reduction_factor=search.reduction
        )
    if kind == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=first,
            max_resource=max(first, round(length)),
            reduction_factor=search.reduction,
        )
    if kind == "median":
        return MedianAtCost(first, search.startup)
    return optuna.pruners.NopPruner()


def first_rung(kind: Pruner, search: Search, length: float) -> int:
    """What a trial costs before it may be stopped.

    By default not early: while a learning rate rises, or an attack, ranks say little. Hyperband hedges
    against that by itself, given a few brackets.
    """
    rungs = 2 if kind == "hyperband" else 1
    return max(1, round(search.first_rung or length / search.reduction**rungs))


class MedianAtCost(optuna.pruners.BasePruner):
    """Stop a trial whose best value so far is below the median of what finished trials had by then.

    Optuna's own median compares trials at equal step numbers. Trials of different algorithms do not
    report at equal costs, so here each counts with its best value at no more than this cost.
    """

    def __init__(self, first: int, startup: int) -> None:
        self._first, self._startup = first, startup

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        cost = trial.last_step
        if cost is None or cost < self._first:
            return False
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = [best for other in finished if (best := _best_by(other, cost, sign)) is not None]
        mine = _best_by(trial, cost, sign)
        return len(others) >= self._startup and mine is not None and mine < median(others)


def _best_by(trial: FrozenTrial, cost: int, sign: int) -> float | None:
    """The best finite value of a trial that had cost no more, larger being better."""
    values = [
        sign * value
        for step, value in trial.intermediate_values.items()
        if step <= cost and math.isfinite(value)
    ]
    return max(values, default=None)
