"""Decoding of images ahead of their use, by Ray Data on the processors of all nodes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_AHEAD = 4  # batches that are brought to this process before they are used


def on_cluster(
    at_once: Callable[[int], int], read: Callable[..., Tensor], requests: Sequence[Any]
) -> Generator[Tensor]:
    """Yield `read(*request)` for every request, in order.

    Of those `at_once`(processors of the cluster) are computed at a time, or two. Their tasks ask for no
    processor: trials may hold all of them, and would wait for these tasks for ever.
    """
    import pyarrow as pa
    import ray
    from ray.data import DataContext, TaskPoolStrategy, from_blocks

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.execution_options.preserve_order = True
    processors = int(ray.cluster_resources().get("CPU", 1))
    # `from_arrow` starts a task that asks for a processor.
    blocks = [pa.table({"request": [pickle.dumps(request)]}) for request in requests]
    decoded = from_blocks(blocks).map_batches(
        partial(_decode, read),
        batch_size=None,
        num_cpus=0,
        compute=TaskPoolStrategy(size=max(2, at_once(processors))),
    )
    for batch in decoded.iter_batches(batch_size=None, prefetch_batches=_AHEAD):
        # A copy: what is in the object store cannot be written.
        yield torch.from_numpy(np.array(batch["pixels"][0]))


def _decode(read: Callable[..., Tensor], batch: Any) -> dict[str, np.ndarray]:
    """Compute the one request of a block; it was pickled by the process that reads the result."""
    torch.set_num_threads(1)
    (request,) = batch["request"]
    return {"pixels": read(*pickle.loads(request)).numpy()[None]}
