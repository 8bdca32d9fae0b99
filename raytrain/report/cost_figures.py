"""Robust accuracy against cost, overfitting, and the leader against the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrain.plotting.sheet import MANY, SMALL, TEXT, cost_axis, paper, sheet, style
from raytrain.report.cells import Cell
from raytrain.report.comparable import ComparableRuns
from raytrain.report.pairs import LEVEL, Pair
from raytrain.report.rows import VALID
from raytrain.report.styles import (
    Look,
    axis_of,
    best_first,
    head_room,
    letter_legend,
    letters,
    looks_of,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTERED = 30  # points: with more of them only the named ones carry their letter
_BARS = 16  # rows of a figure with a line for each
_INK = "black"


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
    figure = sheet(7.6, 3.5 + head_room(2 + sum(look.named for look in looks.values())))
    panels: list[Any] = list(figure.subplots(1, len(attacks), squeeze=False).flat)
    for axes, attack in zip(panels, attacks, strict=True):
        style(axes)
        _cost_panel(axes, comparable, attack, looks)
    _named(figure, panels[0], comparable, looks)
    return figure


def _cost_panel(
    axes: Axes, comparable: ComparableRuns, attack: str, looks: dict[str, Look]
) -> None:
    known = [
        (row, row.cost, cell)
        for row in comparable.rows
        if row.cost is not None and (cell := row.ranking_cell(attack)) is not None
    ]
    for row, cost, cell in known:
        look = looks[row.letter]
        _whiskers(axes, cost, cell, look, len(known))
        axes.scatter(
            [cost],
            [100 * cell.value],
            s=44 if look.named else 16,
            marker=look.marker if row.trusted else "X",
            facecolors=look.colour if row.trusted else "none",
            edgecolors=look.colour,
            linewidths=1.1,
            alpha=1 if look.named else 0.6,
            zorder=4 if look.named else 2,
            rasterized=len(known) > MANY,
        )
    if attack == comparable.attack:
        _front(axes, comparable)
    cost_axis(axes, "cost of training, FE per training image")
    axes.margins(x=0.08, y=0.1)
    axes.set_xlim(left=0)
    axes.set_ylabel(axis_of(attack))
    places = [
        (cost, 100 * cell.value, f"{row.letter}{row.marks}")
        for row, cost, cell in known
        if len(known) <= _LETTERED or looks[row.letter].named
    ]
    letters(axes, places)


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
    if not front:
        return
    right = max(row.cost or 0.0 for row in comparable.rows)
    axes.step([*x, right], [*y, y[-1]], where="post", color=_INK, linewidth=1.2, zorder=1.5)
    axes.plot([], [], color=_INK, linewidth=1.2, label="Pareto front")


def _named(figure: Figure, axes: Axes, comparable: ComparableRuns, looks: dict[str, Look]) -> None:
    """A legend of letters above the axes."""
    from matplotlib.lines import Line2D

    rows = [row for row in best_first(comparable) if looks[row.letter].named]
    handles: list[Any] = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=looks[row.letter].marker if row.trusted else "X",
            color=looks[row.letter].colour,
            markerfacecolor=looks[row.letter].colour if row.trusted else "none",
            label=title_of(row),
        )
        for row in rows
    ]
    if len(rows) < len(comparable.rows):
        others = len(comparable.rows) - len(rows)
        dot = {"marker": "o", "markersize": 4, "color": "#8c8c8c", "linestyle": "none"}
        handles.append(Line2D([], [], **dot, label=f"{others} other configurations"))
    handles += axes.get_legend_handles_labels()[0]
    letter_legend(figure, handles)


def gap_figure(comparable: ComparableRuns) -> Figure | None:
    """Robust accuracy at the best and at the last epoch: what was lost by going on."""
    gaps = [(row, *row.gap(comparable.attack)) for row in best_first(comparable)]
    known = [one for one in gaps if one[2] is not None and one[3] is not None][:_BARS]
    if not known:
        return None
    figure, axes = paper(7.6, 0.95 + 0.3 * len(known))
    for place, (_, _, best, last) in enumerate(known):
        assert best is not None and last is not None
        x = [100 * last.value, 100 * best.value]
        axes.plot(x, [place, place], color="#8c8c8c", linewidth=2.4, zorder=1)
        axes.scatter(x[:1], [place], marker="s", s=34, color="#d55e00", zorder=3)
        axes.scatter(x[1:], [place], marker="o", s=34, color="#0072b2", zorder=2)
        axes.annotate(
            _signed(x[0] - x[1]),
            (max(x), place),
            (8, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
        )
    places = {where for _, where, _, _ in known}
    apart = len(places) > 1
    words = [title_of(row) + (f" ({where})" if apart else "") for row, where, _, _ in known]
    axes.set_yticks(range(len(known)), words)
    axes.set_ylim(len(known) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    attack = comparable.attack if places == {"test"} else VALID
    axes.set_xlabel("robust accuracy, %" if apart else axis_of(attack))
    axes.scatter([], [], marker="o", color="#0072b2", label="best epoch")
    axes.scatter([], [], marker="s", color="#d55e00", label="last epoch (difference beside)")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def _signed(points: float) -> str:
    return "0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def pairs_figure(pairs: list[Pair]) -> Figure | None:
    """How far the leader is ahead of each other configuration on the same images."""
    shown = pairs[:_BARS]
    if not shown:
        return None
    figure, axes = paper(7.6, 0.75 + 0.3 * len(shown))
    for place, pair in enumerate(shown):
        apart = pair.holm < LEVEL
        colour = "#0072b2" if apart else "#8c8c8c"
        if pair.low is not None and pair.high is not None:
            ends = [100 * pair.low, 100 * pair.high]
            axes.plot(ends, [place, place], color=colour, linewidth=1.6)
        face = colour if apart else "none"
        axes.scatter([100 * pair.difference], [place], s=34, facecolors=face, edgecolors=colour)
        right = 100 * (pair.difference if pair.high is None else pair.high)
        axes.annotate(
            p_text(pair.holm),
            (right, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
        )
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_yticks(range(len(shown)), [title_of(pair.other) for pair in shown])
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
