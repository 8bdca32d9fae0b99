"""The output of `raytrain algorithms`."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytrain.algorithms import RECIPES, AbstractRecipe
from raytrain.core.card import Card, alternatives
from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.threat_models import THREAT_MODELS
from raytrain.core.types import SCHEDULABLE
from raytrain.outer import OUTERS, AbstractOuter


def _part(name: str) -> type[AbstractRecipe] | type[AbstractOuter]:
    for registry in (RECIPES, OUTERS):
        with suppress(KeyError):
            return registry[name]
    known = [*RECIPES, *OUTERS]
    raise RequestError(f"{name}: expected one of {', '.join(known)}{nearest(name, known)}")


def catalogue() -> Callable[[], None]:
    """All algorithms and outer updates, a line each."""

    def show() -> None:
        for title, kinds in (("algorithm.name", RECIPES), ("outer.name", OUTERS)):
            table = Table(title=title, title_justify="left")
            for column in ("name", "rule", "cost per image"):
                table.add_column(column)
            for name in kinds:
                table.add_row(name, *_rule_and_cost(name))
            Console().print(table)

    return show


def _rule_and_cost(name: str) -> tuple[str, str]:
    try:
        card = _part(name).card
    except RequestError as error:  # a package that cannot be imported
        return escape(str(error)), ""
    return escape(card.rule), escape(card.cost)


def catalogue_json() -> dict[str, Any]:
    """The same for scripts."""
    return {name: algorithm_json(name) for name in [*RECIPES.known, *OUTERS.known]}


def algorithm(name: str) -> Callable[[], None]:
    """One algorithm: paper, rule, cost, hyperparameters and the ranges to search."""
    part, card = _part(name), algorithm_json(name)

    def show() -> None:
        console = Console()
        for key in ("name", "paper", "rule", "cost", "memory", "norms"):
            value = ", ".join(card[key]) if isinstance(card[key], list) else card[key]
            console.print(f"[bold]{key:8}[/bold] {escape(value)}", highlight=False)
        table = Table()
        for column in ("hyperparameter", "default", "range to search", "meaning"):
            table.add_column(column)
        for row in card["hyperparameters"]:
            cells = [str(row[key]) for key in ("name", "default", "range", "meaning")]
            cells[0] += " *" if row["scheduled"] else ""
            table.add_row(*map(escape, cells))
        console.print(table)
        if any(row["scheduled"] for row in card["hyperparameters"]):
            console.print("* may change over training: curriculum.NAME\n", highlight=False)
        console.print(_paragraph(part), markup=False, highlight=False)

    return show


def algorithm_json(name: str) -> dict[str, Any]:
    """The same for scripts.

    Raises:
        RequestError: if there is no such algorithm.
    """
    recipe = _part(name)
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
                "range": _range(card, field),
                "meaning": info.description or "",
                "scheduled": SCHEDULABLE in info.metadata,
            }
        )
    deeper = [path for path in card.ranges if "." in path]
    rows += [
        {
            "name": path,
            "default": "",
            "range": _range(card, path),
            "meaning": "",
            "scheduled": False,
        }
        for path in deeper
    ]
    return {
        "name": name,
        "paper": card.paper,
        "rule": card.rule,
        "cost": card.cost,
        "memory": card.memory,
        "norms": list(card.norms or THREAT_MODELS),
        "hyperparameters": rows,
    }


def _range(card: Card, field: str) -> str:
    return "; ".join(map(str, alternatives(card.ranges[field]))) if field in card.ranges else ""


def _default(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return ", ".join(f"{v}" if k in {"kind", "name"} else f"{k}={v}" for k, v in value)
    return str(value)


def _paragraph(recipe: type) -> str:
    """Its docstring, each paragraph and each list item on one line for the terminal to wrap."""
    text = "\n".join(line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).replace("**", "")
