"""What a refusal of an unknown field proposes: a kind that has it, where it is, the nearest name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from pydantic import BaseModel

from raytrain.config.fields import Keys, fields_at, types_at
from raytrain.config.values import shown
from raytrain.core.nearest import near
from raytrain.core.registry import OneOf

_MOST = 4  # proposed paths
_SURE = 0.75  # similarity from which a name of another record is proposed
_SELECTORS = ("name", "kind")  # fields of too many records to be a proposal


_Choice = tuple[str, str, str]
"""The path of a part, its kind in the run, and the kind that is needed."""


@dataclass(frozen=True)
class _Place:
    """A field of this name, and the kinds of parts to be chosen, from outside inwards, to have it."""

    path: Keys
    choices: tuple[_Choice, ...]

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def no_such_field(
    model: type[BaseModel], path: Keys, values: Mapping[str, Any], value: Any = None
) -> str:
    """Return the sentence that refuses the field at `path` of `model`, after the path and its colon.

    `values` choose the parts that the other fields are of. It is, of those that apply, the first of: the
    kinds that have this field (`value` completes their command), the paths of fields of the same name, the
    nearest field of the record around it or of the others, and all fields of that record.
    """
    *parents, last = path
    if parents and not types_at(model, tuple(parents)):
        return no_such_field(model, tuple(parents), values)
    every = list(_places(model, values))
    named = [one for one in every if one.path[-1] == last]
    here = [one for one in named if one.path == path and one.choices]
    if here:
        return f"no such field{_kinds(here, value)}"
    if named:
        return f"no such field; expected {_listed(named)}"
    fields = fields_at(model, parents, values)
    if not fields:  # below a plain value
        return f"no such field; the nearest is {'.'.join(parents)}"
    close = near(last, fields)
    if not close or not near(last, close, cutoff=_SURE):
        others = near(last, (one.path[-1] for one in every), cutoff=_SURE)
        if others:
            similar = [one for one in every if one.path[-1] in others]
            return f"no such field; the nearest is {_listed(similar)}"
    if close:
        return f"no such field; the nearest is {'.'.join([*parents, *close])}"
    return f"no such field; expected one of {', '.join(fields)}"


def elsewhere(
    model: type[BaseModel], name: str, values: Mapping[str, Any], roots: Collection[str]
) -> str:
    """Return `; expected PATH` with the fields of this name below `roots`; empty if there is none."""
    every = _places(model, values)
    places = [one for one in every if one.path[-1] == name and one.path[0] in roots]
    return f"; expected {_listed(places)}" if places else ""


def _kinds(places: list[_Place], value: Any) -> str:
    """` of algorithm pgd; trades and mart have it: algorithm=trades algorithm.beta=6`."""
    first = places[0]
    holder, present, _ = first.choices[0]
    kinds = list(dict.fromkeys(one.choices[0][2] for one in places if one.choices[0][0] == holder))
    words = [f"{part}={kind}" for part, _, kind in first.choices]
    if value is not None and not isinstance(value, Mapping):
        words.append(f"{first.dotted}={quote(shown(value))}")
    have = "has" if len(kinds) == 1 else "have"
    return f" of {holder} {present}; {_joined(kinds, 'and')} {have} it: {' '.join(words)}"


def _listed(places: list[_Place]) -> str:
    """`evaluation.steps or algorithm.steps`: the paths that need the fewest other choices."""
    fewest = min(len(one.choices) for one in places)
    words: dict[str, list[str]] = {}
    for one in places:
        if len(one.choices) == fewest:
            needed = " ".join(f"{part}={kind}" for part, _, kind in one.choices)
            words.setdefault(one.dotted, []).append(needed)
    said = [
        f"{path} with {_joined(needed, 'or')}" if fewest else path
        for path, needed in words.items()
    ]
    more = len(said) - _MOST
    return _joined(said[:_MOST], "or") if more <= 0 else f"{', '.join(said[:_MOST])}, ..."


def _joined(words: list[str], last: str) -> str:
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


def _places(
    record: type[BaseModel],
    values: Any,
    path: Keys = (),
    choices: tuple[_Choice, ...] = (),
    around: tuple[type[BaseModel], ...] = (),
) -> Iterator[_Place]:
    """The fields of a record, and of records of every kind below it."""
    around = (*around, record)
    for field in record.model_fields:
        inner = values.get(field) if isinstance(values, Mapping) else None
        place = (*path, field)
        if field not in _SELECTORS:
            yield _Place(place, choices)
        for kind in types_at(record, (field,)):
            if isinstance(kind, OneOf):
                yield from _places_of_part(kind, inner, place, choices, around)
            elif _is_record(kind) and kind not in around:
                yield from _places(kind, inner, place, choices, around)


def _places_of_part(
    part: OneOf,
    values: Any,
    path: Keys,
    choices: tuple[_Choice, ...],
    around: tuple[type[BaseModel], ...],
) -> Iterator[_Place]:
    given = values.get(part.key) if isinstance(values, Mapping) else values
    present = given if isinstance(given, str) else str(part.default or "none")
    for kind, record in part.registry.importable().items():
        if record not in around:
            needed = () if kind == present else ((".".join(path), present, kind),)
            inner = values if kind == present else None
            yield from _places(record, inner, path, choices + needed, around)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
