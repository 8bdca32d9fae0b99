"""Decoding of images ahead of their use, in processes of this machine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raytrain.core.errors import TrainingFailed

_AHEAD = 2  # batches per process
_MOST_PROCESSES = 16


class _Batches(Dataset[Tensor]):
    """One item per batch."""

    def __init__(self, read: Callable[..., Tensor], requests: Sequence[Any]) -> None:
        self._read, self._requests = read, requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, number: int) -> Tensor:
        # Shared here: where the queue does it, in a thread, an error is lost and the parent waits for ever.
        return self._read(*self._requests[number]).share_memory_()


def in_processes(read: Callable[..., Tensor], requests: Sequence[Any]) -> Generator[Tensor]:
    """Yield `read(*request)` for every request, in order, from one process per thread of torch.

    A worker of Ray has as many threads as `cpus_per_worker`.

    Raises:
        TrainingFailed: if a process ends, or finds no room for its images in /dev/shm.
    """
    loader = DataLoader(
        _Batches(read, requests),
        batch_size=None,
        num_workers=max(1, min(_MOST_PROCESSES, torch.get_num_threads(), len(requests))),
        prefetch_factor=_AHEAD,
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=_begin,
    )
    try:
        yield from loader
    except Exception as error:  # of a process: its message ends with the original one
        reason = str(error).rstrip(". \n").rpartition("\n")[2]
        raise TrainingFailed(
            f"a process that decodes images ahead of their use has failed ({reason}); expected memory for "
            f"{_AHEAD} batches per process, also in /dev/shm (docker run --shm-size), or data.in_memory=true"
        ) from error


def _begin(worker: int) -> None:
    """Leave signals to the parent, at whose end a worker of the DataLoader ends too."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
