"""Columns of a table as wide as the terminal: which there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    cells: list[str]
    width: int  # characters that it needs at least
    order: int  # columns of the highest are left out first; those of order 0 never
    right: bool = True


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that `width` characters have room for with their borders, and the names of the others."""
    kept = list(columns)
    while 1 + sum(column.width + 3 for column in kept) > width:
        last = max(kept, key=lambda column: column.order)
        if last.order == 0:
            break
        kept.remove(last)
    return kept, [column.name for column in columns if column not in kept]
