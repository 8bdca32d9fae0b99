"""Decoding of images ahead of their use, by Ray Data on the CPUs of all nodes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HEAD = "node:__internal_head__"  # a resource that Ray gives the first node
_AHEAD = 4  # batches that are brought to this process before they are used


def on_cluster(
    at_once: Callable[[int], int], read: Callable[..., Tensor], requests: Sequence[Any]
) -> Generator[Tensor]:
    """Yield `read(*request)` for every request, in order.

    `at_once`(CPUs of the cluster) of them are computed at a time, at least two. Their tasks need no CPU in
    Ray's accounts: trials may hold all of them, and would wait for these tasks for ever. A head without
    CPUs computes none.
    """
    import pyarrow as pa
    import ray
    from ray.data import DataContext, TaskPoolStrategy, from_blocks

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.execution_options.preserve_order = True
    cpus = int(ray.cluster_resources().get("CPU", 1))
    # Not by `from_arrow`, which starts a task that needs a CPU.
    blocks = [pa.table({"request": [pickle.dumps(request)]}) for request in requests]
    decoded = from_blocks(blocks).map_batches(
        partial(_decode, read),
        batch_size=None,
        num_cpus=0,
        compute=TaskPoolStrategy(size=max(2, at_once(cpus))),
        label_selector=_elsewhere(ray.nodes()),
    )
    for batch in decoded.iter_batches(batch_size=None, prefetch_batches=_AHEAD):
        # A copy: what is in the object store cannot be written.
        yield torch.from_numpy(np.array(batch["pixels"][0]))


def _elsewhere(nodes: list[dict[str, Any]]) -> dict[str, str] | None:
    """A selector of all nodes but a head without CPUs."""
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and _HEAD in resources and not resources.get("CPU") and len(nodes) > 1:
            return {"ray.io/node-id": f"!{node['NodeID']}"}
    return None


def _decode(read: Callable[..., Tensor], batch: Any) -> dict[str, np.ndarray]:
    """Compute the one request of a block; it was pickled by the process that reads the result."""
    torch.set_num_threads(1)
    (request,) = batch["request"]
    return {"pixels": read(*pickle.loads(request)).numpy()[None]}
