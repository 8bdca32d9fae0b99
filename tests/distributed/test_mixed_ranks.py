"""Two workers with additional and mixed images are one worker with the whole batch: gloo, CPU, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import assert_near
from rank_helpers import one_of_two, run_both
from torch import Tensor

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.data.sources import read
from raytrain.training.trainer import fit

pytestmark = pytest.mark.slow  # several processes

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "both": ({"name": "trades", "steps": 1}, {"cutmix": 0.7}),
    "free": ({"name": "free", "m": 2}, {"cutmix": 1.0}),
    "atta": ("atta", {}),
}


def trained(name: str, context: DistributedContext, folder: Path) -> dict[str, Tensor]:
    """The weights after two epochs; of every batch of 16 images 11 are additional ones."""
    algorithm, data = CASES[name]
    extra = {"name": str(folder / "generated.parquet"), "share": 0.7}
    run = RunConfig.model_validate(
        {
            "data": {"name": "digits", "train_size": 99, "validation": 61, "extra": extra, **data},
            "model": "small_cnn_nobn",
            "algorithm": algorithm,
            "batch_size": 16,
            "epochs": 2,
            "precision": "fp64",
            "evaluation": {"steps": 1, "batch_size": 20},
            "device": "cpu",
        }
    )
    (*_, (_, state)) = fit(run, context)
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def work(rank: int, folder: Path) -> None:
    with one_of_two(rank, folder) as context:
        found = {name: trained(name, context, folder) for name in CASES}
        torch.save(found, folder / f"found-{rank}.pt")


def test_two_ranks_equal_one_rank_with_double_batch(tmp_path: Path) -> None:
    test = read("digits", "test")
    images = [image[0].tolist() for image in test.whole[:77]]
    table = pa.table({"image": images, "label": test.labels[:77].numpy()})
    pq.write_table(table, tmp_path / "generated.parquet")
    run_both(work, tmp_path)
    one, other = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    for name in CASES:
        for key, value in trained(name, DistributedContext(), tmp_path).items():
            assert torch.equal(one[name][key], other[name][key])
            assert_near(one[name][key], value, 1e-12)
