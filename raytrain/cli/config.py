"""The output of `raytrain config`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.config.field_list import RunField, below, fields_with
from raytrain.config.request import as_run, override, parse_overrides
from raytrain.config.run_file import complete_run_file
from raytrain.core.errors import RequestError

_COLUMNS = "{:<32}  {:<14}  {:<28}  {}"


def fields(words: Iterable[str]) -> list[RunField]:
    """The fields at and below the path that is the first word, if it is one; others choose the parts.

    Raises:
        RequestError: for a path that no field has, and as for a run.
    """
    words = list(words)
    path = words.pop(0) if words and "=" not in words[0] else None
    listed = fields_with(override({}, parse_overrides(words)))
    if path is None:
        return listed
    try:
        return below(listed, path)
    except RequestError:
        if os.path.isfile(path):
            raise RequestError(
                f"{path}: expected a field; raytrain config --yaml {path} prints all of a run file"
            ) from None
        raise


def listing(listed: list[RunField]) -> Callable[[], None]:
    """A line for each field: path, value, what it may be, meaning; wrapped in columns on a terminal."""
    rows = [one for one in listed if not one.selects or len(listed) == 1]

    def show() -> None:
        if sys.stdout.isatty():
            Console().print(_table(rows))
        else:
            write("".join(f"{_COLUMNS.format(*_cells(one)).rstrip()}\n" for one in rows))

    return show


def fields_json(listed: list[RunField]) -> dict[str, Any]:
    """The same for scripts: a record per path."""
    return {one.path: one.json() for one in listed}


def run_file(file: Path | None, words: Iterable[str]) -> str:
    """A complete run file.

    Raises:
        RequestError: as for a run.
    """
    run = as_run(file, words)
    run.check_names()
    return complete_run_file(run)


def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of run files or of search spaces.

    Raises:
        RequestError: if `kind` is neither `run` nor `space`.
    """
    if kind == "space":
        from raytrain.tuning.space.json_schema import space_schema

        return space_schema()
    if kind == "run":
        from raytrain.config.json_schema import run_schema

        return run_schema()
    raise RequestError(f"--schema: expected run or space, found {kind}")


def check_alone(option: str, **others: object) -> None:
    """Refuse what an option leaves no room for.

    Raises:
        RequestError: naming the option.
    """
    if any(others.values()):
        raise RequestError(f"{option}: expected no {' and no '.join(others)} beside it")


def write(text: str) -> None:
    """Write to stdout; a pipe that is closed early, as by `| head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left, at exit


def _table(rows: list[RunField]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for ratio in (2, 4, 6):
        table.add_column(overflow="fold", ratio=ratio)
    group = None
    for one in rows:
        inner = "." in one.path or one.record
        if group is not None and group != (one.path.split(".")[0] if inner else ""):
            table.add_row()
        group = one.path.split(".")[0] if inner else ""
        path, *cells = _cells(one)
        style = "bold" if one.record else ""
        table.add_row(Text(path, style), *map(Text, cells), style=None if one.there else "dim")
    return table


def _cells(field: RunField) -> tuple[str, str, str, str]:
    value = field.shown(field.value)
    if field.required and field.value is None:
        value = "required"
    elif field.record and field.value and isinstance(field.value, dict):
        value = ""
    elif field.changed and not field.required:
        value += f" (default {field.shown(field.default)})"
    return field.path, value, field.values, field.description
