"""State of an algorithm between steps, beside the weights: the parts of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from raytrain.core.distributed_context import DistributedContext


@runtime_checkable
class Stateful(Protocol):
    """State that changes during training and is part of checkpoints: a store, an optimiser, a few numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; may be a collective, so call it on all workers."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class TrainingSetup:
    """Model, data sizes and process of a training run, from which an algorithm allocates its state."""

    context: DistributedContext
    model: nn.Module
    num_images: int  # in the training split, over all workers; with additional images, indices
    shape: tuple[int, int, int]  # of an image: channels, height, width
    batch_size: int  # over all workers
    dtype: torch.dtype  # of images, weights and perturbations
    seed: int


class Numbers(dict[str, float]):
    """A few named numbers, the same on every worker."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self.update(state)


class Weights:
    """A copy of a network's trainable weights, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(state[name])
