"""How configurations look in every figure: one letter, one colour, one marker each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrain.evaluation.names import attack_title
from raytrain.plotting.sheet import SMALL, short
from raytrain.report.comparable import ComparableRuns
from raytrain.report.rows import VALID, Row, order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b")
"""Of Okabe and Ito, and a brown for their yellow: told apart by colour-blind readers."""
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#8c8c8c"


@dataclass(frozen=True)
class Look:
    """Grey for those that there are no colours for."""

    colour: str = GREY
    marker: str = "o"
    line: object = "-"
    named: bool = False


def best_first(comparable: ComparableRuns) -> list[Row]:
    """The rows by accuracy, whatever their cost."""
    return sorted(comparable.rows, key=lambda row: order(row, comparable.attack))


def looks_of(comparable: ComparableRuns) -> dict[str, Look]:
    """By letter: a colour for the best, and for what is on the Pareto front."""
    rows = best_first(comparable)
    chosen = rows if len(rows) <= len(COLOURS) else _worth_a_colour(rows)
    looks = {
        row.letter: Look(colour, marker, line, named=True)
        for row, colour, marker, line in zip(chosen, COLOURS, MARKERS, LINES, strict=False)
    }
    return {row.letter: looks.get(row.letter, Look()) for row in rows}


def _worth_a_colour(rows: list[Row]) -> list[Row]:
    front = [row for row in rows if row.front][: len(COLOURS) - 2]
    rest = [row for row in rows if row not in front]
    chosen = [*front, *rest][: len(COLOURS)]
    return [row for row in rows if row in chosen]


def title_of(row: Row, longest: int = 44) -> str:
    """`A pgd steps=10`, with the marks that every number of the row has."""
    marks = f" {row.marks}" if row.marks else ""
    return f"{row.letter}  {short(row.label, longest)}{marks}"


def axis_of(attack: str) -> str:
    """What is on an axis of robust accuracy."""
    if attack == VALID:
        return "robust accuracy in validation, %"
    return f"{attack_title(attack)} accuracy on the test set, %"


def head_room(labels: int) -> float:
    """Inches that a legend of so many labels takes above the axes."""
    return 0.18 * -(-labels // 2)


def letter_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Two columns above the axes."""
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        handletextpad=0.5,
        columnspacing=2,
    )


def letters(axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """A bold letter beside each point (x, y), moved up or down where two would lie on one another."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    near, gap = 0.06 * (right - left), 0.05 * (high - low)
    done: list[tuple[float, float]] = []
    for x, y, text in sorted(places, key=lambda place: -place[1]):
        below = [other for at, other in done if abs(at - x) < near]
        free = min([y, *(other - gap for other in below if other - gap < y)])
        done.append((x, free))
        axes.annotate(
            text,
            (x, free),
            (7, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
            weight="bold",
            annotation_clip=False,
        )
