"""A checkpoint holds the classes of its network: data that names them otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.data.loader import open_splits
from raytrain.data.spec import DataSpec
from raytrain.training.checkpoint import load, restore, save
from raytrain.training.setup import network, start


def _data(folder: Path, names: list[str] | None, num_classes: int = 3) -> DataSpec:
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (24, 8, 8)).tolist()
    table = pa.table({"image": pixels, "label": [k % num_classes for k in range(24)]})
    feature = {"_type": "ClassLabel", "names": names}
    record = json.dumps({"info": {"features": {"label": feature}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": record}), folder / "x.parquet")
    return DataSpec(name=str(folder), validation=6)


def _checkpoint(data: DataSpec, folder: Path, **content: Any) -> Path:
    run = as_run({"data": data.model_dump(mode="json"), "batch_size": 8})
    save(
        start(run, open_splits(run.data, DistributedContext()), DistributedContext()),
        run,
        folder / "best.pt",
        DistributedContext(),
    )
    file = folder / "best.pt"
    torch.save({**torch.load(file, weights_only=True), **content}, file)
    return file


def _resume(file: Path, data: DataSpec) -> None:
    saved = load(file)
    run = saved.run.model_copy(update={"data": data})
    restore(
        start(run, open_splits(data, DistributedContext()), DistributedContext()),
        saved,
        DistributedContext(),
    )


OTHERS = {
    "order": (
        ["ant", "cow", "bee"],
        "in the same order; found 'cow' in place of 'bee' as class 1",
    ),
    "names": (
        ["ant", "bee", "dog"],
        "in the same order; found 'dog' in place of 'cow' as class 2",
    ),
    "more": (["ant", "bee", "cow", "dog"], "found 4"),
    "fewer": (["ant", "bee"], "found 2"),
    "unnamed": (None, "found 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_network_meets_no_data_of_other_classes(case: str, tmp_path: Path) -> None:
    names, found = OTHERS[case]
    file = _checkpoint(_data(tmp_path / "here", ["ant", "bee", "cow"]), tmp_path)
    other = _data(tmp_path / "there", names, len(names or "four"))
    expected = f"^data.name: expected the 3 classes that the network was trained on, {found}$"
    with pytest.raises(RequestError, match=expected):
        network(load(file), other)
    with pytest.raises(RequestError, match=expected):
        _resume(file, other)


@pytest.mark.parametrize(
    ("trained", "now"),
    [
        (["ant", "bee", "cow"], ["ant", "bee", "cow"]),
        (["ant", "bee", "cow"], None),
        (None, ["ant", "bee", "cow"]),
        (None, None),
    ],
)
def test_the_same_names_or_none_are_the_same_classes(
    trained: list[str] | None, now: list[str] | None, tmp_path: Path
) -> None:
    file = _checkpoint(_data(tmp_path / "here", trained), tmp_path)
    other = _data(tmp_path / "there", now)
    network(load(file), other)
    _resume(file, other)


def test_a_checkpoint_without_classes_is_not_compared(tmp_path: Path) -> None:
    file = _checkpoint(_data(tmp_path / "here", ["ant", "bee", "cow"]), tmp_path, classes=None)
    network(load(file), _data(tmp_path / "there", ["bee", "ant", "cow"]))
