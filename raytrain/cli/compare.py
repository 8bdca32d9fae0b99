"""The output of `raytrain compare`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.cli.common import line
from raytrain.evaluation.names import attack_title
from raytrain.report.rows import VALID, Row
from raytrain.report.sections import in_short, seeds_of

if TYPE_CHECKING:
    from raytrain.commands.compare import Comparison
    from raytrain.report.cells import Cell
    from raytrain.report.comparable import ComparableRuns

_SHOWN = 15  # rows of a table; the report has them all


def compare_summary(result: Comparison) -> Callable[[], None]:
    """A table for everything that may be ranked together, and where the report is."""

    def show() -> None:
        console = Console()
        for comparable in result.comparables:
            console.print(_table(comparable))
            line(console, "in short", in_short(comparable, result.pairs[comparable.title]))
            for note in comparable.notes:
                line(console, "note", note)
        for note in result.notes:
            line(console, "note", note)
        line(console, "report", str(result.report))
        line(console, "data", str(result.folder / "data"))
        if result.parent is not None:
            line(console, "in MLflow", f"comparison/ of run {result.parent}")

    return show


def _table(comparable: ComparableRuns) -> Table:
    table = Table(title=comparable.title, title_justify="left", min_width=72)
    table.add_column("")
    table.add_column("configuration", overflow="fold", min_width=len("configuration"))
    tests = [] if comparable.attack == VALID else ["clean", comparable.attack]
    for name in (*(attack_title(test) for test in tests), "validation", "FE/image", "seeds"):
        table.add_column(name, justify="right")
    band = 0
    for row in comparable.rows[:_SHOWN]:
        if row.band != band:
            table.add_section()
        band = row.band
        cells = [_text(row.score(test), row) for test in tests] + [_text(row.valid(), row)]
        cost = "-" if row.cost is None else f"{row.cost:,.0f}"
        front = " ◆" if row.front else ""
        table.add_row(
            row.letter + row.marks,
            Text(row.label + front),
            *(Text(cell) for cell in cells),
            cost,
            seeds_of(row, comparable.attack),
            style="bold" if row is comparable.leader else None,
        )
    more = len(comparable.rows) - _SHOWN
    marks = "◆ Pareto front  ⚠ a check failed  † trained for another threat model"
    table.caption = (f"and {more} more  " if more > 0 else "") + marks
    return table


def _text(cell: Cell | None, row: Row) -> str:
    return "-" if cell is None else cell.text + row.marks
