"""Figures of a sweep, for screens and print: PNG and SVG.

Colours are those of Okabe and Ito, told apart by colour-blind readers; outcomes differ in shape too.
Optuna's own figures draw on pyplot's global state, and each lacks what the figure here says it adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.plotting.sheet import (
    MANY,
    SMALL,
    TEXT,
    EndedTrial,
    cost_axis,
    label,
    legend,
    paper,
    save,
    shown,
    some,
)
from raytrain.plotting.sweep_slices import slices
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.history import History
from raytrain.tuning.importance import Importance
from raytrain.tuning.space.settings import Objective
from raytrain.tuning.trial_rows import RowLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _SKY, _RED, _GREY = "#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#8c8c8c"
_LOOKS = {  # outcome -> marker, colour, label
    "complete": ("o", _BLUE, "finished"),
    "stopped": ("v", _SKY, "stopped early"),
    "infeasible": ("s", _ORANGE, "infeasible"),
    "diverged": ("X", _RED, "diverged"),
    "failed": ("P", _GREY, "failed"),
}


def draw(
    history: History, fidelity: Fidelity, folder: Path, weights: list[Importance]
) -> list[Path]:
    """Draw the figures that have data: history, importances, slices, front, curves; return their files.

    Curves are read from the journal beside `folder`. With several objectives, all but the front show the
    first.
    """
    trials = in_order(history, fidelity)
    if not trials:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    objective = history.space.objective[0]
    order = [weight.key for weight in weights]
    curves = _read_curves(RowLog(folder.parent / "rows.jsonl"), fidelity, objective)
    figures = {
        "history": _history(trials, objective),
        "importances": importance_bars([(w.key, w.value, w.trials) for w in weights]),
        "slices": slices(trials, objective, order),
        "front": _front(trials, history),
        "curves": _curves(curves, trials, objective),
    }
    return [
        path
        for name, figure in figures.items()
        if figure is not None
        for path in save(figure, folder / name)
    ]


# -------------------------------------------------------------------- data


def in_order(history: History, fidelity: Fidelity) -> list[EndedTrial]:
    """Return the ended trials in the order of their ends."""
    last = {t.user_attrs["origin"]: t for t in history.trials() if "origin" in t.user_attrs}
    rows = [row for row in history.rows() if row.state in _LOOKS]
    rows.sort(key=lambda row: (str(last[row.number].datetime_complete), row.number))
    spent = np.cumsum([fidelity.fe_per_image(row.metrics) for row in rows])
    return [
        EndedTrial(row, last[row.number], float(so_far))
        for row, so_far in zip(rows, spent, strict=True)
    ]


# -------------------------------------------------------------------- figures


def _history(trials: list[EndedTrial], objective: Objective) -> Figure:
    """Draw each trial at the sweep's cost at its end, and the best finished one so far."""
    figure, axes = paper(6.5, 3.6)
    spent = np.array([trial.spent for trial in trials])
    values = shown(objective.metric, [trial.value for trial in trials])
    states = np.array([trial.row.state for trial in trials])
    dense = len(trials) > 300
    for state, (marker, colour, name) in _LOOKS.items():
        chosen = np.flatnonzero(states == state)
        if len(chosen) == 0:
            continue
        drawn = chosen[some(len(chosen))]
        known = drawn[np.isfinite(values[drawn])]
        look: dict[str, Any] = {"marker": marker, "color": colour, "linewidths": 0}
        look |= {"s": 8 if dense else 26, "alpha": 0.5 if dense else 0.85}
        look |= {"rasterized": len(trials) > MANY, "zorder": 2 if state == "complete" else 1.8}
        axes.scatter(spent[known], values[known], **look, label=f"{name} ({len(chosen)})")
        unknown = np.setdiff1d(drawn, known)  # at the lower edge: they have no value
        edge = axes.get_xaxis_transform()
        axes.scatter(spent[unknown], 0 * spent[unknown], **look, transform=edge, clip_on=False)
    done = (states == "complete") & np.isfinite(values)
    if done.any():
        best = objective.sign * np.maximum.accumulate(objective.sign * values[done])
        x, y = np.append(spent[done], spent[-1]), np.append(best, best[-1])
        axes.step(x, y, where="post", color="black", linewidth=1.6, label="best so far")
    cost_axis(axes, "cost of the sweep, FE per training image")
    axes.set_ylabel(label(objective.metric))
    legend(figure, axes)
    return figure


def importance_bars(weights: Sequence[tuple[str, float, int]]) -> Figure | None:
    """Bars; beyond Optuna's, the number of trials beside each, and bars of runs without a study."""
    if not weights:
        return None
    figure, axes = paper(6.5, 0.7 + 0.28 * len(weights))
    positions = range(len(weights))
    axes.barh(positions, [100 * value for _, value, _ in weights], color=_BLUE, height=0.65)
    axes.set_yticks(positions, [key for key, _, _ in weights])
    axes.invert_yaxis()
    for position, (_, value, count) in zip(positions, weights, strict=True):
        text = f"{100 * value:.0f} %  (n = {count})"
        axes.annotate(
            text,
            (100 * value, position),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
        )
    axes.set_xlim(0, 1.35 * max(100 * value for _, value, _ in weights))
    axes.set_xlabel("importance, % of all parameters' together")
    axes.grid(axis="y", visible=False)
    return figure


def _front(trials: list[EndedTrial], history: History) -> Figure | None:
    """Finished trials in the plane of the first two objectives, those that none beats joined.

    Beyond Optuna's, only measured values: a diverged trial of several objectives has the worst ones.
    """
    objectives = history.space.objective
    done = [trial.row for trial in trials if trial.row.state == "complete"]
    done = [row for row in done if len(row.values) > 1 and np.isfinite(row.values).all()]
    if len(objectives) < 2 or not done:
        return None
    figure, axes = paper(4.8, 3.8)
    values = np.array([row.values for row in done])
    x, y = (shown(objectives[k].metric, values[:, k]) for k in (0, 1))
    drawn = some(len(done))
    look: dict[str, Any] = {"s": 22 if len(done) < 300 else 7, "linewidths": 0}
    look |= {"rasterized": len(done) > MANY, "alpha": 0.8}
    if len(objectives) > 2:
        third = objectives[2].metric
        image = axes.scatter(
            x[drawn], y[drawn], c=shown(third, values[drawn, 2]), cmap="viridis", **look
        )
        bar = figure.colorbar(image, ax=axes)
        bar.set_label(label(third), size=TEXT)
        bar.ax.tick_params(labelsize=SMALL)
    else:
        axes.scatter(x[drawn], y[drawn], color=_GREY, **look, label="finished")
    front = np.array(sorted(row.values for row in history.front()))
    a, b = (shown(objectives[k].metric, front[:, k]) for k in (0, 1))
    joined = {"color": _RED, "marker": "o", "markersize": 5, "markerfacecolor": "none"}
    line = "-" if len(objectives) == 2 else "none"
    axes.plot(a, b, linestyle=line, linewidth=1.4, **joined, label="Pareto front")
    axes.set_xlabel(label(objectives[0].metric))
    axes.set_ylabel(label(objectives[1].metric))
    legend(figure, axes)
    return figure


CostCurve = tuple[list[float], list[float]]  # cost and objective, row by row


def _read_curves(log: RowLog, fidelity: Fidelity, objective: Objective) -> dict[int, CostCurve]:
    """Read every trial's rows, each cost once."""
    curves: dict[int, CostCurve] = {}
    for row in log.rows():
        value = row.get(objective.metric)
        if value is None or not math.isfinite(value):
            continue
        spent, values = curves.setdefault(row["trial"], ([], []))
        cost = fidelity.fe_per_image({"cost/fe": row.get("cost/fe", 0.0)})
        if not spent or cost > spent[-1]:
            spent.append(cost)
            values.append(value)
    return curves


def _curves(
    curves: dict[int, CostCurve], trials: list[EndedTrial], objective: Objective
) -> Figure | None:
    """The objective against a trial's own cost, the best trial's in bold; Optuna's has steps."""
    from matplotlib.collections import LineCollection

    if not curves:
        return None
    figure, axes = paper(6.5, 3.6)
    numbers = sorted(curves)
    lines = [_points(curves[numbers[k]], objective) for k in some(len(numbers))]
    dense = len(lines) > 300
    alpha = min(0.6, max(0.04, 25 / len(lines)))
    many = LineCollection(lines, colors=_GREY, linewidths=0.9, alpha=alpha, label="trials")
    many.set_rasterized(dense)
    axes.add_collection(many)
    ends = np.array([line[-1] for line in lines])
    if not dense:
        axes.scatter(ends[:, 0], ends[:, 1], s=6, color=_GREY, linewidths=0)
    done = [t for t in trials if t.row.state == "complete" and t.row.number in curves]
    if done:
        best = max(done, key=lambda trial: objective.sign * trial.value).row.number
        x, y = _points(curves[best], objective).T
        axes.plot(
            x,
            y,
            color=_BLUE,
            linewidth=2.2,
            marker="o",
            markersize=3.5,
            label=f"best (trial {best})",
        )
    axes.autoscale_view()
    cost_axis(axes, "cost of the trial, FE per training image")
    axes.set_ylabel(label(objective.metric))
    legend(figure, axes)
    return figure


def _points(curve: CostCurve, objective: Objective) -> np.ndarray:
    return np.column_stack([curve[0], shown(objective.metric, curve[1])])
