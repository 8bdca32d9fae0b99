"""Toy networks, batches and training states: small, in float64, the same for the same arguments."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.algorithms import AbstractAlgorithm
from raytrain.attacks import Probe
from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.threat_models import L1, L2, Linf
from raytrain.core.train_state import TrainState
from raytrain.core.types import BEGINNING, Batch, BatchRandom, Progress

CPU = torch.device("cpu")


EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}
"""A radius for each norm at which 8x8 images have saturated and free pixels in the ball."""


def ball_of(norm: str, eps: float | None = None) -> Linf | L2 | L1:
    """Return the threat model of this norm, with the radius of `EPS` unless another is given."""
    kinds: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
    return kinds[norm](eps=EPS[norm] if eps is None else eps)


def rng_of(num: int, seed: int = 0) -> BatchRandom:
    """Return the random numbers of a whole batch on one worker."""
    return BatchRandom(seed, num, slice(None), CPU)


def pixels(num: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    """Float64 images of which a quarter of the pixels is black and a quarter white."""
    raw = torch.rand(num, channels, size, size, generator=generator(seed), dtype=torch.float64)
    return (2 * raw - 0.5).clamp(0, 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(
    num: int = 8,
    channels: int = 1,
    size: int = 8,
    classes: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Batch:
    """A batch with saturated pixels, random labels and indices 0..num-1."""
    labels = torch.randint(classes, (num,), generator=generator(seed + 1))
    images = pixels(num, channels, size, seed).to(dtype)
    return Batch(images, labels, torch.arange(num), rng_of(num, seed))


class TinyNet(nn.Module):
    """Two convolutions and a linear layer for 8x8 images; optionally BatchNorm and dropout."""

    def __init__(
        self, classes: int = 4, channels: int = 1, batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8 * 4 * 4, classes)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def rest(self, h: Tensor) -> Tensor:
        h = torch.relu(self.norm(h))
        h = torch.relu(self.conv2(h)).flatten(1)
        return self.linear(self.dropout(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


def tiny_net(
    dtype: torch.dtype = torch.float64,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
    channels: int = 1,
    seed: int = 0,
) -> TinyNet:
    """Return a network that is a function of the arguments; its weights are large enough for attacks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNet(channels=channels, batch_norm=batch_norm, dropout=dropout).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def state_of(
    model: nn.Module,
    algorithm: AbstractAlgorithm | None = None,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    num_images: int = 8,
    batch_size: int = 8,
    shape: tuple[int, int, int] = (1, 8, 8),
) -> TrainState:
    """A fresh state on one worker, with plain momentum SGD and the parts of `algorithm`."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    state = TrainState(model=model, wrapper=model, optimizer=optimizer)
    if algorithm is not None:
        dtype = next(model.parameters()).dtype
        setup = TrainingSetup(
            DistributedContext(), model, num_images, shape, batch_size, dtype, seed=0
        )
        state.parts = algorithm.memory(setup)
    return state


def probe_of(
    ball: Linf | L2 | L1,
    batch: Batch,
    delta: Tensor,
    grad: Tensor,
    *,
    start: Tensor | None = None,
    logits: Tensor | None = None,
    steps: int = 1,
    progress: Progress = BEGINNING,
) -> Probe:
    """Return the probe of a stopping rule for a whole batch; the defaults are arbitrary."""
    return Probe(
        threat=ball,
        images=batch.images,
        labels=batch.labels,
        delta=delta,
        start=torch.zeros_like(delta) if start is None else start,
        losses=torch.zeros(len(batch)),
        grad=grad,
        logits=torch.zeros(len(batch), 4) if logits is None else logits,
        steps=steps,
        progress=progress,
    )


def everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, as copies."""
    for name, value in model.state_dict().items():
        yield name, value.clone()


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested mappings, lists and numbers, by its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, int | float):
        yield path, torch.tensor(value, dtype=torch.float64)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers are equal bit for bit."""
    ours, theirs = dict(everything(one)), dict(everything(other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def resumed(state: TrainState, algorithm: AbstractAlgorithm) -> TrainState:
    """Return a new state that is loaded from a copy of the content of a checkpoint."""
    fresh = state_of(copy.deepcopy(state.model), algorithm)
    fresh.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    for name, part in state.parts.items():
        fresh.parts[name].load_state_dict(copy.deepcopy(part.state_dict()))
    fresh.epoch, fresh.step = state.epoch, state.step
    return fresh


def moved(batch: Batch, radius: float = 0.1, seed: int = 5) -> Tensor:
    """A perturbation of every pixel, in the pixel box."""
    noise = torch.rand(batch.images.shape, generator=generator(seed), dtype=torch.float64)
    there = batch.images + radius * (2 * noise - 1).to(batch.images.dtype)
    return there.clamp(0, 1) - batch.images
