"""Shared parts of the figures of a sweep: trials, units, and figures without global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial

from raytrain.tuning.budget import TrialRow
from raytrain.tuning.space.labels import algorithm_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY = 3000  # points or curves at most; larger numbers are subsampled and rasterised
SMALL, TEXT = 8, 9  # points
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b")
"""Of Okabe and Ito, and a brown for their yellow: distinguishable for colour-blind readers."""
GREY, INK = "#8c8c8c", "black"


@dataclass(frozen=True)
class EndedTrial:
    """A trial that ended, and the cost of all trials up to its end."""

    row: TrialRow
    last: FrozenTrial  # its last attempt
    spent: float  # FE per training image, this trial included

    @property
    def value(self) -> float:
        """The first objective; NaN if there is none."""
        return math.nan if self.row.value is None else self.row.value

    @property
    def stopped(self) -> bool:
        """Whether it was stopped early: its value is not that of a whole run."""
        return self.row.state == "stopped"

    @property
    def algorithm(self) -> str:
        """The algorithm that was chosen for it; empty where all have the same."""
        return algorithm_of(self.row.params) or ""


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each of several names, grey for those that there is none for; none for a single name."""
    names = sorted(set(names))
    colours = [*COLOURS, *[GREY] * len(names)]
    return dict(zip(names, colours, strict=False)) if len(names) > 1 else {}


def label(metric: str) -> str:
    """Return a metric with its unit."""
    shares = ("valid/", "fosc_histogram/", "engm/clipped", "sentinel/")
    units = {"train/inner_steps": "", "train/lr": "", "cost/seconds": "s", "cost/samples": ""}
    if metric.startswith("cost/fe") or metric == "sentinel/fe":
        unit = "FE"
    elif metric.startswith(shares):
        unit = "%"
    else:
        unit = units.get(metric, "nats" if metric.startswith(("train/", "l2l/")) else "")
    return f"{metric}, {unit}" if unit else metric


def shown(metric: str, values: Any) -> Any:
    """Return the values for display: shares in per cent."""
    values = np.asarray(values, dtype=float)
    return 100 * values if label(metric).endswith("%") else values


def some(count: int) -> np.ndarray:
    """Return indices of the drawn ones of `count`: all, or `MANY` at fixed positions."""
    if count <= MANY:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MANY, replace=False))


def sheet(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def paper(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = sheet(width, height)
    axes = figure.subplots()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Style the axes: few lines, and text of 8 points or more."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL)
    axes.tick_params(which="minor", labelsize=SMALL)
    axes.xaxis.label.set_fontsize(TEXT)
    axes.yaxis.label.set_fontsize(TEXT)


def cost_axis(axes: Axes, name: str) -> None:
    """Format an axis of costs: from 0 to beyond what is drawn, integers without exponents."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    right = max(axes.dataLim.x1, axes.get_xlim()[1])
    axes.set_xlim(0, 1.04 * right if math.isfinite(right) and right > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(name)


def swatches(colours: dict[str, str]) -> list[Any]:
    """Handles of a legend: a square for each colour, those without one together."""
    from matplotlib.patches import Patch

    others = sum(colour == GREY for colour in colours.values())
    named = [Patch(color=c, label=name) for name, c in colours.items() if c != GREY]
    return named + ([Patch(color=GREY, label=f"{others} other algorithms")] if others else [])


def legend(
    figure: Figure, handles: Sequence[Any], title: str, columns: int = 5, below: bool = False
) -> None:
    """Draw a legend under a title above the axes, or below them."""
    if not handles and not title:
        return
    figure.legend(
        handles=handles,
        loc="outside lower left" if below else "outside upper left",
        ncols=columns,
        title=title or None,
        title_fontproperties={"size": TEXT, "weight": "bold"},
        alignment="left",
        frameon=False,
        fontsize=SMALL,
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=1.4,
    )


def short(text: str, longest: int = 34) -> str:
    """Truncate a text to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Save as PNG and SVG; the same figure gives the same bytes of the PNG."""
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    figure.savefig(files[0], dpi=160)
    figure.savefig(files[1], dpi=160, metadata={"Date": None})
    return files
