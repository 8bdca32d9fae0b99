"""Which parameters mattered, over configurations rather than over the trials of one study."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.trial import create_trial

from raytrain.report.comparable import ComparableRuns
from raytrain.report.configurations import varied
from raytrain.report.curve_figures import curve_of, over_seeds
from raytrain.report.rows import Row, validation_of
from raytrain.tuning.cost_curves import CostCurve
from raytrain.tuning.importance import (
    EqualCost,
    Importance,
    importances,
    importances_at_equal_cost,
)

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
    rows = [row for row in _counting(comparable) if row.setting.first.state == "finished"]
    cells = [row.valid(last=True) for row in rows]
    return importances(_study([(r, c.value) for r, c in zip(rows, cells, strict=True) if c]))


def equal_cost_of(comparable: ComparableRuns) -> EqualCost | None:
    """The same over configurations that were stopped early too, at the cost that most of them reached."""
    rows = [
        row
        for row in _counting(comparable)
        if row.stopped or row.setting.first.state == "finished"
    ]
    curves = {number: curve for number, row in enumerate(rows) if (curve := _curve(row))}
    study = _study([(rows[number], curve.values[-1]) for number, curve in curves.items()])
    return importances_at_equal_cost(study, dict(enumerate(curves.values())))


def _counting(comparable: ComparableRuns) -> list[Row]:
    rows = [
        row
        for row in comparable.rows
        if row.home and row.trusted and not row.setting.first.imported
    ]
    ways = Counter(validation_of(row.setting.first) for row in rows)
    return [row for row in rows if validation_of(row.setting.first) == ways.most_common(1)[0][0]]


def _curve(row: Row) -> CostCurve | None:
    """Robust validation accuracy of a configuration, mean over seeds, against cost."""
    points = over_seeds([curve_of(run, "valid/robust") for run in row.setting.runs])
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return None
    return CostCurve(tuple(points[:, 0].tolist()), tuple(points[:, 1].tolist()))


def _study(rows: list[tuple[Row, float]]) -> optuna.Study:
    """A study of these configurations, each with its value."""
    settings = [
        {key: value for key, value in params.items() if not key.startswith(_NOT_TRAINING)}
        for params in varied(row.setting for row, _ in rows)
    ]
    keys = dict.fromkeys(key for values in settings for key in values)
    spaces = {key: _space([values[key] for values in settings if key in values]) for key in keys}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for (row, value), values in zip(rows, settings, strict=True):
        params = {key: _fitting(one, spaces[key]) for key, one in values.items()}
        study.add_trial(
            create_trial(
                params=params,
                distributions={key: spaces[key] for key in params},
                value=value,
                user_attrs={"outcome": "stopped" if row.stopped else "complete"},
            )
        )
    return study


def _space(values: list[Any]) -> BaseDistribution:
    """The range of what was tried."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low > _WIDE)


def _fitting(value: Any, space: BaseDistribution) -> Any:
    return str(value) if isinstance(space, CategoricalDistribution) else float(value)
