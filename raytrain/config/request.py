"""Conversion of files and `key=value` words to validated records, with one-sentence errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from raytrain.config.documents import read_file, read_value
from raytrain.config.fields import (
    Keys,
    choice_at,
    is_open,
    is_text,
    name_key,
    types_at,
)
from raytrain.config.run import RunConfig
from raytrain.config.unknown_field import no_such_field
from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest

Model = TypeVar("Model", bound=BaseModel)
Configuration = RunConfig | Mapping[str, Any] | str | Path
"""A run as a record, a mapping, or the path of a YAML file."""
Overrides = Iterable[str] | Mapping[str, Any]
"""Changes as `key=value` words, or as a mapping from dotted path to value."""


def as_run(config: Configuration | None, overrides: Overrides = ()) -> RunConfig:
    """Return a validated RunConfig from any of the forms that the API accepts.

    Raises:
        RequestError: naming the file or field, and what was expected.

    >>> as_run({"algorithm": "dynamic"}, ["algorithm.c_max=0.3", "threat.eps=8/255"]).algorithm.c_max
    0.3
    >>> as_run(None, ["epoch=3"])
    Traceback (most recent call last):
    raytrain.core.errors.RequestError: epoch: ...
    """
    changes = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json")
    values = read_yaml(Path(config)) if isinstance(config, str | Path) else config or {}
    return validated(RunConfig, override(values, changes))


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the fields of a run file; text fields are literal, without YAML's types.

    Raises:
        RequestError: naming file and line, if it is no YAML mapping or has a key twice.
    """
    return read_file(file, partial(is_text, RunConfig)).values


def parse_overrides(words: Iterable[str], model: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """Parse `key=value` words to a mapping from dotted path to value.

    Raises:
        RequestError: naming the word or its key.

    >>> parse_overrides(["epochs=3", "run_name=007", "ema=null"])
    {'epochs': 3, 'run_name': '007', 'ema': None}
    """
    parsed: dict[str, Any] = {}
    for word in [words] if isinstance(words, str) else words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise RequestError(f"{word}: expected key=value, such as threat.eps=8/255")
        value = value_of(path, text, model)
        if _differ(parsed.setdefault(path, value), value):
            raise _contradiction(path, parsed[path], path, value)
    return parsed


def with_keywords(changes: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Add keyword arguments to changes by dotted path.

    Raises:
        RequestError: if a path is given in both, with two values.

    >>> with_keywords({"optimizer.lr": 0.1}, {"epochs": 3})
    {'optimizer.lr': 0.1, 'epochs': 3}
    """
    both = dict(changes)
    for path, value in keywords.items():
        if _differ(both.setdefault(path, value), value):
            raise _contradiction(path, both[path], path, value)
    return both


def value_of(path: str, text: str, model: type[BaseModel] = RunConfig) -> Any:
    """Parse the value of a word for a field of `model`.

    Free text is literal, and so is the value of an unknown field (which validation refuses); anything
    else is YAML. An empty value is None, and so is `null` for an optional text. A record that has a
    bare name accepts YAML in braces as well.

    Raises:
        RequestError: if it is not valid YAML, or not text.
    """
    keys = tuple(path.split("."))
    found = types_at(model, keys)
    if not text or (text == "null" and type(None) in found):
        return None
    record = name_key(model, keys) is not None and re.fullmatch(r"\s*\{.*\}\s*", text, re.DOTALL)
    if not (found or is_open(model, keys)) or (is_text(model, keys) and not record):
        return _encodable(path, text)
    return read_value(text, partial(is_text, model), keys)


def _encodable(path: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{path}: expected text in UTF-8, found {text!r}") from None
    return text


def override(
    values: Mapping[str, Any], changes: Mapping[str, Any], model: type[BaseModel] = RunConfig
) -> dict[str, Any]:
    """Return `values` of `model` with the dotted paths of `changes` set.

    Another kind of record (`algorithm.name=pgd` over a `dynamic` one) or another preset drops the
    fields of the old one: the record then has only fields of `changes`.

    Raises:
        RequestError: if two changes contradict each other.
    """
    result = _copy(values)
    # Outer fields first, choices before others, so that the order of the words does not matter.
    flat = _flat(changes, model)
    ranks = {path: _rank(model, path) for path in flat}
    for path, value in sorted(flat.items(), key=lambda item: (len(item[0]), ranks[item[0]])):
        *parents, last = path
        record = result
        for depth, parent in enumerate(parents, start=1):
            inner = record.get(parent)
            if isinstance(inner, str):  # `start: uniform` stands for `start: {kind: uniform}`
                inner = {name_key(model, path[:depth]) or "name": inner}
            record[parent] = inner if isinstance(inner, dict) else {}
            record = record[parent]
        choice = _choice(model, path)
        if choice is not None and record.get(last, choice.meant) != value:
            preserved = {field: record[field] for field in choice.keeps if field in record}
            record.clear()
            record.update(preserved)
        record[last] = _copy(value)
    return result


def _flat(changes: Mapping[str, Any], model: type[BaseModel]) -> dict[Keys, Any]:
    """Flatten the changes to fields: a bare name to its key, a record to an empty one and its fields."""
    flat: dict[Keys, Any] = {}
    source: dict[Keys, tuple[str, Any]] = {}
    for path, given in changes.items():
        for keys, value in _fields(tuple(path.split(".")), given, model):
            if _differ(flat.setdefault(keys, value), value):
                raise _contradiction(*source[keys], path, given)
            source.setdefault(keys, (path, given))
    for keys in flat:
        for holder in (keys[:length] for length in range(1, len(keys))):
            if flat.get(holder, {}) != {}:
                raise _contradiction(*source[holder], *source[keys])
    return flat


def _fields(path: Keys, value: Any, model: type[BaseModel]) -> Iterator[tuple[Keys, Any]]:
    """Yield the fields of a change; a bare name sets its key: `start=zero` is `start.kind=zero`."""
    if isinstance(value, Mapping):
        yield path, {}
        for key, inner in value.items():
            yield from _fields((*path, str(key)), inner, model)
        return
    key = name_key(model, path) if isinstance(value, str) else None
    yield path if key is None else (*path, key), value


def _differ(one: Any, other: Any) -> bool:
    return one is not other and one != other  # a NaN is not equal to itself


def _contradiction(one: str, value: Any, other: str, another: Any) -> RequestError:
    also = "" if one == other else f"{other} "
    said = f"{one}: given as {_short(value)} and {also}as {_short(another)}; expected one value"
    return RequestError(said, tuple(one.split(".")))


def _rank(model: type[BaseModel], path: Keys) -> int:
    """Return the order of a change: kinds first, then presets, then other fields."""
    choice = _choice(model, path)
    return 2 if choice is None else len(choice.keeps)


class _Choice(NamedTuple):
    """A field whose change resets its record."""

    meant: str | None  # the default
    keeps: Keys = ()  # fields that are not reset


def _choice(model: type[BaseModel], path: Keys) -> _Choice | None:
    choice = choice_at(model, path[:-1])
    if choice is None:
        return None
    key = choice.key
    return {key: _Choice(choice.default), "preset": _Choice(None, keeps=(key,))}.get(path[-1])


def validated(model: type[Model], values: Mapping[str, Any]) -> Model:
    """`model` made of `values`.

    Raises:
        RequestError: for the first error: its path, the expected and the found value.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(sentence(model, values, error), _about(error, values)) from None


def sentence(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> str:
    """Return the first error of a ValidationError as a sentence in terms of fields."""
    errors = [(_path(one["loc"], values), one) for one in error.errors()]
    path, first = errors[0]
    dotted = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{dotted}: {no_such_field(model, tuple(path), values, first['input'])}"
    if first["type"] == "missing":
        return f"{dotted}: missing; it has no default"
    if first["type"].startswith("union_tag"):
        return f"{dotted}: {_expected_tags(first)}"
    if first["type"] == "part":
        return f"{dotted}.{message}"
    if first["type"] == "value_error" and not path:
        return message
    if first["type"] == "value_error":
        return f"{dotted}: {message}, found {first['input']!r}"
    # A union has an error for each of its members: 1000 or 0.1.
    about = [one for where, one in errors if where == path]
    expected = dict.fromkeys(map(_expected, about))
    found, names = first["input"], [name for one in about for name in _names(one)]
    hint = nearest(found, names) if isinstance(found, str) else ""
    return f"{dotted}: expected {' or '.join(expected)}, found {_short(found)}{hint}"


def _about(error: ValidationError, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the path of the first error: pydantic's, or the one in the message."""
    first = error.errors()[0]
    path = _path(first["loc"], values)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError) and cause.path:
        return (*path, *cause.path)
    path_in_message = re.match(r"([a-z_]\w*(?:\.[a-z_]\w*)*): ", str(cause))
    return (*path, *(path_in_message[1].split(".") if path_in_message and not path else ()))


def _expected(one: Any) -> str:
    plain = {
        "int_parsing": "an integer",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_parsing": "a number",
        "float_type": "a number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "a string",
        "string_too_short": "a string that is not empty",
        "path_type": "a path",
        "model_type": "a record",
        "model_attributes_type": "a record",
        "dict_type": "a record",
    }
    message = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return plain.get(one["type"]) or message[0].lower() + message[1:]


def _names(one: Any) -> list[str]:
    """The names that a field with a fixed list of them may have."""
    listed = one.get("ctx", {}).get("expected", "") if one["type"] == "literal_error" else ""
    return re.findall(r"'([^']*)'", listed)


def _expected_tags(first: Any) -> str:
    context = first.get("ctx", {})
    expected = str(context.get("expected_tags", context.get("discriminator"))).replace("'", "")
    if first["type"] == "union_tag_not_found":
        return f"expected a record with the field {expected}"
    names = expected.split(", ")
    tag = str(context.get("tag", ""))
    return f"expected one of {expected}, found {tag!r}{nearest(tag, names)}"


def _path(loc: tuple[Any, ...], values: Any) -> list[str]:
    """Return the user's path of an error, without pydantic's tags for members of unions."""
    path: list[str] = []
    here: Any = values
    for step, part in enumerate(loc):
        if isinstance(here, str):  # a bare name in place of its record
            here = {"name": here, "kind": here, "norm": here}
        if _holds(here, part):
            here = here[part]
            path.append(str(part))
        elif part == "[key]":
            continue  # the error is about the key, with which the path ends already
        elif step == len(loc) - 1 and _lacks(here, part):
            path.append(str(part))  # a missing field
    return path


def _holds(here: Any, part: Any) -> bool:
    if isinstance(here, Mapping):
        return part in here
    return isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)


def _lacks(here: Any, part: Any) -> bool:
    if isinstance(here, Mapping):
        return not _is_tag(part, here)
    return isinstance(here, list | tuple) and isinstance(part, int)


def _is_tag(part: Any, here: Mapping[str, Any]) -> bool:
    in_braces = str(part).startswith("{")  # {Real}: a dimension of a search space
    return in_braces or part in {here.get("name"), here.get("kind"), here.get("norm")}


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _copy(value) for key, value in values.items()}
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
