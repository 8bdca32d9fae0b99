"""Which column holds the images, which the labels, and what the classes are called."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pyarrow as pa

from raytrain.data.arrays import is_array
from raytrain.data.encoded import is_encoded
from raytrain.data.images import Location
from raytrain.types import RequestError

IMAGE_NAMES = ("image", "img", "images", "pixels")
LABEL_NAMES = ("label", "labels", "target", "fine_label", "class", "y")


def image_column(file: Path, schema: pa.Schema, asked: str | None) -> str:
    """The column asked for, or the first with a usual name, or the only one that can be one."""
    if asked is not None:
        _require(file, schema, asked, "data.image_column")
        kind = schema.field(asked).type
        if not _is_image(kind):
            raise Location(file, asked).error(
                "expected encoded images (bytes, or struct<bytes, path>) or arrays of numbers, "
                f"found {kind}"
            )
        return asked
    usable = [f.name for f in schema if _is_image(f.type) and f.name.lower() not in LABEL_NAMES]
    usual = [name for name in usable if name.lower() in IMAGE_NAMES]
    if usual or len(usable) == 1:
        return (usual or usable)[0]
    raise RequestError(
        f"{file}: expected one column of images (encoded bytes or arrays of numbers), "
        f"found {_listed(usable)} among {_listed(schema.names)}; name it with data.image_column"
    )


def label_column(file: Path, schema: pa.Schema, asked: str | None) -> str:
    """The column asked for, or the first of the usual names; it must hold integers."""
    if asked is not None:
        _require(file, schema, asked, "data.label_column")
    present = [name for name in LABEL_NAMES if name in schema.names]
    if asked is None and not present:
        raise RequestError(
            f"{file}: expected a column of labels called {', '.join(LABEL_NAMES)}, "
            f"found {_listed(schema.names)}; name it with data.label_column"
        )
    name = asked if asked is not None else present[0]
    kind = schema.field(name).type
    if not pa.types.is_integer(kind):
        raise Location(file, name).error(f"expected an integer column of labels, found {kind}")
    return name


def class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names in the Hugging Face `features` record of the schema, if there is one."""
    try:
        record = json.loads((schema.metadata or {})[b"huggingface"])
        feature = record["info"]["features"][label]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not names:
        return None
    return tuple(str(name) for name in names)


def _is_image(kind: pa.DataType) -> bool:
    return is_encoded(kind) or is_array(kind)


def _require(file: Path, schema: pa.Schema, name: str, field: str) -> None:
    if name in schema.names:
        return
    nearest = difflib.get_close_matches(name, schema.names, n=1, cutoff=0)
    hint = f"; the nearest name is '{nearest[0]}'" if nearest else ""
    raise RequestError(
        f"{field}: expected a column '{name}' in {file}, found {_listed(schema.names)}{hint}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
