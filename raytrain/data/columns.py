"""Selection of the image and label columns of a Parquet file, and the class names in its metadata.

All files of a data set, training and test images alike, have the columns of its first file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.data.arrays import is_array
from raytrain.data.encoded import is_encoded
from raytrain.data.images import Location, Origin

IMAGE_NAMES = ("image", "img", "images", "pixels")
LABEL_NAMES = ("label", "labels", "target", "fine_label", "class", "y")


def image_column(
    file: Path, schema: pa.Schema, column: str | None, first: Origin | None = None
) -> str:
    """Return `column`, or that of the first file, the first of a usual name, or the only one."""
    name = _given(file, schema, column, "image", first)
    if name is not None:
        kind = schema.field(name).type
        if not _is_image(kind):
            raise Location(file, name).error(
                "expected encoded images (bytes, or struct<bytes, path>) or arrays of numbers, "
                f"found {kind}"
            )
        return name
    usable = [f.name for f in schema if _is_image(f.type) and f.name.lower() not in LABEL_NAMES]
    usual = [name for name in usable if name.lower() in IMAGE_NAMES]
    if usual or len(usable) == 1:
        return (usual or usable)[0]
    raise RequestError(
        f"{file}: expected one column of images (encoded bytes or arrays of numbers), "
        f"found {_listed(usable)} among {_listed(schema.names)}; call it 'image', or name it with "
        "data.image_column"
    )


def label_column(
    file: Path, schema: pa.Schema, column: str | None, first: Origin | None = None
) -> str:
    """Return `column`, or that of the first file, or the first of a usual name; it must be of integers."""
    name = _given(file, schema, column, "label", first)
    if name is None:
        name = next((usual for usual in LABEL_NAMES if usual in schema.names), None)
    if name is None:
        raise RequestError(
            f"{file}: expected a column of labels called {', '.join(LABEL_NAMES)}, "
            f"found {_listed(schema.names)}; name it with data.label_column"
        )
    kind = schema.field(name).type
    if not pa.types.is_integer(kind):
        raise Location(file, name).error(f"expected an integer column of labels, found {kind}")
    return name


def class_names(file: Path, schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Return the class names in the Hugging Face `features` record of the schema, if there is one."""
    feature = _feature(schema, label)
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not names:
        return None
    names = tuple(str(name) for name in names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Location(file, label).error(
            f"expected class names that differ in the metadata, found '{twice}' twice"
        )
    return names


def image_mode(schema: pa.Schema, image: str) -> str | None:
    """Return the Pillow mode of images in the Hugging Face `features` record of the schema."""
    feature = _feature(schema, image)
    mode = feature.get("mode") if feature.get("_type") == "Image" else None
    return mode if isinstance(mode, str) else None


def _feature(schema: pa.Schema, column: str) -> dict[str, Any]:
    """Return the entry of a column in the Hugging Face record of the metadata; empty if it has none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
    except (KeyError, TypeError, ValueError):
        return {}
    return feature if isinstance(feature, dict) else {}


def _is_image(kind: pa.DataType) -> bool:
    return is_encoded(kind) or is_array(kind)


def _given(
    file: Path, schema: pa.Schema, column: str | None, kind: str, first: Origin | None
) -> str | None:
    """Return the column of the request or else of the first file; None if neither is given."""
    if column is not None:
        name, expected = column, f"data.{kind}_column: expected a column '{column}' in {file}"
    elif first is not None:
        name = first.image if kind == "image" else first.label
        expected = f"{file}: expected a column '{name}' of {kind}s as in {first.file}"
    else:
        return None
    if name not in schema.names:
        found = f"found {_listed(schema.names)}{nearest(name, schema.names)}"
        raise RequestError(f"{expected}, {found}")
    return name


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
