"""The fields of a run as a list, read from its JSON Schema: path, type, range, default, description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ValidationError

from raytrain.config.json_schema import run_schema
from raytrain.config.request import override, sentence
from raytrain.config.run import RunConfig
from raytrain.config.unknown_field import no_such_field
from raytrain.config.values import fraction_text, shown
from raytrain.core.errors import RequestError

ANY_NAME = "NAME"
"""The key of a record in a mapping that has none yet: `curriculum.NAME.start`."""

Schema = Mapping[str, Any]
Values = Mapping[str, Any]

_MISSING = object()
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "bool"}
_NOT_JSON = ("path", "values")


@dataclass(frozen=True)
class RunField:
    """A field of a run: a value, or a record, whose fields follow it.

    The value and the default of a record that is chosen by name are the name; of any other the record.
    """

    path: str
    type: str  # such as `int`, `float or eps/4`; of a record `record`
    range: str  # such as `>= 0, < 1`; empty without bounds
    choices: list[Any]  # its names; where `type` is not empty, others too
    values: str  # all of these, for a reader
    default: Any
    required: bool  # there is no default
    value: Any  # in the run: the default, unless another was given
    description: str
    record: bool
    selects: bool  # the name that chooses the record around it
    there: bool  # false within a record that the run does not have, such as `early_stop`

    @property
    def changed(self) -> bool:
        """Whether the value is not the default; of a record, whether it is of another kind, or null."""
        if not self.there or (self.record and isinstance(self.value, dict)):
            return False
        return self.required or self.value != self.default

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_JSON}

    def shown(self, value: Any) -> str:
        """A value of this field for a reader: `8/255` where the field takes fractions."""
        fractions = "/" in self.type
        return fraction_text(value) if fractions and isinstance(value, float) else shown(value)


def fields_of(run: RunConfig) -> list[RunField]:
    """The fields of a run, with its values."""
    return _listed(run.model_dump(mode="json"), _defaults(run))


def fields_with(values: Values) -> list[RunField]:
    """The fields of the run with these values, which may lack fields that are required.

    Raises:
        RequestError: as for a run, unless fields are missing.
    """
    try:
        return fields_of(RunConfig.model_validate(values))
    except ValidationError as error:
        if any(one["type"] != "missing" for one in error.errors()):
            raise RequestError(sentence(RunConfig, values, error)) from None
    return _listed(values, RunConfig.model_validate({}).model_dump(mode="json"))


def below(fields: Iterable[RunField], path: str) -> list[RunField]:
    """The field at `path` and all below it.

    Raises:
        RequestError: if there is none, with what `no_such_field` proposes.
    """
    fields, keys = list(fields), path.split(".")
    if found := [one for one in fields if _is_below(one.path.split("."), keys)]:
        return found
    chosen = override({}, {one.path: one.value for one in fields if one.selects and one.there})
    said = no_such_field(RunConfig, tuple(keys), chosen)
    raise RequestError(f"{path}: {said}")


def _is_below(keys: list[str], path: list[str]) -> bool:
    return len(keys) >= len(path) and all(
        key in (wanted, ANY_NAME) for key, wanted in zip(keys, path, strict=False)
    )


def all_paths() -> dict[str, str]:
    """The path of every field of every kind of record, with its description."""
    paths = dict(_paths(run_schema(), (), ()))
    return {path: text or paths.get(path.rpartition(".")[0], "") for path, text in paths.items()}


def _defaults(run: RunConfig) -> dict[str, Any]:
    """The fields of the run that chooses the same data, network and parts, and is otherwise the default."""
    given = run.model_dump(mode="json")
    chosen = {name: {"name": given[name]["name"]} for name in ("data", "model")}
    for name, key in (("threat", "norm"), ("algorithm", "name"), ("outer", "name")):
        part = {key: given[name][key], "preset": given[name].get("preset")}
        chosen[name] = {field: value for field, value in part.items() if value is not None}
    try:
        values = RunConfig.model_validate(chosen).model_dump(mode="json")
    except ValidationError as error:
        lacking = {str(one["loc"][0]) for one in error.errors() if one["type"] == "missing"}
        chosen |= {name: given[name] for name in lacking}
        values = _dumped(chosen) or _dumped({"data": chosen["data"]}) or {}
        values = {name: value for name, value in values.items() if name not in lacking}
    usual = RunConfig.model_validate({})
    values["data"]["name"], values["model"]["name"] = usual.data.name, usual.model.name
    if "preset" in values.get("algorithm", ()):
        values["algorithm"]["preset"] = None
    return values


def _dumped(values: Values) -> dict[str, Any] | None:
    try:
        return RunConfig.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return None


def _listed(values: Values, defaults: Values) -> list[RunField]:
    return list(_of_record(run_schema(), values, defaults, (), True))


def _of_record(
    record: Schema, values: Values, defaults: Values, path: tuple[str, ...], there: bool
) -> Iterator[RunField]:
    for name, schema in record["properties"].items():
        default = defaults.get(name, schema.get("default", _MISSING))
        yield from _of_field(schema, values.get(name, default), default, (*path, name), there)


def _of_field(
    schema: Schema, value: Any, default: Any, path: tuple[str, ...], there: bool
) -> Iterator[RunField]:
    """The field with this schema, and the fields below it."""
    variants = _variants(schema)
    part = _first(variants, "discriminator")
    record = _first(variants, "properties")
    items = next((v["additionalProperties"] for v in variants if _maps(v)), None)
    if part is not None:
        yield from _of_part(schema, part, value, default, path, there)
        return
    bare = None if record is None else record.get("bare")
    this, usual = (
        one.get(bare) if bare and isinstance(one, Mapping) else one for one in (value, default)
    )
    holder = _field(schema, path, this, usual, there, record=bool(record or items))
    yield holder
    inner = value if isinstance(value, Mapping) else {}
    if record is not None:
        defaults = default if isinstance(default, Mapping) else {}
        is_null = value is not _MISSING and not isinstance(value, Mapping)
        fields = _of_record(record, inner, defaults, path, there and not is_null)
        yield from _named(holder, None if is_null else bare, fields)
    elif items is not None:
        for name, one in (inner or {ANY_NAME: {}}).items():
            yield from _of_field(items, one, {}, (*path, name), there and bool(inner))


def _of_part(
    schema: Schema,
    part: Schema,
    value: Any,
    default: Any,
    path: tuple[str, ...],
    there: bool,
) -> Iterator[RunField]:
    """A record that is chosen by name, and its fields."""
    key = part["discriminator"]["propertyName"]
    kinds = part["discriminator"]["mapping"]
    usual = next(
        (kind for kind, ref in kinds.items() if key not in _at(ref).get("required", ())), None
    )
    top = schema.get("default", {key: usual}) if len(path) == 1 else default
    kind, default_kind = (
        one.get(key, usual) if isinstance(one, Mapping) else one for one in (value, top)
    )
    holder = _field(schema, path, kind, default_kind, there, record=True)
    yield holder
    if kind not in kinds:  # null, or missing
        return
    inner = value if isinstance(value, Mapping) else {}
    same = isinstance(default, Mapping) and default.get(key, usual) == kind
    record = _at(kinds[kind])
    defaults = default if same else {}
    yield from _named(holder, key, _of_record(record, inner, defaults, path, there))


def _named(holder: RunField, key: str | None, fields: Iterable[RunField]) -> Iterator[RunField]:
    """The fields of a record, that of its name being what `holder` is."""
    for field in fields:
        if key is not None and field.path == f"{holder.path}.{key}":
            yield replace(holder, path=field.path, record=False, selects=True)
        else:
            yield field


def _field(
    schema: Schema,
    path: tuple[str, ...],
    value: Any,
    default: Any,
    there: bool,
    record: bool,
) -> RunField:
    variants = _variants(schema)
    choices = list(dict.fromkeys(name for one in variants for name in _names(one)))
    types: dict[
        str, str
    ] = {}  # with their bounds; those of a type that is also unbounded are none
    for named, bounds in map(_type, variants):
        if named:
            types[named] = bounds if types.get(named, bounds) == bounds else ""
    if choices or set(types) - {"record", "null"}:
        types.pop("record", None)
    names = [*map(shown, choices), *(f"{name} {types[name]}".strip() for name in types)]
    required = default is _MISSING
    return RunField(
        path=".".join(path),
        type=" or ".join(types),
        range=", ".join(filter(None, types.values())),
        choices=choices,
        values=(" | " if choices else " or ").join(names),
        default=None if required else default,
        required=required,
        value=None if value is _MISSING else value,
        description=schema.get("description", ""),
        record=record,
        selects=False,
        there=there,
    )


def _type(variant: Schema) -> tuple[str, str]:
    """Type and range of one of the alternatives; nothing for names."""
    kind = variant.get("type", "")
    if _names(variant) or "discriminator" in variant:
        return "", ""
    if kind == "array":
        inner, bounds = _type(_variants(variant.get("items", {}))[0])
        return f"list of {inner}", bounds
    if kind == "object":
        return "mapping" if "properties" not in variant else "record", ""
    if kind == "string" and "pattern" in variant:
        return next(iter(variant.get("examples", ["module:Class"])), ""), ""
    bounds = [f"{sign} {variant[word]}" for word, sign in _BOUNDS.items() if word in variant]
    return variant.get("format", _TYPES.get(kind, kind)), ", ".join(bounds)


def _names(variant: Schema) -> list[Any]:
    if "const" in variant:
        return [variant["const"]]
    known = variant.get("examples", []) if "pattern" not in variant else []
    return [*variant.get("enum", known)]


def _variants(schema: Schema) -> list[Schema]:
    """The alternatives of a field, bounds of all of them included in each that is a number."""
    schema = _resolved(schema)
    if "anyOf" not in schema:
        return [schema]
    bounds = {word: schema[word] for word in _BOUNDS if word in schema}
    inner = [variant for one in schema["anyOf"] for variant in _variants(one)]
    return [
        {**bounds, **one} if one.get("type") in ("integer", "number") else one for one in inner
    ]


def _resolved(schema: Schema) -> Schema:
    return _at(schema["$ref"]) if "$ref" in schema else schema


def _at(ref: str) -> Schema:
    return run_schema()["$defs"][ref.removeprefix("#/$defs/")]


def _first(variants: Iterable[Schema], word: str) -> Schema | None:
    return next((one for one in variants if word in one), None)


def _maps(variant: Schema) -> bool:
    """Whether it is a mapping from names to records."""
    return isinstance(variant.get("additionalProperties"), Mapping)


def _inner_records(schema: Schema) -> Iterator[tuple[str | None, Schema]]:
    """The records that a field may hold, by the name that chooses them."""
    for variant in _variants(schema):
        if "discriminator" in variant:
            refs = variant["discriminator"]["mapping"]
            yield from ((kind, _at(ref)) for kind, ref in refs.items())
        elif "properties" in variant:
            yield None, variant


def _paths(
    record: Schema, path: tuple[str, ...], around: tuple[Schema, ...]
) -> Iterator[tuple[str, str]]:
    """Paths and descriptions below a record; those of a record within its own kind once."""
    for name, schema in record["properties"].items():
        yield ".".join((*path, name)), schema.get("description", "")
        for _, inner in _inner_records(schema):
            if not any(inner is one for one in around):
                yield from _paths(inner, (*path, name), (*around, inner))
