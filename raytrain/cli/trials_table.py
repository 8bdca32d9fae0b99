"""The trials of a sweep as a table that is as wide as the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from raytrain.cli.columns import Column, fitting
from raytrain.cli.common import number
from raytrain.tuning.space.labels import short_names

if TYPE_CHECKING:
    from raytrain.tuning.budget import TrialRow


class Sweep(Protocol):
    """What the table is made of: a sweep that has ended, or the status of one."""

    @property
    def name(self) -> str: ...
    @property
    def objectives(self) -> list[str]: ...
    @property
    def directions(self) -> list[int]: ...
    @property
    def best(self) -> TrialRow | None: ...
    @property
    def front(self) -> list[TrialRow]: ...
    @property
    def trials(self) -> list[TrialRow]: ...


_SHOWN = 20  # trials; the Parquet file has them all
_LONG = 24  # characters of a value, except in the best row
_COST = "cost/fe_per_sample"


def _column(name: str, cells: list[str], order: int, best: int, right: bool = True) -> Column:
    """A column as wide as its widest cell, shortened except in the first `best` rows."""
    whole = [name, *cells[:best]]
    others = (min(cell_len(cell), _LONG) for cell in cells[best:])
    return Column(name, cells, max(*map(cell_len, whole), *others, 0), order, right)


def trials_table(result: Sweep, width: int) -> Table:
    """The best trials by the first objective with what was searched, in at most `width` characters.

    Columns that there is no room for are named below; a value of the best trial is never shortened.
    """
    starred = result.front or ([] if result.best is None else [result.best])
    ranked = _ranked(result, {row.number for row in starred})
    shown = ranked[:_SHOWN]
    best = min(len(starred), len(shown))
    columns, left_out = fitting(_columns(result, shown, best), width)
    table = Table(title=f"sweep {result.name}", title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(
            column.name,
            justify="right" if column.right else "left",
            min_width=column.width,
            max_width=column.width,
            no_wrap=True,
            overflow="ellipsis",
        )
    for place in range(len(shown)):
        cells = [Text(column.cells[place]) for column in columns]
        table.add_row(*cells, style="bold" if place < best else None)
    more = len(ranked) - len(shown)
    said = [f"and {more} more trials"] if more else []
    said += [f"no room for {', '.join(left_out)}"] if left_out else []
    table.caption = "; ".join(said) or None
    return table


def _ranked(result: Sweep, starred: set[int]) -> list[TrialRow]:
    """The best first, then by the first objective: those that were trained to the end, then others."""
    sign = result.directions[0]

    def key(row: TrialRow) -> tuple[bool, bool, bool, float]:
        value = row.value
        return (
            row.number not in starred,
            row.state != "complete",
            value is None,
            0.0 if value is None else -sign * value,
        )

    return sorted(result.trials, key=key)


def _columns(result: Sweep, rows: Sequence[TrialRow], best: int) -> list[Column]:
    """All columns, in the order in which they are shown."""
    metrics = [*result.objectives, *(m for m in ("valid/clean",) if m not in result.objectives)]
    names = short_names(dict.fromkeys(path for row in rows for path in row.params))
    paths = sorted(names, key=lambda path: path != "algorithm.name")
    handles = [f"{row.handle}{' *' if place < best else ''}" for place, row in enumerate(rows)]
    after = len(metrics) + len(paths)  # what is left out first: the costs, epochs and outcome
    return [
        _column("trial", handles, 0, best, right=False),
        *(
            _column(
                metric.rsplit("/", 1)[-1],
                [number(row.metrics.get(metric)) for row in rows],
                0 if metric in result.objectives else after + 1,
                best,
            )
            for metric in metrics
        ),
        *(
            _searched(names[path], [row.params.get(path) for row in rows], 1 + place, best)
            for place, path in enumerate(paths)
        ),
        _column("state", [row.state for row in rows], after + 3, best, right=False),
        _column("epochs", [str(row.epochs) for row in rows], after + 4, best),
        _column("FE/sample", [number(row.metrics.get(_COST)) for row in rows], after + 2, best),
        _column(
            "seconds", [number(row.metrics.get("cost/seconds")) for row in rows], after + 5, best
        ),
    ]


def _searched(name: str, values: list[Any], order: int, best: int) -> Column:
    words = any(isinstance(value, str) for value in values)
    return _column(name, [number(value) for value in values], order, best, right=not words)
