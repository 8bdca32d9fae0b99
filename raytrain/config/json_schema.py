"""JSON Schema of run files: for editors and validators, and the source of `raytrain config`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import CoreRef, GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from raytrain.config.run import RunConfig
from raytrain.core.registry import OneOf, num_known

_DRAFT = "http://json-schema.org/draft-07/schema#"  # which all editors support
_ADDRESS = r"^[\w.]+:[\w.]+$"  # module:Class
_KEYWORDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
"""Bounds that pydantic leaves under its own names where a validator comes before them."""


def run_schema() -> JsonSchemaValue:
    """The JSON Schema of a run file, with the parts of installed packages."""
    return _run_schema(num_known())


@lru_cache(maxsize=2)
def _run_schema(known: int) -> JsonSchemaValue:
    del known
    schema = RunConfig.model_json_schema(schema_generator=PartsByName)
    del schema["required"]  # the radius of l-inf has a default, which depends on the data
    linf = schema["$defs"]["Linf_by_default"]
    del linf["required"]
    linf["properties"]["eps"]["description"] += "; default: customary for the data"
    return {**schema, "title": "raytrain run"}


class PartsByName(GenerateJsonSchema):
    """Pydantic's schemas, with parts chosen by name as `oneOf` with the name as its discriminator.

    A part's name may stand for its record, and so may the bare string of a `Spec`. In the record of the
    default kind the name may be left out: that kind has a definition of its own, `CLASS_by_default`.
    """

    def generate(self, schema: CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        return {"$schema": _DRAFT, **_standard(super().generate(schema, mode))}

    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        """Keep the order of the fields and of the kinds."""
        del parent_key
        return value

    def field_title_should_be_set(self, schema: Any) -> bool:
        """A field's title would be its name once more."""
        del schema
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """A record, or the string that stands for it (for its field `bare`).

        It is described by the first paragraph of its docstring.
        """
        cls: type[BaseModel] = schema["cls"]
        record = super().model_schema(schema)
        if "description" in record:
            record["description"] = " ".join(record["description"].split("\n\n")[0].split())
        bare = getattr(cls, "bare", None)
        if bare is None:
            return record
        return {"anyOf": [_without_default(record["properties"][bare]), {**record, "bare": bare}]}

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """A part of a registry; anything else as pydantic has it."""
        chosen = getattr(schema["function"]["function"], "__self__", None)
        if not isinstance(chosen, OneOf):
            return super().function_plain_schema(schema)
        registry, key = chosen.registry, chosen.key
        refs = {
            name: self._part(part, None if name == chosen.default else key)
            for name, part in registry.importable().items()
        }
        names: list[JsonSchemaValue] = [{"type": "string", "enum": list(registry)}]
        records = list(refs.values())
        if registry.group:
            address = {"type": "string", "pattern": _ADDRESS}
            names.append(address)
            others = [name for name in registry if name not in refs]
            own = {key: {"anyOf": [{"enum": others}, address]} if others else address}
            records.append({"type": "object", "properties": own, "required": [key]})
        mapping = {name: ref["$ref"] for name, ref in refs.items()}
        discriminator = {"propertyName": key, "mapping": mapping}
        return {"anyOf": [*names, {"discriminator": discriminator, "oneOf": records}]}

    def _part(self, part: type[BaseModel], key: str | None) -> JsonSchemaValue:
        """A reference to the definition of a part; the field `key` has to be there if given."""
        suffix = "by_default" if key is None else "by_name"
        core_ref = CoreRef(f"{part.__module__}.{part.__name__}_{suffix}:{id(part)}")
        name, ref = self.get_cache_defs_ref_schema(core_ref)
        if name not in self.definitions:
            self.definitions[name] = {}  # in the making: a part may hold parts of its own kind
            record = dict(
                self.resolve_ref_schema(self.generate_inner(part.__pydantic_core_schema__))
            )
            if key is not None:
                record["required"] = [key, *record.get("required", ())]
            self.definitions[name] = record
        return ref


def _without_default(field: JsonSchemaValue) -> JsonSchemaValue:
    return {key: value for key, value in field.items() if key not in ("default", "description")}


def _standard(schema: Any) -> Any:
    """The same with the keywords of draft 7."""
    if isinstance(schema, list):
        return [_standard(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    standard = {
        _KEYWORDS.get(key, key) if isinstance(value, int | float) else key: _standard(value)
        for key, value in schema.items()
    }
    first, *others = standard.pop("prefixItems", [None])
    if first is not None and all(other == first for other in others):
        standard["items"] = first
    return standard
