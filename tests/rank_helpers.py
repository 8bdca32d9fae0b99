"""Two processes that train together: gloo on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from raytrain.core.distributed_context import DistributedContext

PATIENCE = 120  # seconds after which a collective that one process misses is a failure


@contextmanager
def one_of_two(rank: int, folder: Path) -> Iterator[DistributedContext]:
    """The context of one of two processes, which meet in `folder`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    yield DistributedContext(rank=rank, world=2)
    dist.barrier()
    dist.destroy_process_group()


def run_both(work: Callable[..., None], *args: Any) -> None:
    """Call `work(rank, *args)` in two processes and wait for both."""
    workers = spawn(work, args, nprocs=2, join=False)
    assert workers is not None
    processes: list[Any] = workers.processes
    deadline = time.monotonic() + 2 * PATIENCE
    try:
        while not workers.join(timeout=5):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in processes:
            process.kill()
