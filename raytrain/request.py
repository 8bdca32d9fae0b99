"""From files and `key=value` words to validated records, with one sentence when something is wrong."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raytrain.config import RunConfig
from raytrain.types import RequestError

Model = TypeVar("Model", bound=BaseModel)
Configuration = RunConfig | Mapping[str, Any] | str | Path
"""A run as a record, a mapping, or the path of a YAML file."""

# Records chosen by one of their own fields, and the kind meant where it is not given: naming
# another kind begins the record anew.
_CHOSEN_BY = {
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
_NAMED = {"data": "name", "model": "name"}  # one kind of record, whose name changes nothing else


def as_run(
    config: Configuration | None, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """A validated RunConfig from any of the forms that the API takes.

    Raises:
        RequestError: naming the file or field, and what was expected.
    """
    changes = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json")
    values = read_yaml(Path(config)) if isinstance(config, str | Path) else config or {}
    return validated(RunConfig, override(values, changes))


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; no YAML tag is ever turned into an object."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{file}: no such file; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as a text file ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "not understood"
        raise RequestError(f"{file}: not valid YAML{line} ({problem})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RequestError(f"{file}: expected a mapping of fields, found {type(content).__name__}")
    return content


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as a mapping from dotted path to value, each value read as YAML."""
    parsed: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise RequestError(f"{word}: expected key=value, such as threat.eps=8/255")
        try:
            parsed[path] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RequestError(f"{path}: the value {text!r} is not valid YAML") from None
    return parsed


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the dotted paths of `changes` set.

    Choosing another kind of record (`algorithm.name=pgd` over a `dynamic` one) or another preset
    drops the fields of the old one: only what is given together with the choice belongs to it.
    """
    result = _copy(values)
    spelled = [(_spelled(path, value), value) for path, value in changes.items()]
    # Choices first and from the outside in, so that the order of the words does not matter.
    for path, value in sorted(spelled, key=lambda item: (_rank(item[0]), len(item[0]))):
        *parents, last = path
        record = result
        for parent in parents:
            inner = record.get(parent)
            if isinstance(inner, str):  # `start: uniform` stands for `start: {kind: uniform}`
                inner = {_key_of(parent): inner}
            record[parent] = inner if isinstance(inner, dict) else {}
            record = record[parent]
        choice = _choice(path)
        if choice is not None and record.get(last, choice.meant) != value:
            kept = {field: record[field] for field in choice.keeps if field in record}
            record.clear()
            record.update(kept)
        record[last] = value
    return result


def _spelled(path: str, value: Any) -> tuple[str, ...]:
    """The path in parts, a bare name given its key: `start=zero` is `start.kind=zero`."""
    parts = tuple(path.split("."))
    bare = isinstance(value, str) and (parts[-1] in _CHOSEN_BY or parts[-1] in _NAMED)
    return (*parts, _key_of(parts[-1])) if bare else parts


def _key_of(record: str) -> str:
    return _CHOSEN_BY[record][0] if record in _CHOSEN_BY else _NAMED.get(record, "name")


def _rank(path: tuple[str, ...]) -> int:
    """Kinds first, then the presets of a kind, then all that is no choice."""
    choice = _choice(path)
    return 2 if choice is None else len(choice.keeps)


class _Choice(NamedTuple):
    """A field that begins its record anew."""

    meant: str | None  # where it is not given
    keeps: tuple[str, ...] = ()  # the fields that do not belong to the choice before


def _choice(path: tuple[str, ...]) -> _Choice | None:
    if len(path) < 2 or path[-2] not in _CHOSEN_BY:
        return None
    key, kind = _CHOSEN_BY[path[-2]]
    return {key: _Choice(kind), "preset": _Choice(None, keeps=(key,))}.get(path[-1])


def validated(model: type[Model], values: Mapping[str, Any], source: str = "") -> Model:
    """`model` made of `values`.

    Raises:
        RequestError: for the first thing that is wrong: its path, what was expected, what was found.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(
            source + sentence(model, values, error), _about(error, values)
        ) from None


def sentence(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> str:
    """The first complaint of a ValidationError, for a reader who knows fields and not pydantic."""
    errors = [(*_path(one["loc"], values), one) for one in error.errors()]
    path, tags, first = errors[0]
    dotted = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{dotted}: no such field{_nearest(path, model, tags)}"
    if first["type"] == "missing":
        return f"{dotted}: missing; it has no default"
    if first["type"].startswith("union_tag"):
        return f"{dotted}: {_expected_tags(first)}"
    if first["type"] == "value_error" and not path:
        return message
    if first["type"] == "value_error":
        return f"{dotted}: {message}, found {first['input']!r}"
    # A union complains once for each of its members: 1000 or 0.1.
    wanted = dict.fromkeys(_wanted(one) for where, _, one in errors if where == path)
    return f"{dotted}: expected {' or '.join(wanted)}, found {_short(first['input'])}"


def _about(error: ValidationError, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The path of the first complaint: pydantic's, or that which the complaint itself tells."""
    first = error.errors()[0]
    path, _ = _path(first["loc"], values)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError) and cause.path:
        return (*path, *cause.path)
    told = re.match(r"([a-z_]\w*(?:\.[a-z_]\w*)*): ", str(cause))
    return (*path, *(told[1].split(".") if told and not path else ()))


def _wanted(one: Any) -> str:
    plain = {
        "int_parsing": "an integer",
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_parsing": "a number",
        "float_type": "a number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "a string",
        "path_type": "a path",
        "model_type": "a record",
        "model_attributes_type": "a record",
        "dict_type": "a record",
    }
    message = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return plain.get(one["type"]) or message[0].lower() + message[1:]


def _expected_tags(first: Any) -> str:
    context = first.get("ctx", {})
    expected = str(context.get("expected_tags", context.get("discriminator"))).replace("'", "")
    if first["type"] == "union_tag_not_found":
        return f"expected a record with the field {expected}"
    names = expected.split(", ")
    close = difflib.get_close_matches(context.get("tag", ""), names, n=1)
    hint = f"; the nearest is {close[0]}" if close else ""
    return f"expected one of {expected}, found {context.get('tag')!r}{hint}"


def _path(loc: tuple[Any, ...], values: Any) -> tuple[list[str], list[str]]:
    """The user's path of an error, and pydantic's tags for the members of unions taken on the way."""
    path: list[str] = []
    tags: list[str] = []
    here: Any = values
    for step, part in enumerate(loc):
        if isinstance(here, str):  # a bare name stands for its record
            here = {"name": here, "kind": here, "norm": here}
        if _holds(here, part):
            here = here[part]
            path.append(str(part))
        elif part == "[key]":
            continue  # the complaint is about the key, which the path ends with already
        elif step == len(loc) - 1 and _lacks(here, part):
            path.append(str(part))  # a missing field
        else:
            tags.append(str(part))
    return path, tags


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


def _nearest(path: list[str], model: type[BaseModel], tags: list[str]) -> str:
    """`; the nearest is X` among the fields that exist beside the unknown one."""
    *parents, unknown = path
    fields = fields_at(model, parents, tags)
    close = difflib.get_close_matches(unknown, fields, n=1, cutoff=0.5)
    if close:
        return f"; the nearest is {'.'.join([*parents, close[0]])}"
    return f"; expected one of {', '.join(fields)}" if fields else ""


def fields_at(model: type[BaseModel], path: Iterable[str], tags: Iterable[str]) -> list[str]:
    """Names of the fields of the record at `path`, where `tags` pick the members of unions."""
    here: Any = model
    tags = set(tags)
    for part in path:
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return []
        if part not in here.model_fields:
            return []
        members = _records(here.model_fields[part].annotation)
        chosen = [m for m in members if tags & set(_literals(m))]
        here = (chosen or members or [None])[0]
    return list(here.model_fields) if here is not None else []


def _records(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is Annotated:
        return _records(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [record for member in get_args(annotation) for record in _records(member)]
    is_record = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_record else []


def _literals(record: type[BaseModel]) -> list[Any]:
    return [
        value
        for field in record.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    ]


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _copy(value) for key, value in values.items()}
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
