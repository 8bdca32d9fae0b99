"""Description of a part: source, rule, cost, and the ranges in which to search its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """An interval of a hyperparameter that is worth searching, ends included.

    `unit="eps"` means multiples of the threat's radius. `when` holds the values of other fields of the
    part, one or a tuple of them, with which the hyperparameter matters.
    """

    low: int | float
    high: int | float
    log: bool = False
    unit: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        whole = isinstance(self.low, int) and isinstance(self.high, int) and not self.log
        text = f"{self.low}..{self.high}" if whole else f"[{self.low:g}, {self.high:g}]"
        if self.unit:
            text = f"eps * {text}" if self.unit == "eps" else f"{text} {self.unit}"
        return text + (", log" if self.log else "") + _remarks(self.when, self.note)


@dataclass(frozen=True)
class Options:
    """The values of a hyperparameter that are worth trying; `when` as for `Range`."""

    values: tuple[Any, ...]
    when: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return _either(self.values) + _remarks(self.when, self.note)


Searched = Range | Options | tuple[Range, ...]
"""Where to search a hyperparameter; several ranges where it is in several units."""


@dataclass(frozen=True)
class Card:
    """Text that `raytrain algorithms NAME` prints beside the hyperparameters."""

    paper: str
    rule: str
    cost: str  # per image and weight update, in forward-equivalents
    memory: str = "none"  # state per training image
    norms: tuple[str, ...] | None = None  # of threat models; None: all
    ranges: Mapping[str, Searched] = field(default_factory=dict)  # by field, dotted inside records


def alternatives(searched: Searched) -> tuple[Range | Options, ...]:
    """The ranges of a hyperparameter, one for each unit."""
    return searched if isinstance(searched, tuple) else (searched,)


def _remarks(when: Mapping[str, Any], note: str) -> str:
    conditions = [
        f"{name}={_either(value) if isinstance(value, tuple) else _shown(value)}"
        for name, value in when.items()
    ]
    remarks = "; ".join([*conditions, note] if note else conditions)
    return f" ({remarks})" if remarks else ""


def _either(values: tuple[Any, ...]) -> str:
    return " | ".join(map(_shown, values))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
