"""What happened during training, against what it had cost by then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.plotting.sheet import GREY, cost_axis, legend, sheet, style, swatches
from raytrain.report.comparable import ComparableRuns
from raytrain.report.placement import Place, place_labels, settle
from raytrain.report.rows import Row
from raytrain.report.runs import Trained
from raytrain.report.styles import (
    Look,
    algorithms_of,
    best_first,
    letter_legend,
    looks_of,
    room,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DENSE = 300  # lines: more are drawn as pixels

LEARNING = {
    "valid/robust": "robust accuracy in validation, %",
    "valid/clean": "clean accuracy in validation, %",
}
INSIDE = {
    "train/fosc": "mean FOSC, nats",
    "train/inner_steps": "mean inner steps",
}


def curves_figure(comparable: ComparableRuns, metrics: dict[str, str]) -> Figure | None:
    """A panel for each metric that was measured: means over seeds, with the range of the seeds."""
    rows = [row for row in best_first(comparable) if row.home]
    shown = {m: name for m, name in metrics.items() if any(_has(row, m) for row in rows)}
    if not shown:
        return None
    looks = looks_of(comparable)
    figure = sheet(7.6, 3.7 + room(1 + sum(looks[row.letter].named for row in rows)))
    panels: list[Any] = list(figure.subplots(1, len(shown), squeeze=False).flat)
    ends: list[list[Place]] = []
    for axes, (metric, name) in zip(panels, shown.items(), strict=True):
        style(axes)
        drawn = [
            _draw(axes, row, metric, looks[row.letter], len(rows))
            for row in reversed(rows)  # the best on top
        ]
        ends.append([end for end in drawn if end is not None])
        cost_axis(axes, "cost so far, FE per training image")
        axes.set_ylabel(name)
        if not name.endswith("%"):
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if algorithms := algorithms_of(comparable, looks):
        legend(figure, swatches(algorithms), "", columns=6)
    _legend(figure, rows, looks)
    settle(panels[0])
    for axes, places in zip(panels, ends, strict=True):
        place_labels(axes, places, [line.get_xydata() for line in axes.lines])
    return figure


def _has(row: Row, metric: str) -> bool:
    return any(run.curves.get(metric) for run in row.setting.runs)


def curve_of(run: Trained, metric: str) -> np.ndarray:
    """FE per training image and the metric's value at each epoch that has both, (epochs, 2)."""
    cost, values = run.curves.get("cost/fe", {}), run.curves.get(metric, {})
    both = [(run.per_image(cost[e]), values[e]) for e in sorted(values) if e in cost]
    both = [point for point in both if point[0] is not None]
    return np.array(both, dtype=float).reshape(-1, 2)


def over_seeds(curves: list[np.ndarray]) -> np.ndarray:
    """Cost, mean, smallest and largest where all seeds have a value, (points, 4).

    Points are those of the first curve; the others are interpolated between their own.
    """
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return np.empty((0, 4))
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    slack = 1e-9 + 1e-3 * high
    x = curves[0][:, 0]
    x = x[(x >= low - slack) & (x <= high + slack)]
    if len(x) == 0:
        return np.empty((0, 4))
    values = np.stack([np.interp(x, curve[:, 0], curve[:, 1]) for curve in curves])
    return np.column_stack([x, values.mean(0), values.min(0), values.max(0)])


def _draw(axes: Axes, row: Row, metric: str, look: Look, count: int) -> Place | None:
    """The line of a row; where it ends and its letter, if it is one of the named."""
    points = over_seeds([curve_of(run, metric) for run in row.setting.runs])
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return None
    factor = 100.0 if metric.startswith("valid/") else 1.0
    x, (mean, low, high) = points[:, 0], factor * points[:, 1:].T
    faint = 1.0 if look.named else min(0.6, max(0.06, 25 / count))
    line: Any = look.line
    axes.plot(
        x,
        mean,
        color=look.colour,
        linestyle=line,
        linewidth=1.8 if look.named else 0.8,
        marker=look.marker if len(x) == 1 else None,
        alpha=faint,
        rasterized=count > _DENSE,
        zorder=3 if look.named else 2,
    )
    if not look.named:
        return None
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    return float(x[-1]), float(mean[-1]), row.letter + row.marks


def _legend(figure: Figure, rows: list[Row], looks: dict[str, Look]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=looks[row.letter].colour,
            linestyle=looks[row.letter].line,  # pyright: ignore[reportArgumentType]
            linewidth=1.8,
            label=title_of(row),
        )
        for row in rows
        if looks[row.letter].named
    ]
    if len(handles) < len(rows):
        more = len(rows) - len(handles)
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"{more} others"))
    letter_legend(figure, handles)
