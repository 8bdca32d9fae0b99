"""Figures of a sweep, for screens and print: PNG and SVG.

Colours are those of Okabe and Ito, for colour-blind readers; outcomes differ in shape too, and
what was stopped early is hollow or dashed everywhere. Where a sweep chooses among algorithms, colours are
theirs. Optuna's own figures draw on pyplot's global state, and each lacks what the figure here states it
adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.plotting.importances import importance_bars
from raytrain.plotting.sheet import (
    COLOURS,
    GREY,
    INK,
    MANY,
    SMALL,
    TEXT,
    EndedTrial,
    colours_of,
    cost_axis,
    label,
    legend,
    paper,
    save,
    shown,
    some,
    swatches,
)
from raytrain.plotting.sweep_slices import slices
from raytrain.tuning.cost_curves import CostCurve
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.history import History
from raytrain.tuning.importance import EqualCost, Importance, most_telling
from raytrain.tuning.space.settings import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _ORANGE = COLOURS[0], COLOURS[1], COLOURS[4]
_LOOKS = {  # outcome -> marker, colour where it is not the algorithm's, label
    "complete": ("o", _BLUE, "finished"),
    "stopped": ("v", GREY, "stopped early"),
    "infeasible": ("s", _ORANGE, "infeasible"),
    "diverged": ("X", _RED, "diverged"),
    "failed": ("P", GREY, "failed"),
}


def draw(
    history: History,
    fidelity: Fidelity,
    folder: Path,
    curves: Mapping[int, CostCurve],
    weights: list[Importance],
    equal: EqualCost | None,
    units: Mapping[str, str],
) -> list[Path]:
    """Draw the figures that have data: history, importances, slices, front, curves; return their files.

    `curves` and the importances are of the first objective, as are all figures but the front; `units`
    are those of parameters that have one.
    """
    trials = in_order(history, fidelity)
    if not trials:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    objective = history.space.objective[0]
    order = [weight.key for weight in most_telling(weights, equal)]
    figures = {
        "history": _history(trials, objective),
        "importances": importance_bars(weights, equal, label(objective.metric)),
        "slices": slices(trials, objective, order, units),
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
    figure, axes = paper(6.5, 4)
    spent = np.array([trial.spent for trial in trials])
    values = shown(objective.metric, [trial.value for trial in trials])
    states = np.array([trial.row.state for trial in trials])
    colours = colours_of(trial.algorithm for trial in trials)
    dense = len(trials) > 300
    handles = []
    for state, (marker, colour, name) in _LOOKS.items():
        chosen = np.flatnonzero(states == state)
        if len(chosen) == 0:
            continue
        drawn = chosen[some(len(chosen))]
        known = np.isfinite(values[drawn])
        ink = np.array([colours.get(trials[k].algorithm, colour) for k in drawn])
        look: dict[str, Any] = {"marker": marker, "zorder": 2 if state == "complete" else 1.8}
        look |= {"s": 8 if dense else 26, "alpha": 0.5 if dense else 0.85}
        look |= {"linewidths": 0.5 if dense else 1, "rasterized": len(trials) > MANY}
        for part, height, place in (
            (known, values[drawn], axes.transData),
            # at the lower edge: they have no value
            (~known, np.zeros(len(drawn)), axes.get_xaxis_transform()),
        ):
            faces = "none" if state == "stopped" else ink[part]
            at = {"transform": place, "clip_on": place is axes.transData}
            axes.scatter(
                spent[drawn][part],
                height[part],
                facecolors=faces,  # pyright: ignore[reportArgumentType]
                edgecolors=ink[part],  # pyright: ignore[reportArgumentType]
                **look,
                **at,
            )
        handles.append(
            _mark(
                marker, INK if colours else colour, f"{name} ({len(chosen)})", state == "stopped"
            )
        )
    done = (states == "complete") & np.isfinite(values)
    if done.any():
        best = objective.sign * np.maximum.accumulate(objective.sign * values[done])
        x, y = np.append(spent[done], spent[-1]), np.append(best, best[-1])
        (line,) = axes.step(
            x, y, where="post", color=INK, linewidth=1.6, label="best finished so far"
        )
        handles.append(line)
    cost_axis(axes, "cost of the sweep, FE per training image")
    axes.set_ylabel(label(objective.metric))
    title = "Every trial when it ended" + _stopped_words(trials)
    legend(figure, [*handles, *swatches(colours)], title)
    return figure


def _stopped_words(trials: list[EndedTrial]) -> str:
    hollow = any(trial.stopped for trial in trials)
    return "; hollow: stopped early, at the value it had by then" if hollow else ""


def _mark(marker: str, colour: str, name: str, hollow: bool = False) -> Any:
    """The handle of a marker in a legend."""
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    look: Any = {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 5.5}
    return Line2D([], [], linestyle="none", label=name, **look)


def _front(trials: list[EndedTrial], history: History) -> Figure | None:
    """Finished trials in the plane of the first two objectives, those that none beats joined.

    Beyond Optuna's, only measured values: a diverged trial of several objectives has the worst ones.
    """
    objectives = history.space.objective
    done = [trial for trial in trials if trial.row.state == "complete"]
    done = [t for t in done if len(t.row.values) > 1 and np.isfinite(t.row.values).all()]
    if len(objectives) < 2 or not done:
        return None
    figure, axes = paper(5.4, 4.2)
    values = np.array([trial.row.values for trial in done])
    x, y = (shown(objectives[k].metric, values[:, k]) for k in (0, 1))
    drawn = some(len(done))
    look: dict[str, Any] = {"s": 22 if len(done) < 300 else 7, "linewidths": 0}
    look |= {"rasterized": len(done) > MANY, "alpha": 0.8}
    colours = {} if len(objectives) > 2 else colours_of(trial.algorithm for trial in done)
    if len(objectives) > 2:
        third = objectives[2].metric
        image = axes.scatter(
            x[drawn], y[drawn], c=shown(third, values[drawn, 2]), cmap="viridis", **look
        )
        bar = figure.colorbar(image, ax=axes)
        bar.set_label(label(third), size=TEXT)
        bar.ax.tick_params(labelsize=SMALL)
    else:
        ink = [colours.get(done[k].algorithm, GREY) for k in drawn]
        axes.scatter(x[drawn], y[drawn], c=ink, **look)
    front = np.array(sorted(row.values for row in history.front()))
    a, b = (shown(objectives[k].metric, front[:, k]) for k in (0, 1))
    joined = {"color": INK, "marker": "o", "markersize": 6, "markerfacecolor": "none"}
    style = "-" if len(objectives) == 2 else "none"
    (line,) = axes.plot(a, b, linestyle=style, linewidth=1.2, **joined, label="Pareto front")
    axes.set_xlabel(label(objectives[0].metric))
    axes.set_ylabel(label(objectives[1].metric))
    finished = [] if colours else [_mark("o", GREY, f"finished ({len(done)})")]
    handles = [*finished, line, *swatches(colours)]
    legend(figure, handles, "Finished trials by their objectives", columns=4)
    return figure


def _curves(
    curves: Mapping[int, CostCurve], trials: list[EndedTrial], objective: Objective
) -> Figure | None:
    """The objective against a trial's own cost, the best trial's in bold; Optuna's has steps."""
    ended = [trial for trial in trials if trial.row.number in curves]
    if not ended:
        return None
    figure, axes = paper(6.5, 4)
    colours = colours_of(trial.algorithm for trial in trials)
    stopped, finished = ([t for t in ended if t.stopped is early] for early in (True, False))
    handles = []
    for some_trials, dashed, name in (
        (stopped, True, "stopped early"),
        (finished, False, "others"),
    ):
        if not some_trials:
            continue
        _lines(axes, some_trials, curves, objective, colours, dashed, len(ended))
        name = name if stopped else "trials"
        handles.append(_line(INK if colours else GREY, f"{name} ({len(some_trials)})", dashed))
    done = [trial for trial in ended if trial.row.state == "complete"]
    if done:
        best = max(done, key=lambda trial: objective.sign * trial.value)
        x, y = _points(curves[best.row.number], objective).T
        colour = colours.get(best.algorithm, _BLUE)
        look: Any = {"color": colour, "linewidth": 2.4, "marker": "o", "markersize": 4}
        name = f"best: {best.row.handle} {best.algorithm}".strip()
        handles += axes.plot(x, y, **look, label=name, zorder=3)
    axes.autoscale_view()
    cost_axis(axes, "cost of the trial, FE per training image")
    axes.set_ylabel(label(objective.metric))
    title = "Learning curves against cost" + ("; dashed: stopped early" if stopped else "")
    legend(figure, [*handles, *swatches(colours)], title)
    return figure


def _lines(
    axes: Axes,
    trials: list[EndedTrial],
    curves: Mapping[int, CostCurve],
    objective: Objective,
    colours: Mapping[str, str],
    dashed: bool,
    count: int,
) -> None:
    """The curves of some of `count` trials, and where they end."""
    from matplotlib.collections import LineCollection

    drawn = [trials[k] for k in some(len(trials))]
    lines = [_points(curves[trial.row.number], objective) for trial in drawn]
    ink = [colours.get(trial.algorithm, GREY) for trial in drawn]
    dense, alpha = count > 300, min(0.7, max(0.04, 25 / count))
    style = (0, (4, 2)) if dashed and not dense else "-"
    many = LineCollection(lines, colors=ink, linewidths=0.9, alpha=alpha, linestyles=[style])
    many.set_rasterized(dense)
    axes.add_collection(many)
    if not dense:
        ends = np.array([line[-1] for line in lines])
        face: Any = "none" if dashed else ink
        marker, size = ("v", 14) if dashed else ("o", 8)
        look: Any = {"marker": marker, "s": size, "edgecolors": ink, "linewidths": 0.8}
        axes.scatter(ends[:, 0], ends[:, 1], facecolors=face, **look)


def _line(colour: str, name: str, dashed: bool) -> Any:
    from matplotlib.lines import Line2D

    style: Any = (0, (4, 2)) if dashed else "-"
    return Line2D([], [], color=colour, linewidth=0.9, linestyle=style, label=name)


def _points(curve: CostCurve, objective: Objective) -> np.ndarray:
    return np.column_stack([curve.costs, shown(objective.metric, curve.values)])
