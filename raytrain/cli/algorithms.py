"""The output of `raytrain algorithms`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytrain.algorithms import RECIPES
from raytrain.core.types import RequestError
from raytrain.outer import OUTERS

_KINDS = {**RECIPES, **OUTERS}


def catalogue() -> Callable[[], None]:
    """All algorithms and outer updates, a line each."""

    def show() -> None:
        for title, kinds in (("algorithm.name", RECIPES), ("outer.name", OUTERS)):
            table = Table(title=title, title_justify="left")
            for column in ("name", "rule", "cost per image"):
                table.add_column(column)
            for name, kind in kinds.items():
                table.add_row(name, escape(kind.card.rule), escape(kind.card.cost))
            Console().print(table)

    return show


def catalogue_json() -> dict[str, Any]:
    """The same for scripts."""
    return {name: algorithm_json(name) for name in _KINDS}


def algorithm(name: str) -> Callable[[], None]:
    """One algorithm: paper, rule, cost, hyperparameters and the ranges to search."""
    card = algorithm_json(name)

    def show() -> None:
        console = Console()
        for key in ("name", "paper", "rule", "cost", "memory", "norms"):
            value = ", ".join(card[key]) if isinstance(card[key], list) else card[key]
            console.print(f"[bold]{key:8}[/bold] {escape(value)}", highlight=False)
        table = Table()
        for column in ("hyperparameter", "default", "range to search", "meaning"):
            table.add_column(column)
        for row in card["hyperparameters"]:
            table.add_row(*(escape(str(row[k])) for k in ("name", "default", "range", "meaning")))
        console.print(table)
        console.print(_paragraph(_KINDS[name]), markup=False, highlight=False)

    return show


def algorithm_json(name: str) -> dict[str, Any]:
    """The same for scripts.

    Raises:
        RequestError: if there is no such algorithm.
    """
    if name not in _KINDS:
        raise RequestError(f"{name}: expected one of {', '.join(_KINDS)}")
    recipe = _KINDS[name]
    card = recipe.card
    rows = []
    for field, info in recipe.model_fields.items():
        if field == "name":
            continue
        default = "required" if info.is_required() else _default(info.default)
        rows.append(
            {
                "name": field,
                "default": default,
                "range": card.ranges.get(field, ""),
                "meaning": info.description or "",
            }
        )
    deeper = [path for path in card.ranges if "." in path]
    rows += [
        {"name": path, "default": "", "range": card.ranges[path], "meaning": ""} for path in deeper
    ]
    return {
        "name": name,
        "paper": card.paper,
        "rule": card.rule,
        "cost": card.cost,
        "memory": card.memory,
        "norms": list(card.norms),
        "hyperparameters": rows,
    }


def _default(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return ", ".join(f"{v}" if k in {"kind", "name"} else f"{k}={v}" for k, v in value)
    return str(value)


def _paragraph(recipe: type) -> str:
    """Its docstring, each paragraph and each list item on one line for the terminal to wrap."""
    text = "\n".join(line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).replace("**", "")
