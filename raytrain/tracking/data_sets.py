"""Data sets of a run for MLflow: digest, shape and origin of its splits."""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.file_systems import is_url, without_secrets
from raytrain.data.catalogue import SOURCES
from raytrain.data.images import Pixels
from raytrain.data.loader import open_additional, open_splits
from raytrain.data.reading import Selection
from raytrain.data.spec import DEFAULT_FOLDER, DataSpec

_AT_ONCE, _BYTES_AT_ONCE = 1024, 2**27  # images that are decoded together, at most

Input = dict[str, str]
"""A data set: name, digest, source_type, source, schema, profile (JSON), and its context in the run."""


def training_inputs(spec: DataSpec) -> list[Input]:
    """The training and the validation split, and additional images if there are any; all are read and
    digested once in a process.
    """
    return list(_splits(spec.model_dump_json()))


@lru_cache(maxsize=8)
def _splits(spec: str) -> tuple[Input, ...]:
    data = DataSpec.model_validate_json(spec)
    splits = open_splits(data, DistributedContext())
    train, valid = splits.train, splits.valid
    inputs = (
        as_input(data, "training", train.pixels, train.labels),
        as_input(data, "validation", valid.pixels, valid.labels),
    )
    if data.extra is None:
        return inputs
    images = open_additional(data, DistributedContext())
    extra = data.model_copy(update={"name": data.extra.name})
    every = Selection(images.pixels, torch.arange(len(images.labels)))
    return *inputs, as_input(extra, "additional", every, images.labels)


def data_name(spec: DataSpec) -> str:
    """A data set by name: of Parquet, the last part of its path."""
    name = without_secrets(spec.name) if is_url(spec.name) else spec.name
    return name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".parquet")


def as_input(spec: DataSpec, context: str, pixels: Pixels, labels: Tensor) -> Input:
    """Images (n, c, h, w) of bytes and their labels (n,), as the input of a run.

    The digest of images that are not in memory is one of their digests, so that they need not be decoded.
    """
    shape = list(pixels.shape[1:])
    profile = {
        "num_rows": len(labels),
        "num_elements": math.prod(pixels.shape),
        "classes": labels.unique().numel(),
    }
    return {
        "name": data_name(spec),
        "digest": _stored_digest(pixels, labels) or digest(pixels, labels),
        **_source(spec, context),
        "schema": json.dumps(
            {
                "mlflow_tensorspec": {
                    "features": _tensor("images", "uint8", [-1, *shape]),
                    "targets": _tensor("labels", "int64", [-1]),
                }
            }
        ),
        "profile": json.dumps(profile),
        "context": context,
    }


def digest(pixels: Pixels, labels: Tensor) -> str:
    """12 hexadecimal digits of the images and labels, in their order."""
    found = hashlib.sha256()
    found.update(repr((torch.uint8, tuple(pixels.shape))).encode())
    at_once = max(1, min(_AT_ONCE, _BYTES_AT_ONCE // math.prod(pixels.shape[1:])))
    for rows in torch.arange(len(labels)).split(at_once):
        found.update(_bytes(pixels[rows]))
    found.update(repr((labels.dtype, tuple(labels.shape))).encode())
    found.update(_bytes(labels))
    return found.hexdigest()[:12]


def _stored_digest(pixels: Pixels, labels: Tensor) -> str | None:
    known = pixels.digest() if isinstance(pixels, Selection) else None
    if known is None:
        return None
    return hashlib.sha256(known + _bytes(labels)).hexdigest()[:12]


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().numpy().data


def _source(spec: DataSpec, context: str) -> Input:
    """Where the images come from: a file, a folder, or a function of scikit-learn."""
    if spec.name == "digits":
        where = {"tags": {"mlflow.source.name": "sklearn.datasets.load_digits"}}
        return {"source_type": "code", "source": json.dumps(where)}
    place: str | Path = spec.name
    if spec.name in SOURCES:
        place = spec.root or DEFAULT_FOLDER
    elif context == "test" and spec.test_path is not None:
        place = spec.test_path
    if is_url(place):
        where = {"uri": without_secrets(str(place))}
        return {"source_type": str(place).partition(":")[0], "source": json.dumps(where)}
    return {"source_type": "local", "source": json.dumps({"uri": str(Path(place).resolve())})}


def _tensor(name: str, kind: str, shape: list[int]) -> str:
    spec = {"dtype": kind, "shape": shape}
    return json.dumps([{"name": name, "type": "tensor", "tensor-spec": spec}])
