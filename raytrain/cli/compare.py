"""The output of `raytrain compare`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.cli.columns import Column, fitting
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
_FOLDED = {"run": 14, "configuration": 13}  # columns of long names, and the least of their widths
_MARKS = "◆ Pareto front  ⚠ a check failed  † trained for another threat model"


def compare_summary(result: Comparison) -> Callable[[], None]:
    """The leader of everything that may be ranked together, a table, the next command, and the report."""

    def show() -> None:
        console = Console()
        commands = []
        for comparable in result.comparables:
            answer = result.answer(comparable)
            line(console, "leader", answer.text)
            console.print(comparison_table(comparable, console.width))
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


def comparison_table(comparable: ComparableRuns, width: int) -> Table:
    """The ranked number with its interval, others without, in at most `width` characters.

    Columns that there is no room for are named below; names are folded.
    """
    rows, more = _rows(comparable)
    columns, left_out = fitting(_columns(comparable, [row.cells for row in rows]), width)
    table = Table(title_justify="left", min_width=min(width, 72))
    for column in columns:
        table.add_column(
            column.name,
            justify="right" if column.right else "left",
            overflow="fold",
            min_width=column.width,
            no_wrap=column.name not in _FOLDED,
        )
    for place, row in enumerate(rows):
        cells = [Text(column.cells[place]) for column in columns]
        table.add_row(*cells, style=row.style, end_section=row.ends)
    said = [f"and {more} more"] if more else []
    said += [f"no room for {', '.join(left_out)}"] if left_out else []
    table.caption = "\n".join([*filter(None, ["; ".join(said)]), _MARKS])
    return table


@dataclass(frozen=True)
class _Shown:
    """A row of the table."""

    cells: dict[str, str]  # by column
    style: str | None
    ends: bool = False  # whether it is the last of its band


def _columns(comparable: ComparableRuns, rows: list[dict[str, str]]) -> list[Column]:
    """All columns, in the order in which they are shown."""
    attack = comparable.attack
    ranked = "valid" if attack == VALID else attack_title(attack)
    alike = all(row["seeds"] == "1" for row in rows if row["seeds"])
    orders = {"clean": 1, "seeds": 4 if alike else 2, "valid": 3, ranked: 0}
    scores = ["valid"] if attack == VALID else ["clean", ranked, "valid"]
    found = []
    for name in ("", *_FOLDED, *scores, "FE/image", "seeds"):
        cells = [row[name] for row in rows]
        width = _FOLDED.get(name) or max(map(cell_len, [name, *cells]))
        found.append(Column(name, cells, width, orders.get(name, 0), name not in ("", *_FOLDED)))
    return found


def _rows(comparable: ComparableRuns) -> tuple[list[_Shown], int]:
    """The rows that are shown, and how many more there are."""
    attack, left = comparable.attack, _SHOWN
    ranked = "valid" if attack == VALID else attack_title(attack)
    rows: list[_Shown] = []
    for band in bands_of(comparable):
        own: list[_Shown] = []
        for row in band.shown[: max(left, 0)]:
            cells = {
                "": row.letter + row.marks,
                "run": row.setting.names,
                "configuration": row.label + (" ◆" if row.front else ""),
                "clean": _value(row.score("clean"), row),
                "valid": _value(row.valid(), row),
                ranked: _text(row.ranking_cell(attack), row),
                "FE/image": "-" if row.cost is None else f"{row.cost:,.0f}",
                "seeds": seeds_of(row, attack),
            }
            own.append(_Shown(cells, "bold" if row is comparable.leader else None))
        left -= len(band.shown)
        if left >= 0 and band.folded:
            best = band.folded[0]
            said = f"{'best of ' if len(band.folded) > 1 else ''}{band.count}"
            cells = {
                "": best.letter,
                "run": best.setting.names,
                "configuration": said + (" ◆" if best.front else ""),
                "clean": "",
                ranked: "",
                "valid": _value(best.valid(), best),
                "FE/image": band.cost,
                "seeds": "",
            }
            own.append(_Shown(cells, "dim"))
        rows += [*own[:-1], *(replace(one, ends=True) for one in own[-1:])]
    return rows, max(0, -left)


def _text(cell: Cell | None, row: Row) -> str:
    return "-" if cell is None else cell.text + row.marks


def _value(cell: Cell | None, row: Row) -> str:
    """Without the interval of a single seed."""
    return "-" if cell is None else f"{100 * cell.value:.1f}{row.marks}"
