"""The output of `raytrain compare`."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.cli.common import line
from raytrain.evaluation.names import attack_title
from raytrain.report.bands import bands_of
from raytrain.report.rows import VALID, Row
from raytrain.report.sections import seeds_of
from raytrain.tracking import tracking_uri

if TYPE_CHECKING:
    from raytrain.commands.compare import Comparison
    from raytrain.report.cells import Cell
    from raytrain.report.comparable import ComparableRuns

_SHOWN = 15  # rows of a table; the report has them all


def compare_summary(result: Comparison) -> Callable[[], None]:
    """The leader of everything that may be ranked together, a table, the next command, and the report."""

    def show() -> None:
        console = Console()
        commands = []
        for comparable in result.comparables:
            answer = result.answer(comparable)
            line(console, "leader", answer.text)
            console.print(_table(comparable))
            for note in (*comparable.notes, *filter(None, [answer.next])):
                line(console, "note", note)
            commands += filter(None, [answer.command])
        for note in result.notes:
            line(console, "note", note)
        for command in commands:
            line(console, "next", _there(result) + command)
        line(console, "report", str(result.report))
        line(console, "data", str(result.folder / "data"))
        if result.parent is not None:
            line(console, "in MLflow", f"comparison/ of run {result.parent}")

    return show


def _there(result: Comparison) -> str:
    """What leads a command to the store of the comparison, where it is not the default."""
    uri = result.tracking_uri
    return "" if uri == tracking_uri(None) else f"MLFLOW_TRACKING_URI={quote(uri)} "


def _table(comparable: ComparableRuns) -> Table:
    """The ranked number with its interval, others without, so that eighty columns are enough."""
    table = Table(title_justify="left", min_width=72)
    table.add_column("")
    for name in ("run", "configuration"):
        table.add_column(name, overflow="fold", min_width=8)
    attack = comparable.attack
    titles = ["valid"] if attack == VALID else ["clean", attack_title(attack), "valid"]
    for name in (*titles, "FE/image", "seeds"):
        table.add_column(name, justify="right")
    left = _SHOWN
    for band in bands_of(comparable):
        for row in band.shown[: max(left, 0)]:
            ranked = _text(row.ranking_cell(attack), row)
            values = [_value(row.score("clean"), row), ranked, _value(row.valid(), row)]
            table.add_row(
                row.letter + row.marks,
                Text(row.setting.names),
                Text(row.label + (" ◆" if row.front else "")),
                *map(Text, [ranked] if attack == VALID else values),
                "-" if row.cost is None else f"{row.cost:,.0f}",
                seeds_of(row, attack),
                style="bold" if row is comparable.leader else None,
            )
        left -= len(band.shown)
        if left >= 0 and band.folded:
            best = band.folded[0]
            said = f"{'best of ' if len(band.folded) > 1 else ''}{band.count}"
            said += " ◆" if best.front else ""
            blanks = [""] * (len(titles) - 1)
            value = _value(best.valid(), best)
            names = Text(best.setting.names)
            table.add_row(best.letter, names, said, *blanks, value, band.cost, style="dim")
        table.add_section()
    marks = "◆ Pareto front  ⚠ a check failed  † trained for another threat model"
    table.caption = (f"and {-left} more  " if left < 0 else "") + marks
    return table


def _text(cell: Cell | None, row: Row) -> str:
    return "-" if cell is None else cell.text + row.marks


def _value(cell: Cell | None, row: Row) -> str:
    """Without the interval of a single seed."""
    return "-" if cell is None else f"{100 * cell.value:.1f}{row.marks}"
