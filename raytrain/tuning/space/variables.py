"""A search space laid out flat: every dimension in the order it is decided, with its Optuna name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.tuning.space.base import AbstractDimension, AbstractSearched, shown
from raytrain.tuning.space.dimensions import Branch, Choice, Derived
from raytrain.tuning.space.expressions import Absent, Expression
from raytrain.tuning.space.lookup import KINDS

_VARIABLE = re.compile(r"\$[A-Za-z]\w*")


@dataclass(frozen=True)
class Variable:
    """One dimension at its place in the space."""

    path: str
    entry: AbstractDimension
    options: Mapping[str, str]  # of the branches that it lies in
    where: tuple[str, ...]  # its place in the file
    key: str = ""  # its name in Optuna

    def applies(self, chosen: Mapping[str, Any], values: Callable[[str], Any]) -> bool:
        """Whether its conditions hold for what was chosen before it."""
        if any(chosen.get(path) != option for path, option in self.options.items()):
            return False
        condition = self.entry.condition
        if condition is None:
            return all(
                path in chosen and chosen[path] in wanted
                for path, wanted in self.entry.wanted.items()
            )
        try:
            return bool(condition.value(values))
        except Absent:
            return False

    def meets(self, other: Variable) -> bool:
        """Whether no branch keeps the two apart."""
        shared = self.options.keys() & other.options.keys()
        return all(self.options[path] == other.options[path] for path in shared)

    def needs(self) -> dict[str, list[Any]]:
        """The values that earlier paths must have for it to apply, as far as they are listed."""
        return {path: [option] for path, option in self.options.items()} | self.entry.wanted

    def expressions(self) -> Iterator[tuple[str, Expression]]:
        """What is written in it as an expression, by the field it is written in."""
        if self.entry.condition is not None:
            yield "when", self.entry.condition
        if isinstance(self.entry, Derived):
            yield "derive", self.entry.formula

    def said(self) -> str:
        """Its conditions in words."""
        listed = [
            f"{path} = {' | '.join(map(shown, wanted))}" for path, wanted in self.needs().items()
        ]
        condition = self.entry.condition
        return " and ".join(listed + ([] if condition is None else [condition.text]))


def lay_out(space: Mapping[str, Any]) -> tuple[Variable, ...]:
    """All dimensions of a space in the order in which they are decided.

    Raises:
        RequestError: if one depends on what is decided after it.
    """
    variables = _with_keys(list(_flat(space, {}, ("space",))))
    for number, variable in enumerate(variables):
        _check_path(variable)
        _check_listed(variable, variables[:number])
        _check_order(variable, variables[:number], variables[number:])
    return tuple(variables)


def _flat(
    space: Mapping[str, Any], options: Mapping[str, str], where: tuple[str, ...]
) -> Iterator[Variable]:
    for path, entry in space.items():
        several = isinstance(entry, list)
        for number, one in enumerate(entry if several else [entry]):
            place = (*where, path, str(number)) if several else (*where, path)
            yield Variable(path, one, options, place)
            if isinstance(one, Branch):
                for option, inner in one.options.items():
                    inside = {**options, path: option}
                    yield from _flat(inner, inside, (*place, "branch", option))


def _with_keys(variables: list[Variable]) -> list[Variable]:
    """Names for Optuna: the path, with its condition where a path occurs several times."""
    searched = [v for v in variables if isinstance(v.entry, AbstractSearched)]
    times = Counter(v.path for v in searched)
    short = {v.where: v.path if times[v.path] == 1 else _short(v) for v in searched}
    taken: Counter[str] = Counter()
    named: list[Variable] = []
    for variable in variables:
        key = short.get(variable.where, "")
        taken[key] += 1
        if key and taken[key] > 1:
            key = f"{key} #{taken[key]}"
        named.append(replace(variable, key=key))
    return named


def _short(variable: Variable) -> str:
    words = [
        f"{path.rsplit('.', 1)[-1]}={'|'.join(map(shown, wanted))}"
        for path, wanted in variable.needs().items()
    ]
    condition = variable.entry.condition
    words += [] if condition is None else [condition.text]
    return f"{variable.path} [{', '.join(words) or 'else'}]"


def _check_path(variable: Variable) -> None:
    if variable.path.startswith("$") and not _VARIABLE.fullmatch(variable.path):
        raise _error(variable, "", "expected $ and a word, such as $reach")


def _check_listed(variable: Variable, before: Iterable[Variable]) -> None:
    """Conditions given as values are about earlier paths, and can be met."""
    for path, wanted in variable.entry.wanted.items():
        found = [other for other in before if other.path == path and other.meets(variable)]
        if not found:
            raise _error(variable, "when", f"{path} is not a path listed before it")
        options = [_options(other) for other in found]
        for value in wanted:
            if all(known is not None and value not in known for known in options):
                raise _error(variable, "when", f"{path} is never {value!r}")


def _options(variable: Variable) -> list[Any] | None:
    entry = variable.entry
    return list(entry.options) if isinstance(entry, Choice | Branch) else None


def _check_order(variable: Variable, before: list[Variable], rest: list[Variable]) -> None:
    """Expressions and multiples of eps are about what is decided by then."""
    later = [other for other in rest if other.meets(variable)]
    known = [other.path for other in before if other.meets(variable)]
    for field, expression in variable.expressions():
        for name in sorted(expression.names):
            if any(_touches(other.path, name) for other in later):
                raise _error(variable, field, f"{name} is not decided before it; list it earlier")
            if name.startswith("$") and name not in known:
                raise _error(variable, field, f"there is no {name}{nearest(name, known)}")
    if isinstance(variable.entry, AbstractSearched) and variable.entry.in_eps:
        if variable.path.split(".")[0] == "threat":
            raise _error(variable, "unit", "eps cannot be a multiple of itself")
        if any(_touches(other.path, "threat.eps") for other in later):
            raise _error(variable, "unit", "threat.eps is not decided before it; list it earlier")


def _touches(path: str, name: str) -> bool:
    """Whether deciding `path` may change the field `name`."""
    parent, _, last = path.rpartition(".")
    record = parent if parent and last in KINDS else path
    return path == name or name.startswith(f"{record}.")


def _error(variable: Variable, field: str, message: str) -> RequestError:
    at = f"space.{variable.path}.{field}" if field else f"space.{variable.path}"
    return RequestError(f"{at}: {message}", (*variable.where, *filter(None, [field])))
