"""Fields of nested records by dotted path: their types, and whether they are free text."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from raytrain.core.registry import OneOf, num_known
from raytrain.core.types import Spec

Keys = tuple[str, ...]
"""A path in nested records and lists, key by key; the key of a list item is its number."""


def types_at(model: type[BaseModel], path: Keys) -> tuple[Any, ...]:
    """Return the types of a value at `path`, members of unions listed; none if there is no such field.

    The type of a part of a registry is its `OneOf`. Its fields are those of any of the parts.
    """
    return _types_at(model, path, num_known())


@lru_cache(maxsize=4096)
def _types_at(model: type[BaseModel], path: Keys, known: int) -> tuple[Any, ...]:
    del known  # other packages' parts have fields of their own
    found: tuple[Any, ...] = (model,)
    for key in path:
        found = tuple(inner for one in found for inner in _inside(one, key))
    return found


def is_text(model: type[BaseModel], path: Keys) -> bool:
    """Whether a scalar at `path` is free text: a string or a path, or the bare name of a record whose
    name is.

    Names of a fixed list are not, nor values that may also be numbers, such as a step size.
    """
    key = name_key(model, path)
    return _all_text(types_at(model, path if key is None else (*path, key)))


def name_key(model: type[BaseModel], path: Keys) -> str | None:
    """Return the field that a bare name at `path` sets, if a record is there: `kind` for `start`."""
    found = types_at(model, path)
    chosen = next((one.key for one in found if isinstance(one, OneOf)), None)
    return chosen or next((one.bare for one in found if _is_spec(one) and one.bare), None)


def choice_at(model: type[BaseModel], path: Keys) -> OneOf | None:
    """Return the registry of the record at `path`, if it is a part."""
    return next((one for one in types_at(model, path) if isinstance(one, OneOf)), None)


def is_open(model: type[BaseModel], path: Keys) -> bool:
    """Whether a part around `path` may be of another package, with fields that are not known yet."""
    holders = (choice_at(model, path[:length]) for length in range(1, len(path)))
    return any(choice is not None and choice.registry.group for choice in holders)


def fields_at(model: type[BaseModel], path: Iterable[str], values: Any) -> list[str]:
    """List the fields of the record at `path`; `values` select the part of a registry."""
    here: Any = model
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
        found = [_chosen(one, values) for one in types_at(here, (part,)) if _is_record(one)]
        if not found:
            return []
        here = found[0]
    return list(here.model_fields)


def _chosen(record: Any, values: Any) -> type[BaseModel]:
    """Return the class of a record, or of the part selected by its values."""
    if not isinstance(record, OneOf):
        return record
    name = values.get(record.key) if isinstance(values, Mapping) else values
    known = record.registry.known
    return known.get(str(name or record.default)) or next(iter(known.values()))


def _inside(holder: Any, key: str) -> tuple[Any, ...]:
    """Return the types at `key` in a value of type `holder`."""
    origin, inner = get_origin(holder), get_args(holder)
    if holder is Any:
        return (Any,)
    if isinstance(holder, OneOf):
        return tuple(
            inner for part in holder.registry.with_field(key) for inner in _inside(part, key)
        )
    if _is_record(holder):
        fields = [one for name, one in holder.model_fields.items() if key in (name, one.alias)]
        chosen = [extra for one in fields for extra in one.metadata if isinstance(extra, OneOf)]
        return tuple(chosen) or _members(*(one.annotation for one in fields))
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
            inner, *extras = get_args(one)
            chosen = [extra for extra in extras if isinstance(extra, OneOf)]
            found += chosen or _members(inner)
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
    return isinstance(one, OneOf) or (isinstance(one, type) and issubclass(one, BaseModel))


def _is_spec(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, Spec)
