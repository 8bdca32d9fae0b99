"""The objective against each parameter of a search: one small panel each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raytrain.plotting.sheet import (
    MANY,
    SMALL,
    TEXT,
    EndedTrial,
    label,
    sheet,
    short,
    shown,
    some,
    style,
)
from raytrain.tuning.space.settings import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 12


def slices(trials: list[EndedTrial], objective: Objective, order: list[str]) -> Figure | None:
    """The objective against each parameter: finished trials by their order, stopped ones pale.

    Beyond Optuna's, which draws finished trials alone: the stopped ones, and the whole range searched.
    """
    from matplotlib.ticker import MaxNLocator

    shown_trials = [
        t for t in trials if t.row.state in ("complete", "stopped") and np.isfinite(t.value)
    ]
    dists = {key: dist for trial in shown_trials for key, dist in trial.last.distributions.items()}
    varied = [key for key in dists if not dists[key].single()]
    keys = ([key for key in order if key in varied] + sorted(set(varied) - set(order)))[:_PANELS]
    if not keys:
        return None
    columns = min(4, len(keys), 3 if len(keys) in (5, 6, 9) else 4)
    lines = -(-len(keys) // columns)
    figure = sheet(max(3.2, 2.3 * columns), 2.1 * lines + 0.3)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    image = None
    for position, pool in enumerate(grid.flat):
        if position >= len(keys):
            pool.set_visible(False)
            continue
        style(pool)
        image = (
            _slice(pool, shown_trials, keys[position], dists[keys[position]], objective) or image
        )
        pool.tick_params(labelleft=position % columns == 0)
    figure.supylabel(label(objective.metric), size=TEXT)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=30, shrink=0.8)
        bar.set_label("order of ending", size=SMALL)
        bar.locator = MaxNLocator(5, integer=True)
        bar.update_ticks()
        bar.ax.tick_params(labelsize=SMALL)
    return figure


def _slice(
    axes: Axes,
    trials: list[EndedTrial],
    key: str,
    distribution: BaseDistribution,
    objective: Objective,
) -> Any:
    """Draw one panel; return its coloured points."""
    places = [k for k, trial in enumerate(trials) if key in trial.last.params]
    places = [places[k] for k in some(len(places))]
    done = np.array([trials[k].row.state == "complete" for k in places])
    y = shown(objective.metric, [trials[k].value for k in places])
    raw = [trials[k].last.params[key] for k in places]
    if isinstance(distribution, CategoricalDistribution):
        x = _beside(raw, distribution, axes)
    else:
        x = np.array(raw, dtype=float)
        _over_the_range(axes, distribution)
    size, pixels = (14 if len(places) < 300 else 5), len(places) > MANY // 4
    stopped = ~done
    axes.scatter(
        x[stopped],
        y[stopped],
        s=size,
        color="#cccccc",
        linewidths=0,
        rasterized=pixels,
        zorder=1.5,
    )
    axes.set_xlabel(short(key), size=SMALL)
    if not done.any():
        return None
    colours = 1 + np.array(places)[done]
    return axes.scatter(
        x[done],
        y[done],
        c=colours,
        s=size,
        cmap="viridis",
        vmin=1,
        vmax=max(2, len(trials)),
        linewidths=0,
        rasterized=pixels,
        zorder=2,
    )


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
