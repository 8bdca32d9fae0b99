"""Which parameters mattered, over configurations rather than over the trials of one study."""

from __future__ import annotations

from collections import Counter
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import create_trial

from raytrain.report.comparable import ComparableRuns
from raytrain.report.configurations import as_values, varied
from raytrain.report.rows import validation_of
from raytrain.tuning.importance import Importance, importances

_NOT_TRAINING = ("data.", "evaluation.", "sentinels.")
_WIDE = (
    20.0  # a positive range whose ends are further apart than this factor is taken as logarithmic
)


def importance_of(comparable: ComparableRuns) -> list[Importance]:
    """PED-ANOVA shares of the parameters in robust validation accuracy; empty if there is too little.

    Only configurations that were trained to their end for the arena's own threat model, failed no check
    and were validated in the way that most were count, each once, by the mean over its seeds at the
    last epoch.
    """
    rows = [
        row
        for row in comparable.rows
        if row.home and row.trusted and row.setting.first.state == "finished"
    ]
    ways = Counter(validation_of(row.setting.first) for row in rows)
    rows = [row for row in rows if validation_of(row.setting.first) == ways.most_common(1)[0][0]]
    keys = [
        key for key in varied(row.setting for row in rows) if not key.startswith(_NOT_TRAINING)
    ]
    settings = [as_values(row.setting.first.params) for row in rows]
    spaces = {key: _space([values[key] for values in settings if key in values]) for key in keys}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for row, values in zip(rows, settings, strict=True):
        cell = row.valid(last=True)
        if cell is None:
            continue
        params = {key: _fitting(values[key], spaces[key]) for key in keys if key in values}
        study.add_trial(
            create_trial(
                params=params,
                distributions={key: spaces[key] for key in params},
                value=cell.value,
                user_attrs={"outcome": "complete"},
            )
        )
    return importances(study)


def _space(values: list[Any]) -> BaseDistribution:
    """The range of what was tried."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low > _WIDE)


def _fitting(value: Any, space: BaseDistribution) -> Any:
    return str(value) if isinstance(space, CategoricalDistribution) else float(value)
