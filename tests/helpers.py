"""What the tests of the numerics share beside the public toys of `raytrain.testing`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from torch import Tensor, nn

from raytrain.algorithms import AbstractAlgorithm
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.losses import AbstractLoss, Reference
from raytrain.core.network import trainable
from raytrain.core.sample_store import SampleStore
from raytrain.core.train_state import TrainState
from raytrain.core.types import AugmentedView, Batch, Delta, PerSample, Predict
from raytrain.testing.algorithms import (
    equal as equal,
)
from raytrain.testing.toys import (
    CPU as CPU,
)
from raytrain.testing.toys import (
    EPS as EPS,
)
from raytrain.testing.toys import (
    TinyNet as TinyNet,
)
from raytrain.testing.toys import (
    ball_of as ball_of,
)
from raytrain.testing.toys import (
    batch_of as batch_of,
)
from raytrain.testing.toys import (
    everything as everything,
)
from raytrain.testing.toys import (
    generator as generator,
)
from raytrain.testing.toys import (
    moved as moved,
)
from raytrain.testing.toys import (
    pixels as pixels,
)
from raytrain.testing.toys import (
    probe_of as probe_of,
)
from raytrain.testing.toys import (
    resumed as resumed,
)
from raytrain.testing.toys import (
    rng_of as rng_of,
)
from raytrain.testing.toys import (
    same as same,
)
from raytrain.testing.toys import (
    state_of as state_of,
)
from raytrain.testing.toys import (
    tensors as tensors,
)
from raytrain.testing.toys import (
    tiny_net as tiny_net,
)


def row(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """One image of one channel and one line."""
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)


def views_of(num: int, pad: int, seed: int = 0, mirrored: bool | None = None) -> AugmentedView:
    """Random crops; flips at random too, or all alike."""
    top, left = torch.randint(2 * pad + 1, (2, num), generator=generator(seed)).unbind()
    flips = torch.rand(num, generator=generator(seed + 1)) < 0.5
    if mirrored is not None:
        flips = torch.full((num,), mirrored)
    return AugmentedView(pad, top, left, flips)


class Affine(nn.Module):
    """Logits (0, <slope, x>): the loss of label 0 grows with <slope, x> and with nothing else."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.slope).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """|found - wanted| <= tolerance (1 + |wanted|) everywhere, for equal shapes.

    torch.testing would do, but its first call takes seconds.
    """
    assert found.shape == wanted.shape
    excess = (found - wanted).abs() / (1 + wanted.abs())
    assert float(excess.max()) <= tolerance, f"off by {float(excess.max()):g}"


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
    return Batch(images, rows.clone(), rows, rng_of(len(index)))


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


def visited(
    algorithm: AbstractAlgorithm,
    steps: int = 3,
    *,
    batch_norm: bool = False,
    epoch: int = 0,
    lr: float = 0.1,
    weight_decay: float = 1e-3,
) -> TrainState:
    """The state after visits, with momentum and weight decay, of the same images with other pixels."""
    model = tiny_net(batch_norm=batch_norm)
    state = state_of(model, algorithm, lr=lr, weight_decay=weight_decay)
    state.epoch = epoch
    for seed in range(steps):
        losses = algorithm.step(state, batch_of(8, seed=seed)).losses
        assert losses.shape == (8,) and bool(losses.isfinite().all())
    return state


def bank(state: TrainState, name: str = "delta") -> Tensor:
    """What a memory of the algorithm holds of every image, in the order of their indices."""
    return state.part(name, SampleStore).state_dict()["values"]


def whole_and_resumed(algorithm: AbstractAlgorithm) -> tuple[TrainState, TrainState]:
    """The state after four visits, and that of a run which was resumed after two of them."""
    state = visited(algorithm, 2)
    other = resumed(state, algorithm)
    for seed in (5, 6):
        for each in (state, other):
            algorithm.step(each, batch_of(8, seed=seed))
    return state, other


def assert_three_visits(once: AbstractAlgorithm, often: AbstractAlgorithm) -> None:
    """A step of `often` is three of `once` on the same batch, bit for bit."""
    one, other = (state_of(tiny_net(), each) for each in (once, often))
    for seed in range(2):
        batch = batch_of(8, seed=seed)
        outcomes = [once.step(one, batch) for _ in range(3)]
        outcome = often.step(other, batch)
        assert torch.equal(outcome.losses, outcomes[0].losses)
        assert torch.equal(outcome.delta, outcomes[2].delta)
        assert outcome.steps.tolist() == [3] * 8
    assert equal(one, other) and torch.equal(bank(one), bank(other))


def pixels_seen(state: TrainState) -> list[Tensor]:
    """A list that every later pass of the network adds its images to."""
    seen: list[Tensor] = []
    state.model.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].detach().clone())
    )
    return seen


def metrics_of(epoch: int) -> EpochMetrics:
    """The row of an epoch of a run of four."""
    return EpochMetrics(
        epoch=epoch,
        progress=epoch / 4,
        loss=1.0 / epoch,
        inner_steps=1.0,
        fosc=0.0,
        fosc_box=0.0,
        fosc_p90=0.0,
        lr=0.1,
        fe=10 * epoch,
        samples=2 * epoch,
        seconds=0.5,
        final=epoch == 4,
    )
