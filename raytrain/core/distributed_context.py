"""The process in a training run: device, rank, number of workers, and collectives."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from raytrain.core.errors import RequestError

ReadAhead = Callable[[Callable[..., Tensor], Sequence[Any]], Generator[Tensor]]
"""Yields read(*request) for every request, in order, each computed in another process ahead of its use."""


@dataclass(frozen=True)
class DistributedContext:
    """One worker process. With `world` 1 there is no process group and every collective is the identity."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world: int = 1
    read_ahead: ReadAhead | None = None  # None: in processes of this machine

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes shared files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module, fixed: bool = True) -> nn.Module:
        """Return the module for weight gradients; copy the weights and buffers of rank 0 to every worker.

        A network is `fixed` if every pass in training mode reaches every trained weight. Its wrapper
        averages gradients over the workers during the backward pass. The gradients of any other network
        are averaged afterwards, by `average_grads`, and it is its own wrapper: the reducer of
        DistributedDataParallel waits for weights that a pass does not reach.

        BatchNorm buffers are not broadcast before every forward: attacks run on the bare module,
        and a broadcast between two forwards of one backward breaks autograd. `average_buffers`
        averages them once an epoch instead.
        """
        if self.world == 1:
            return model
        if not fixed:
            self._share(model)
            return model
        # torch 2.13 renamed the switch and warns about the old name.
        options = inspect.signature(DistributedDataParallel).parameters
        switch = (
            "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        )
        devices = [self.device] if self.device.type == "cuda" else None
        settings: dict[str, Any] = {"device_ids": devices, switch: False}
        return DistributedDataParallel(model, **settings)

    def _share(self, model: nn.Module) -> None:
        """Broadcast the weights and buffers of rank 0 as bytes: gloo supports few dtypes."""
        for value in [*model.parameters(), *model.buffers()]:
            flat = value.detach().flatten().contiguous().view(torch.uint8)
            dist.broadcast(flat, src=0)
            with torch.no_grad():
                value.copy_(flat.view(value.dtype).view_as(value))

    def total(self, values: Tensor) -> Tensor:
        """The sum over the workers, on every one of them. Call it on all ranks or on none."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the workers, in one collective and in the tensor's order in memory."""
        if self.world == 1:
            return list(values)
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([value.numel() for value in values])
        return [
            torch.empty_like(value).copy_(part.view_as(value))
            for part, value in zip(parts, values, strict=True)
        ]

    def average_grads(self, model: nn.Module) -> None:
        """Replace every p.grad that was computed without the wrapper by its mean over the workers.

        A weight that no worker's pass has reached keeps a p.grad of None, as on one worker; where only
        some have reached it, it is zero on the others.
        """
        if self.world == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad]
        reached = self.total(
            torch.tensor([p.grad is not None for p in weights]).to(self.device, torch.int64)
        )
        weights = [p for p, count in zip(weights, reached.tolist(), strict=True) if count]
        means = self.average([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
        for weight, grad in zip(weights, means, strict=True):
            weight.grad = grad

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all workers, one rank after the other; ranks may hold different numbers of rows."""
        if self.world == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(values)], device=self.device))
        longest = int(max(sizes))
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def average_buffers(self, model: nn.Module) -> None:
        """Replace BatchNorm statistics by their mean over the workers."""
        if self.world == 1:
            return
        for module in model.modules():
            # Not every buffer: the normaliser's are constants, and a mean of equals may round.
            for buffer in module.buffers(recurse=False) if isinstance(module, _NormBase) else ():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    def barrier(self) -> None:
        """Wait until every worker has called this."""
        if self.world > 1:
            dist.barrier()


def local_context(device: Literal["auto", "cpu", "cuda"]) -> DistributedContext:
    """Return the context of a single worker; `auto` selects a GPU where there is one.

    Raises:
        RequestError: if `device` is `cuda` and there is none.
    """
    keep_freed_memory()
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise RequestError("device: cuda was asked for and no CUDA device is visible")
    return DistributedContext(torch.device("cuda" if has_gpu and device != "cpu" else "cpu"))


@cache
def keep_freed_memory() -> None:
    """Configure glibc to reuse freed memory instead of returning it to the system; no effect elsewhere.

    By default glibc returns every large block, and each later allocation is zeroed page by page: on a
    CPU a sixth of a small network's training step. The process never holds more than its peak.
    """
    trim, mmap, largest = -1, -3, 2**30  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, bytes
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if mallopt(mmap, largest) or mallopt(mmap, 2**25):  # older ones take no more than that
            mallopt(trim, largest)
