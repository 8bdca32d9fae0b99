"""JSON Schema of search spaces: for editors and validators."""

from __future__ import annotations

from typing import Any

from raytrain.config.field_list import all_paths
from raytrain.config.json_schema import PartsByName, run_schema
from raytrain.tuning.space.search_space import SearchSpace


def space_schema() -> dict[str, Any]:
    """The JSON Schema of the file of a search space; its base run has that of a run file."""
    schema = SearchSpace.model_json_schema(schema_generator=PartsByName)
    run = {key: value for key, value in run_schema().items() if key not in ("$schema", "$defs")}
    del schema["required"]  # the name is that of the file
    properties = schema["properties"]
    description = properties["base"]["description"]
    properties["base"] = {"$ref": "#/$defs/RunConfig", "description": description}
    entry = properties["space"]["additionalProperties"]
    properties["space"]["properties"] = {
        path: {"description": text, "allOf": [entry]} for path, text in all_paths().items()
    }
    definitions = {**schema["$defs"], **run_schema()["$defs"], "RunConfig": run}
    return {**schema, "title": "raytrain search space", "$defs": definitions}
