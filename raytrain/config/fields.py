"""The fields of nested records by dotted path: what type one has, and whether it holds free text."""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Keys = tuple[str, ...]
"""A place in nested records and lists, key by key; an item of a list goes by its number."""

CHOSEN_BY = {
    "algorithm": ("name", "pgd"),
    "objective": ("name", "cross_entropy"),
    "outer": ("name", "sgd"),
    "threat": ("norm", "linf"),
    "decay": ("kind", "power"),
    "schedule": ("kind", "onecycle"),
    "start": ("kind", "uniform"),
    "stop": ("kind", "never"),
    "then": ("name", "sgd"),
}
"""Records chosen by one of their own fields, and the kind meant where it is not given: naming another
kind begins the record anew."""

_KEYS = {record: key for record, (key, _) in CHOSEN_BY.items()}
_KEYS |= {"data": "name", "model": "name"}  # of one kind, whose name changes nothing else


@lru_cache(maxsize=4096)
def types_at(model: type[BaseModel], path: Keys) -> tuple[Any, ...]:
    """Every type that a value at `path` may have, unions taken apart; none if there is no such field.

    Where a union leads to several records, a field counts that any of them has.
    """
    found: tuple[Any, ...] = (model,)
    for key in path:
        found = tuple(inner for one in found for inner in _inside(one, key))
    return found


def is_text(model: type[BaseModel], path: Keys) -> bool:
    """Whether a scalar at `path` is free text: a string or a path, or the bare name of a record whose
    name is.

    Names of a fixed list are not, nor what may be a number as well, such as a step size.
    """
    key = name_key(model, path)
    return _all_text(types_at(model, path if key is None else (*path, key)))


def name_key(model: type[BaseModel], path: Keys) -> str | None:
    """The field that a bare name at `path` stands for, if a record is there: `start` has its `kind`."""
    key = _KEYS.get(path[-1]) if path else None
    if key is None or not any(_is_record(one) for one in types_at(model, path)):
        return None
    return key if types_at(model, (*path, key)) else None


def key_of(record: str) -> str:
    """The field that says which one a record is."""
    return _KEYS.get(record, "name")


def fields_at(model: type[BaseModel], path: Iterable[str], tags: Iterable[str]) -> list[str]:
    """Names of the fields of the record at `path`, where `tags` pick the members of unions."""
    here: Any = model
    tags = set(tags)
    for part in path:
        if part not in here.model_fields:
            return []
        members = [one for one in types_at(here, (part,)) if _is_record(one)]
        if not members:
            return []
        chosen = [one for one in members if tags & set(_literals(one))]
        here = (chosen or members)[0]
    return list(here.model_fields)


def _inside(holder: Any, key: str) -> tuple[Any, ...]:
    """The types of what a value of type `holder` has at `key`."""
    origin, inner = get_origin(holder), get_args(holder)
    if holder is Any:
        return (Any,)
    if _is_record(holder):
        fields = holder.model_fields.items()
        return _members(*(one.annotation for name, one in fields if key in (name, one.alias)))
    if origin is dict:
        return _members(inner[1])
    if origin in (list, tuple):
        items = _members(*(one for one in inner if one is not ...))
        # A list of one may be written without its brackets.
        return items if key.isdigit() else tuple(x for one in items for x in _inside(one, key))
    return ()


def _members(*annotations: Any) -> tuple[Any, ...]:
    found: list[Any] = []
    for one in annotations:
        if get_origin(one) is Annotated:
            found += _members(get_args(one)[0])
        elif get_origin(one) in (Union, types.UnionType):
            found += _members(*get_args(one))
        else:
            found.append(one)
    return tuple(found)


def _all_text(found: tuple[Any, ...]) -> bool:
    """Strings and paths, where some may be names of a fixed list, or nothing."""
    others = [one for one in found if one is not type(None) and not _is_name(one)]
    return bool(others) and all(one in (str, Path) for one in others)


def _is_name(one: Any) -> bool:
    return get_origin(one) is Literal and all(isinstance(name, str) for name in get_args(one))


def _is_record(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, BaseModel)


def _literals(record: type[BaseModel]) -> list[Any]:
    return [
        value
        for field in record.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    ]
