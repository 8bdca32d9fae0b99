"""Configurations in few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

ALGORITHM = ("algorithm.name", "algorithm")
"""Paths that choose an algorithm."""
_KINDS = ("name", "kind", "norm")  # fields labelled by the name of their record


def describe(values: Mapping[str, Any], separator: str = " ") -> str:
    """Values by the last telling part of their path: `algorithm=trades lr=0.1 steps=4`.

    >>> describe({"algorithm.name": "trades", "optimizer.lr": 0.12345, "algorithm.steps": 4})
    'algorithm=trades lr=0.123 steps=4'
    """
    return separator.join(f"{_name(path)}={_value(value)}" for path, value in values.items())


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last telling part of every path, or the whole path where several have the same.

    >>> short_names(["algorithm.name", "optimizer.lr", "a.steps", "b.steps"]).values()
    dict_values(['algorithm', 'lr', 'a.steps', 'b.steps'])
    """
    names = {path: _name(path) for path in paths}
    counts = Counter(names.values())
    return {path: name if counts[name] == 1 else path for path, name in names.items()}


def algorithm_of(values: Mapping[str, Any]) -> str | None:
    """The algorithm among the values that a trial varies; None where all have the same."""
    return next((str(values[path]) for path in ALGORITHM if path in values), None)


def _name(path: str) -> str:
    *parents, last = path.split(".")
    return parents[-1] if last in _KINDS and parents else last


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
