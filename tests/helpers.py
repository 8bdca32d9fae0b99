"""Tiny networks and batches that the tests of the numerics share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

from raytrain.algorithms import AbstractAlgorithm
from raytrain.attacks import Probe
from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.losses import AbstractLoss, Reference
from raytrain.core.network import trainable
from raytrain.core.sample_store import SampleStore
from raytrain.core.threat_models import L1, L2, Linf
from raytrain.core.train_state import TrainState
from raytrain.core.types import (
    BEGINNING,
    AugmentedView,
    Batch,
    Delta,
    Dice,
    PerSample,
    Predict,
    Progress,
)

CPU = torch.device("cpu")

EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}
"""A radius for each norm at which 8x8 images have saturated and free pixels in the ball."""


def ball_of(norm: str, eps: float | None = None) -> Linf | L2 | L1:
    """The ball of this norm, with the radius of `EPS` unless another is given."""
    kinds: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
    return kinds[norm](eps=EPS[norm] if eps is None else eps)


def row(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """One image of one channel and one line."""
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)


def dice_of(num: int, seed: int = 0) -> Dice:
    """The randomness of a whole batch on one worker."""
    return Dice(seed, num, slice(None), CPU)


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
    return Batch(images, labels, torch.arange(num), dice_of(num, seed))


def views_of(num: int, pad: int, seed: int = 0, mirrored: bool | None = None) -> AugmentedView:
    """Random crops; flips at random too, or all alike."""
    top, left = torch.randint(2 * pad + 1, (2, num), generator=generator(seed)).unbind()
    flips = torch.rand(num, generator=generator(seed + 1)) < 0.5
    if mirrored is not None:
        flips = torch.full((num,), mirrored)
    return AugmentedView(pad, top, left, flips)


class TinyNet(nn.Module):
    """Two convolutions and a linear layer for 8x8 images; BatchNorm and dropout if wanted."""

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
    """The same network for the same arguments; weights large enough that attacks matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNet(channels=channels, batch_norm=batch_norm, dropout=dropout).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


class Affine(nn.Module):
    """Logits (0, <slope, x>): the loss of label 0 grows with <slope, x> and with nothing else."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.slope).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


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
    """A fresh state on one worker, with plain momentum SGD and the memory that `algorithm` asks for."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    state = TrainState(model=model, wrapper=model, optimizer=optimizer)
    if algorithm is not None:
        dtype = next(model.parameters()).dtype
        setting = TrainingSetup(
            DistributedContext(), model, num_images, shape, batch_size, dtype, seed=0
        )
        state.parts = algorithm.memory(setting)
    return state


def everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, as copies."""
    for name, value in model.state_dict().items():
        yield name, value.clone()


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
    """What a stopping rule sees of a whole batch; where nothing is given, what does not matter."""
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


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """|found - wanted| <= tolerance (1 + |wanted|) everywhere, for equal shapes.

    torch.testing would do, but its first call takes seconds.
    """
    assert found.shape == wanted.shape
    excess = (found - wanted).abs() / (1 + wanted.abs())
    assert float(excess.max()) <= tolerance, f"off by {float(excess.max()):g}"


def moved(batch: Batch, radius: float = 0.1, seed: int = 5) -> Tensor:
    """A perturbation of every pixel, in the pixel box."""
    noise = torch.rand(batch.images.shape, generator=generator(seed), dtype=torch.float64)
    there = batch.images + radius * (2 * noise - 1).to(batch.images.dtype)
    return there.clamp(0, 1) - batch.images


def applied(model: nn.Module) -> Tensor:
    """The gradient that the last update has left in the trained weights, as one row of numbers."""
    grads = [p.grad for p in trainable(model)]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def weights_of(model: nn.Module) -> Tensor:
    """All parameters, as one row of numbers."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_by_one(
    model: nn.Module,
    objective: AbstractLoss,
    batch: Batch,
    delta: Tensor,
    reference: Reference = (),
) -> Tensor:
    """d f_i / d weights in eval mode, a row per sample, each from a pass of that sample alone."""
    twin, rows = copy.deepcopy(model), []
    twin.eval()
    for i in torch.arange(len(batch)).split(1):
        twin.zero_grad(set_to_none=True)
        part = tuple(one[i] for one in reference)
        objective.outer(twin, batch[i], delta[i], part).sum().backward()
        rows.append(applied(twin))
    return torch.stack(rows)


def through_the_batch(
    model: nn.Module,
    objective: AbstractLoss,
    batch: Batch,
    delta: Tensor,
    reference: Reference = (),
) -> Tensor:
    """d f_i / d weights through the statistics of the batch, a row per sample."""
    rows = []
    for i in range(len(batch)):
        twin = copy.deepcopy(model)
        twin.train()
        objective.outer(twin, batch, delta, reference)[i].backward()
        rows.append(applied(twin))
    return torch.stack(rows)


def input_norms(
    model: nn.Module,
    objective: AbstractLoss,
    batch: Batch,
    delta: Tensor,
    train: bool = False,
    reference: Reference = (),
) -> Tensor:
    """|d sum_j f_j / d delta_i| of the training loss, in eval or in train mode."""
    twin, point = copy.deepcopy(model), delta.clone().requires_grad_(True)
    twin.train(train)
    losses = objective.outer(twin, batch, point, reference)
    (grad,) = torch.autograd.grad(losses.sum(), point)
    return grad.flatten(1).norm(dim=1)


class Saddle(nn.Module):
    """Not logits but (w, scale * pixels), (n, 2, num weights): an objective makes any f(w, delta) of it."""

    def __init__(self, w: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        delta = self.scale * x.flatten(1)
        return torch.stack([self.w.expand_as(delta), delta], 1)


class SaddleObjective(AbstractLoss):
    """f_i(w, delta_i), summed over pixels that have a weight each. Images do not matter, labels may."""

    def value(self, w: Tensor, delta: Tensor, labels: Tensor) -> Tensor:
        """f, for w and delta of the same shape (n, num weights); w delta unless a toy says otherwise."""
        del labels
        return w * delta

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        w, moved = predict(delta).unbind(1)
        return self.value(w, moved, batch.labels).sum(1)

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return self.inner(predict, batch, delta, reference)


UNITS = 2.0**30
"""Units of a toy per pixel: a power of two, so that the iterates of a toy are exact in pixels as well,
and so large that the box never binds. A step along the raw gradient is UNITS^2 times smaller."""


def grey(index: list[int], width: int = 1) -> Batch:
    """Images of one line, all pixels in the middle of the box, labelled with their index."""
    rows = torch.tensor(index)
    images = torch.full((len(index), 1, 1, width), 0.5, dtype=torch.float64)
    return Batch(images, rows.clone(), rows, dice_of(len(index)))


@contextmanager
def unchecked(when: bool = True) -> Iterator[None]:
    """Annotations are not compared with what is passed: for the thousandth step like the first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", when)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def trajectory(
    algorithm: AbstractAlgorithm,
    steps: int,
    *,
    lr: float,
    start: tuple[float, float] = (1.0, 1.0),
    units: float = UNITS,
) -> Tensor:
    """(w, delta) of one weight and one pixel after 0, 1, ..., `steps` updates, (steps + 1, 2)."""
    model = Saddle(torch.tensor(start[:1], dtype=torch.float64), units)
    state = state_of(
        model, algorithm, lr=lr, momentum=0, num_images=1, batch_size=1, shape=(1, 1, 1)
    )
    batch = grey([0])
    for name in {"delta", "delta_before"} & state.parts.keys():
        state.part(name, SampleStore).write(batch, row(start[1] / units))
    rows = [start]
    for k in range(steps):
        with unchecked(k > 1):
            algorithm.step(state, batch)
        delta = state.part("delta", SampleStore).read(batch)
        rows.append((float(model.w.detach()), float(delta) * units))
    return torch.tensor(rows, dtype=torch.float64)


def momenta(state: TrainState) -> Tensor:
    """The momentum buffers of all trained weights, as one row of numbers."""
    buffers = [state.optimizer.state[p]["momentum_buffer"] for p in trainable(state.model)]
    return torch.cat([buffer.flatten() for buffer in buffers])


def resumed(state: TrainState, algorithm: AbstractAlgorithm) -> TrainState:
    """A fresh process that goes on from a copy of all that a checkpoint holds."""
    fresh = state_of(copy.deepcopy(state.model), algorithm)
    fresh.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    for name, part in state.parts.items():
        fresh.parts[name].load_state_dict(copy.deepcopy(part.state_dict()))
    fresh.epoch, fresh.step = state.epoch, state.step
    return fresh
