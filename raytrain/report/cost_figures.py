"""Robust accuracy against cost, overfitting, and the leader against the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.plotting.sheet import (
    COLOURS,
    GREY,
    INK,
    MANY,
    SMALL,
    TEXT,
    cost_axis,
    legend,
    paper,
    sheet,
    style,
    swatches,
)
from raytrain.report.cells import Cell
from raytrain.report.comparable import ComparableRuns
from raytrain.report.pairs import LEVEL, Pair
from raytrain.report.placement import place_labels, settle
from raytrain.report.rows import VALID, Row
from raytrain.report.styles import (
    Look,
    algorithms_of,
    axis_of,
    best_first,
    letter_legend,
    looks_of,
    room,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTERED = 30  # points: with more of them only the named ones carry their letter
_BARS = 16  # rows of a figure with a line for each


def cost_figure(comparable: ComparableRuns) -> Figure | None:
    """Every configuration where its cost and its accuracy put it, the Pareto front joined.

    Where some were evaluated on the test set and others were not, validation has a panel of its own.
    """
    attacks = [comparable.attack]
    if comparable.attack != VALID and any(
        row.ranking_cell(comparable.attack) is None for row in comparable.rows
    ):
        attacks.append(VALID)
    attacks = [
        a for a in attacks if any(row.cost and row.ranking_cell(a) for row in comparable.rows)
    ]
    if not attacks:
        return None
    looks = looks_of(comparable)
    figure = sheet(7.6, 4.1 + room(sum(look.named for look in looks.values())))
    panels: list[Any] = list(figure.subplots(1, len(attacks), squeeze=False).flat)
    for axes, attack in zip(panels, attacks, strict=True):
        style(axes)
        _cost_panel(axes, comparable, attack, looks)
    legend(figure, _kinds(comparable, looks), "", columns=7)
    letter_legend(figure, _letters(comparable, looks))
    settle(panels[0])
    for axes, attack in zip(panels, attacks, strict=True):
        known = _known(comparable, attack)
        shown = [one for one in known if len(known) <= _LETTERED or looks[one[0].letter].named]
        places = [(cost, 100 * c.value, f"{row.letter}{row.marks}") for row, cost, c in shown]
        place_labels(axes, places, [line.get_xydata() for line in axes.lines])
    return figure


def _known(comparable: ComparableRuns, attack: str) -> list[tuple[Row, float, Cell]]:
    return [
        (row, row.cost, cell)
        for row in comparable.rows
        if row.cost is not None and (cell := row.ranking_cell(attack)) is not None
    ]


def _cost_panel(
    axes: Axes, comparable: ComparableRuns, attack: str, looks: dict[str, Look]
) -> None:
    known = _known(comparable, attack)
    for row, cost, cell in known:
        look = looks[row.letter]
        _whiskers(axes, cost, cell, look, len(known))
        axes.scatter(
            [cost],
            [100 * cell.value],
            s=44 if look.named else 18,
            marker=look.marker if row.trusted else "X",
            facecolors="none" if _hollow(row) else look.colour,
            edgecolors=look.colour,
            linewidths=1.1,
            alpha=1 if look.named else 0.6,
            zorder=4 if look.named else 2,
            rasterized=len(known) > MANY,
        )
    if attack == comparable.attack:
        _front(axes, comparable)
    axes.margins(y=0.1)
    cost_axis(axes, "cost of training, FE per training image")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -4), min(high, 104))
    axes.set_ylabel(axis_of(attack))


def _hollow(row: Row) -> bool:
    return row.stopped or not row.trusted


def _whiskers(axes: Axes, cost: float, cell: Cell, look: Look, count: int) -> None:
    """The 95 % interval."""
    if cell.low is None or cell.high is None or (count > _LETTERED and not look.named):
        return
    ends = [100 * max(0.0, cell.low), 100 * min(1.0, cell.high)]
    axes.plot([cost, cost], ends, color=look.colour, linewidth=1.1, alpha=0.65, zorder=3)


def _front(axes: Axes, comparable: ComparableRuns) -> None:
    front = sorted((row for row in comparable.rows if row.front), key=lambda row: row.cost or 0.0)
    x = [row.cost or 0.0 for row in front]
    y = [
        100 * cell.value
        for row in front
        if (cell := row.ranking_cell(comparable.attack)) is not None
    ]
    if len(front) < 2:
        return
    right = max(row.cost or 0.0 for row in comparable.rows)
    # Corners and all, not a step style: labels keep off what is drawn.
    across, up = np.repeat([*x, right], 2)[1:], np.repeat([*y, y[-1]], 2)[:-1]
    axes.plot(across, up, color=INK, linewidth=1.2, zorder=1.5)


def _kinds(comparable: ComparableRuns, looks: dict[str, Look]) -> list[Any]:
    """What colours, hollow marks and the line stand for."""
    from matplotlib.lines import Line2D

    handles = swatches(algorithms_of(comparable, looks))
    mark: Any = {"linestyle": "none", "color": INK, "markerfacecolor": "none", "markersize": 5.5}
    if any(row.stopped for row in comparable.rows):
        handles.append(Line2D([], [], marker="o", label="hollow: stopped early", **mark))
    if any(not row.trusted for row in comparable.rows):
        handles.append(Line2D([], [], marker="X", label="failed a check", **mark))
    if sum(row.front for row in comparable.rows) > 1:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, label="Pareto front"))
    return handles


def _letters(comparable: ComparableRuns, looks: dict[str, Look]) -> list[Any]:
    """A handle for each named configuration, the best first."""
    from matplotlib.lines import Line2D

    rows = [row for row in best_first(comparable) if looks[row.letter].named]
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=looks[row.letter].marker if row.trusted else "X",
            color=looks[row.letter].colour,
            markerfacecolor="none" if _hollow(row) else looks[row.letter].colour,
            markersize=5.5,
            label=title_of(row),
        )
        for row in rows
    ]
    if len(rows) < len(comparable.rows):
        others = len(comparable.rows) - len(rows)
        dot: Any = {"marker": "o", "markersize": 3.5, "color": GREY, "linestyle": "none"}
        handles.append(Line2D([], [], **dot, label=f"{others} others, small: see the tables"))
    return handles


def gap_figure(comparable: ComparableRuns) -> Figure | None:
    """Robust accuracy at the best and at the last epoch: what was lost by going on.

    Configurations that were stopped early have no last epoch.
    """
    rows = [row for row in best_first(comparable) if not row.stopped]
    gaps = [(row, *row.gap(comparable.attack)) for row in rows]
    known = [one for one in gaps if one[2] is not None and one[3] is not None][:_BARS]
    if not known:
        return None
    figure, axes = paper(7.6, 0.95 + 0.3 * len(known))
    for place, (_, _, best, last) in enumerate(known):
        assert best is not None and last is not None
        x = [100 * last.value, 100 * best.value]
        axes.plot(x, [place, place], color=GREY, linewidth=2.4, zorder=1)
        axes.scatter(x[:1], [place], marker="s", s=34, color=COLOURS[1], zorder=3)
        axes.scatter(x[1:], [place], marker="o", s=34, color=COLOURS[0], zorder=2)
        axes.annotate(
            signed(x[0] - x[1]),
            (max(x), place),
            (8, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
        )
    places = {where for _, where, _, _ in known}
    apart = len(places) > 1
    words = [title_of(row, 40) + (f" ({where})" if apart else "") for row, where, _, _ in known]
    axes.set_yticks(range(len(known)), words)
    axes.set_ylim(len(known) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    attack = comparable.attack if places == {"test"} else VALID
    axes.set_xlabel("robust accuracy, %" if apart else axis_of(attack))
    axes.scatter([], [], marker="o", color=COLOURS[0], label="best epoch")
    axes.scatter([], [], marker="s", color=COLOURS[1], label="last epoch (difference beside)")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def signed(points: float) -> str:
    """Percentage points: `+1.2`, `0`."""
    return "0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def pairs_figure(pairs: list[Pair]) -> Figure | None:
    """How far the leader is ahead of each other configuration on the same images."""
    shown = pairs[:_BARS]
    if not shown:
        return None
    figure, axes = paper(7.6, 0.75 + 0.3 * len(shown))
    for place, pair in enumerate(shown):
        apart = pair.holm < LEVEL
        colour = COLOURS[0] if apart else GREY
        ends = [100 * pair.low, 100 * pair.high]
        axes.plot(ends, [place, place], color=colour, linewidth=1.6)
        face = colour if apart else "none"
        axes.scatter([100 * pair.difference], [place], s=34, facecolors=face, edgecolors=colour)
        axes.annotate(
            p_text(pair.holm),
            (ends[1], place),
            (7, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(shown)), [title_of(pair.other, 40) for pair in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.grid(axis="y", visible=False)
    leader = shown[0].leader.letter
    text = f"{leader} ahead by, percentage points of the same images"
    axes.set_xlabel(text, size=TEXT)
    return figure


def p_text(p: float) -> str:
    """`p = 0.012`, with what is smaller than can be written."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.995 else "p = 1"
