"""An epoch that is under way, as part of a checkpoint written within it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.train_state import TrainState


@dataclass(frozen=True)
class PartEpoch:
    """The steps of an epoch that are done. Totals are over all workers."""

    done: int  # steps
    began: float  # share of training at which the epoch began
    loss: float  # sum over the samples, nats
    inner_steps: float  # sum over the samples
    samples: float

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> PartEpoch | None:
        """The part that a checkpoint holds, None for one that was written between epochs."""
        return None if values is None else cls(**values)


class WithinEpoch:
    """Checkpoints within an epoch, `minutes` after the one before; without `minutes` there are none."""

    def __init__(
        self, minutes: float | None = None, save: Callable[[TrainState], None] = lambda state: None
    ) -> None:
        self.save, self._minutes = save, minutes
        self.restart()

    def restart(self) -> None:
        """Count the minutes from now on."""
        self._begun = time.monotonic()

    def is_due(self, context: DistributedContext) -> bool:
        """Whether to write one now, as the leading worker's clock says: a collective."""
        if self._minutes is None:
            return False
        late = time.monotonic() - self._begun >= 60 * self._minutes
        due = bool(context.total(torch.tensor(int(late and context.leads), device=context.device)))
        if due:
            self.restart()
        return due


def statistics(model: nn.Module, context: DistributedContext) -> dict[str, Tensor]:
    """The BatchNorm statistics of all workers, one row each; they differ within an epoch. A collective."""
    return {name: context.gather(value[None]).cpu() for name, value in _floating(model)}


def set_statistics(
    model: nn.Module, values: dict[str, Tensor], context: DistributedContext
) -> None:
    """Set this worker's BatchNorm statistics; with another number of workers, the mean of all."""
    for name, value in _floating(model):
        rows = values[name]
        own = rows[context.rank] if len(rows) == context.world else rows.mean(dim=0)
        with torch.no_grad():
            value.copy_(own)


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The statistics that `average_buffers` averages, by name."""
    for path, module in model.named_modules():
        for name, buffer in (
            module.named_buffers(recurse=False) if isinstance(module, _NormBase) else ()
        ):
            if buffer.is_floating_point():
                yield f"{path}.{name}", buffer
