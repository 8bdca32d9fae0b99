"""The objective of trials against their own cost, and the cost at which most of them can be compared."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.trial_rows import RowLog


@dataclass(frozen=True)
class CostCurve:
    """A metric by what a run had cost, FE per training image: rising costs, at least one."""

    costs: tuple[float, ...]
    values: tuple[float, ...]

    def reaches(self, cost: float) -> bool:
        """Whether the metric is known at this cost."""
        return self.costs[0] <= cost <= self.costs[-1]

    def at(self, cost: float) -> float:
        """The metric at a cost that it reaches, interpolated between two rows."""
        return float(np.interp(cost, self.costs, self.values))


def read_curves(log: RowLog, fidelity: Fidelity, metric: str) -> dict[int, CostCurve]:
    """The curve of every trial that has finite values, by its number; each cost once."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    for row in log.rows():
        value = row.get(metric)
        if value is None or not math.isfinite(value):
            continue
        costs, values = found.setdefault(row["trial"], ([], []))
        cost = fidelity.fe_per_image({"cost/fe": row.get("cost/fe", 0.0)})
        if not costs or cost > costs[-1]:
            costs.append(cost)
            values.append(value)
    return {trial: CostCurve(tuple(c), tuple(v)) for trial, (c, v) in found.items()}


def common_cost(curves: Collection[CostCurve]) -> float | None:
    """The cost that most curves reach, the highest of several; None without curves."""
    if not curves:
        return None
    starts = np.sort([curve.costs[0] for curve in curves])
    ends = np.sort([curve.costs[-1] for curve in curves])
    begun = np.searchsorted(starts, ends, side="right")
    over = np.searchsorted(ends, ends, side="left")
    counts = begun - over  # curves that reach each end
    return float(ends[counts == counts.max()].max())
