"""The objective against each parameter of a search: one small panel each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raytrain.plotting.sheet import (
    GREY,
    INK,
    MANY,
    SMALL,
    TEXT,
    EndedTrial,
    colours_of,
    label,
    legend,
    sheet,
    short,
    shown,
    some,
    style,
    swatches,
)
from raytrain.tuning.space.labels import ALGORITHM
from raytrain.tuning.space.settings import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 12
ALWAYS = (*ALGORITHM, "optimizer.lr")
"""Parameters that have a panel wherever they were searched."""


def slices(
    trials: list[EndedTrial], objective: Objective, order: list[str], units: Mapping[str, str]
) -> Figure | None:
    """The objective against each parameter, the most important first; stopped trials are hollow.

    Finished ones have the colour of their algorithm, or where all have the same one, of their order.
    Beyond Optuna's, which draws finished trials alone: the stopped ones, and the whole range searched.
    """
    shown_trials = [
        t for t in trials if t.row.state in ("complete", "stopped") and np.isfinite(t.value)
    ]
    dists = {key: dist for trial in shown_trials for key, dist in trial.last.distributions.items()}
    keys = panels(order, [key for key in dists if not dists[key].single()])
    if not keys:
        return None
    columns = min(4, len(keys), 3 if len(keys) in (5, 6, 9) else 4)
    lines = -(-len(keys) // columns)
    figure = sheet(max(5.4, 2.3 * columns), 2.1 * lines + 0.8)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    colours = colours_of(trial.algorithm for trial in shown_trials)
    image = None
    for position, pool in enumerate(grid.flat):
        if position >= len(keys):
            pool.set_visible(False)
            continue
        style(pool)
        key = keys[position]
        image = _slice(pool, shown_trials, key, dists[key], objective, colours) or image
        pool.set_xlabel(_words(key, units), size=SMALL)
        pool.tick_params(labelleft=position % columns == 0)
    figure.supylabel(label(objective.metric), size=TEXT)
    if image is not None and not colours:
        _order_bar(figure, grid, image)
    _legend(figure, shown_trials, colours)
    return figure


def panels(order: Sequence[str], varied: Sequence[str]) -> list[str]:
    """The parameters that have a panel: by importance, then the others; the algorithm and the learning
    rate are always among them.
    """
    always = [key for key in varied if key in ALWAYS]
    others = [key for key in [*always, *sorted(varied)] if key not in order]
    keys = [key for key in [*order, *dict.fromkeys(others)] if key in varied]
    rest = [key for key in keys if key not in always]
    chosen = {*always, *rest[: _PANELS - len(always)]}
    return [key for key in keys if key in chosen]


def _words(key: str, units: Mapping[str, str]) -> str:
    return short(key) + (f", {units[key]}" if key in units else "")


def _legend(figure: Figure, trials: list[EndedTrial], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    stopped = sum(trial.stopped for trial in trials)
    ink = INK if colours else GREY
    look: Any = {"linestyle": "none", "markersize": 4.5, "color": ink}
    name = f"finished ({len(trials) - stopped})" + ("" if colours else ", by their order")
    done = Line2D([], [], marker="o", label=name, **look)
    handles = [done] if len(trials) > stopped else []
    title = "Trials by each searched parameter, the most important first"
    if stopped:
        look["markerfacecolor"] = "none"
        name = f"stopped early, at the value it had by then ({stopped})"
        handles.append(Line2D([], [], marker="v", label=name, **look))
    legend(figure, [*handles, *swatches(colours)], title, columns=6)


def _order_bar(figure: Figure, grid: Any, image: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=30, shrink=0.8)
    bar.set_label("order of ending", size=SMALL)
    bar.locator = MaxNLocator(5, integer=True)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=SMALL)


def _slice(
    axes: Axes,
    trials: list[EndedTrial],
    key: str,
    distribution: BaseDistribution,
    objective: Objective,
    colours: dict[str, str],
) -> Any:
    """Draw one panel; return its points of finished trials."""
    places = [k for k, trial in enumerate(trials) if key in trial.last.params]
    places = [places[k] for k in some(len(places))]
    done = np.array([not trials[k].stopped for k in places])
    y = shown(objective.metric, [trials[k].value for k in places])
    raw = [trials[k].last.params[key] for k in places]
    if isinstance(distribution, CategoricalDistribution):
        x = _beside(raw, distribution, axes)
    else:
        x = np.array(raw, dtype=float)
        _over_the_range(axes, distribution)
    few = len(places) < 300
    look: Any = {"s": 14 if few else 5, "rasterized": len(places) > MANY // 4}
    ink = np.array([colours.get(trials[k].algorithm, GREY) for k in places])
    hollow: Any = {"facecolors": "none", "edgecolors": ink[~done]}
    hollow |= {"marker": "v", "linewidths": 0.7, "alpha": 0.8 if few else 0.4, "zorder": 1.5}
    axes.scatter(x[~done], y[~done], **hollow, **look)
    if not done.any():
        return None
    by_order: Any = {"cmap": "viridis", "vmin": 1, "vmax": max(2, len(trials))}
    by_order |= {"c": 1 + np.array(places)[done]}
    colour: Any = {"c": ink[done]} if colours else by_order
    return axes.scatter(x[done], y[done], **colour, linewidths=0, zorder=2, **look)


def _over_the_range(axes: Axes, distribution: BaseDistribution) -> None:
    """Set the limits of the axis to the searched range and a margin."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if not distribution.log:
        margin = 0.06 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        whole = isinstance(distribution, IntDistribution)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=whole))
        return
    axes.set_xscale("log")
    margin = (high / low) ** 0.06
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_minor_locator(NullLocator())
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ticks = [10.0**k for k in decades][:: 1 + len(decades) // 5]
    if len(ticks) < 2:
        ticks = [low, math.sqrt(low * high), high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _beside(raw: list[Any], distribution: CategoricalDistribution, axes: Axes) -> np.ndarray:
    """Return positions of choices at whole numbers, with a small offset for each point."""
    words = [str(choice) for choice in distribution.choices]
    longest = sum(len(word) + 1 for word in words)
    turned = {"rotation": 30, "ha": "right"} if longest > 22 else {}
    axes.set_xticks(range(len(words)), [short(word, 14) for word in words], **turned)
    axes.set_xlim(-0.6, len(words) - 0.4)
    at = np.array([words.index(str(value)) for value in raw], dtype=float)
    return at + np.random.default_rng(0).uniform(-0.22, 0.22, len(at))
