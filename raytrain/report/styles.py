"""How configurations look in every figure: a letter each, and the colour of their algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrain.evaluation.names import attack_title
from raytrain.plotting.sheet import COLOURS, GREY, legend, short
from raytrain.report.comparable import ComparableRuns
from raytrain.report.rows import VALID, Row, order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


@dataclass(frozen=True)
class Look:
    """Of a configuration: those that are not named are small and pale."""

    colour: str = GREY
    marker: str = "o"
    line: object = "-"
    named: bool = False


def best_first(comparable: ComparableRuns) -> list[Row]:
    """The rows by accuracy, whatever their cost."""
    return sorted(comparable.rows, key=lambda row: order(row, comparable.attack))


def looks_of(comparable: ComparableRuns) -> dict[str, Look]:
    """By letter. Colour and marker are those of the algorithm, lines distinguish its configurations; of a
    single algorithm, each of the named configurations has its own. Named are the best, and the Pareto front.
    """
    rows = best_first(comparable)
    named = rows if len(rows) <= len(COLOURS) else _worth_a_name(rows)
    several = len({row.setting.algorithm for row in rows}) > 1
    first = dict.fromkeys(_group(row, several) for row in [*named, *(rows if several else [])])
    places = {group: place for place, group in enumerate(first)}
    used: Counter[str] = Counter()
    looks = {}
    for row in rows:
        group, is_named = _group(row, several), row in named
        place = places.get(group, len(COLOURS))
        line = LINES[(used[group] if several else place) % len(LINES)]
        used[group] += is_named
        colour, marker = (
            (COLOURS[place], MARKERS[place]) if place < len(COLOURS) else (GREY, MARKERS[0])
        )
        looks[row.letter] = Look(colour, marker, line if is_named else "-", is_named)
    return looks


def algorithms_of(comparable: ComparableRuns, looks: dict[str, Look]) -> dict[str, str]:
    """The colour of each algorithm; empty where all configurations have the same, or each another."""
    rows = best_first(comparable)
    colours = {row.setting.algorithm: looks[row.letter].colour for row in rows}
    return colours if 1 < len(colours) < len(rows) else {}


def _group(row: Row, several: bool) -> str:
    return row.setting.algorithm if several else row.letter


def _worth_a_name(rows: list[Row]) -> list[Row]:
    front = [row for row in rows if row.front][: len(COLOURS) - 2]
    rest = [row for row in rows if row not in front]
    chosen = [*front, *rest][: len(COLOURS)]
    return [row for row in rows if row in chosen]


def title_of(row: Row, longest: int = 44) -> str:
    """`A  t0008: pgd steps=10`, with the marks that every number of the row has.

    Two titles fit side by side into the width of a figure.
    """
    marks = f" {row.marks}" if row.marks else ""
    names = "" if row.setting.names == row.label else f"{short(row.setting.names, 24)}: "
    return f"{row.letter}  {short(names + row.label, longest)}{marks}"


def axis_of(attack: str) -> str:
    """What is on an axis of robust accuracy."""
    if attack == VALID:
        return "robust accuracy in validation, %"
    return f"{attack_title(attack)} accuracy on the test set, %"


def room(labels: int) -> float:
    """Inches that a legend of so many labels in two columns takes."""
    return 0.18 * -(-labels // 2)


def letter_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """The letters, in two columns below the axes."""
    legend(figure, handles, "", columns=2, below=True)
