"""GradAlign: FGSM and a penalty whose gradient is a gradient of gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EPS,
    Affine,
    assert_near,
    ball_of,
    batch_of,
    generator,
    state_of,
    tiny_net,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from raytrain.algorithms import AbstractAlgorithm, GradAlign, Natural, Pgd
from raytrain.algorithms.gradalign import Aligned
from raytrain.attacks import Uniform, Zero
from raytrain.core.cost import Meter
from raytrain.core.oracle import Oracle
from raytrain.core.types import Batch
from raytrain.outer import Awp, Plain

NORMS = ["linf", "l2", "l1"]


def gradalign(norm: str = "linf", eps: float | None = None, **fields: Any) -> AbstractAlgorithm:
    return GradAlign(**fields).build(ball_of(norm, eps), Plain())


class Smooth(nn.Module):
    """A network with curvature everywhere, so that gradients of gradients have no kinks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(64, 7), nn.Linear(7, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


def oracle_of(model: nn.Module, batch: Batch, objective: Aligned) -> Oracle:
    return Oracle(model, objective, batch, Meter(), attack_bn="train")


def eta_of(batch: Batch, norm: str = "linf") -> Tensor:
    """The noise of the second gradient."""
    return ball_of(norm).noise(batch.images, batch.rng, "align")


def cosines(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one.flatten(1), other.flatten(1), dim=1, eps=1e-300)


def slope(model: nn.Module, images: Tensor, labels: Tensor, graph: bool = False) -> Tensor:
    """The input gradient of each sample's cross-entropy."""
    point = images.detach().requires_grad_(True)
    loss = F.cross_entropy(model(point), labels, reduction="sum")
    return torch.autograd.grad(loss, point, create_graph=graph)[0]


def training_loss(
    model: nn.Module, batch: Batch, delta: Tensor, fixed: Tensor, lam: float, smoothing: float = 0
) -> Tensor:
    """The loss of the paper, written out."""
    at_delta = F.cross_entropy(
        model(batch.images + delta), batch.labels, label_smoothing=smoothing
    )
    there = slope(model, batch.images + eta_of(batch), batch.labels, graph=True)
    return at_delta + lam * (1 - cosines(fixed, there).mean())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("start", [Zero(), Uniform()])
@pytest.mark.parametrize("lam", [0.2, 3.0])
def test_a_step_is_the_algorithm_written_out(
    batch_norm: bool, start: Zero | Uniform, lam: float
) -> None:
    eps = EPS["linf"]
    algorithm = gradalign(lam=lam, start=start, label_smoothing=0.1)
    model = tiny_net(batch_norm=batch_norm)
    state, twin = state_of(model, algorithm), copy.deepcopy(model).train()
    for seed in range(2):
        batch = batch_of(8, seed=seed)
        outcome = algorithm.step(state, batch)
        delta = start.delta(ball_of("linf"), batch, None)
        fixed = slope(twin, batch.images + delta, batch.labels)
        delta = (delta + 1.25 * eps * fixed.sign()).clamp(-eps, eps)
        delta = torch.max(torch.min(delta, 1 - batch.images), -batch.images)
        assert torch.equal(outcome.delta, delta)
        loss = training_loss(twin, batch, delta, fixed, lam, smoothing=0.1)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        assert_near(outcome.losses.mean(), loss.detach(), 1e-12)
        with torch.no_grad():
            for ours, theirs, grad in zip(
                model.parameters(), twin.parameters(), grads, strict=True
            ):
                theirs -= 0.1 * grad
                assert_near(ours.detach(), theirs.detach(), 1e-12)
        twin.load_state_dict(model.state_dict())
        state.optimizer.state.clear()  # momentum is not the point
        assert outcome.steps.tolist() == [1] * 8
    if batch_norm:
        assert int(model.norm.num_batches_tracked) == 2 * 3  # pyright: ignore[reportArgumentType]


def test_the_penalty_is_differentiated_through_the_second_gradient() -> None:
    # Against central differences in every weight of a layer, the first gradient held fixed.
    batch, model, objective = batch_of(6), Smooth(), Aligned(lam=2.0)
    zero = torch.zeros_like(batch.images)
    oracle = oracle_of(model, batch, objective)
    fixed = slope(model, batch.images, batch.labels)
    oracle.set_reference(fixed, eta_of(batch))
    oracle.theta_grad(zero)
    h = 1e-6
    for weight in (model.first.weight, model.first.bias, model.last.weight):
        assert weight.grad is not None
        flat, grad = weight.data.view(-1), weight.grad.view(-1)
        for index in range(0, len(flat), 1 + len(flat) // 12):
            ends = []
            for sign in (1, -1):
                was = float(flat[index])
                flat[index] += sign * h
                there = slope(model, batch.images + eta_of(batch), batch.labels)
                natural = F.cross_entropy(model(batch.images), batch.labels)
                ends.append(float((natural + 2 * (1 - cosines(fixed, there).mean())).detach()))
                flat[index] = was
            wanted = (ends[0] - ends[1]) / (2 * h)
            assert abs(float(grad[index]) - wanted) <= 1e-7 * (1 + abs(wanted))


def test_the_penalty_is_not_differentiated_through_the_first_gradient() -> None:
    batch, grads = batch_of(6), []
    for fixed in (True, False):
        model = Smooth()
        first = slope(model, batch.images, batch.labels, graph=not fixed)
        there = slope(model, batch.images + eta_of(batch), batch.labels, graph=True)
        penalty = (1 - cosines(first, there)).mean()
        natural = F.cross_entropy(model(batch.images), batch.labels)
        grads.append(torch.autograd.grad(natural + penalty, model.first.weight)[0])
    model = Smooth()
    oracle = oracle_of(model, batch, Aligned(lam=1.0))
    oracle.set_reference(slope(model, batch.images, batch.labels), eta_of(batch))
    oracle.theta_grad(torch.zeros_like(batch.images))
    assert model.first.weight.grad is not None
    assert_near(model.first.weight.grad, grads[0], 1e-13)
    assert float((grads[0] - grads[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [Zero(), Uniform()])
def test_without_a_penalty_the_weights_are_those_of_fgsm(norm: str, start: Zero | Uniform) -> None:
    algorithm = gradalign(norm, lam=0.0, start=start)
    fgsm = Pgd(steps=1, step_size="1.25*eps", start=start, attack_bn="train")
    ours, theirs = (tiny_net(batch_norm=True) for _ in range(2))
    one, two = state_of(ours, algorithm), state_of(theirs)
    for seed in range(3):
        algorithm.step(one, batch_of(8, seed=seed))
        fgsm.build(ball_of(norm), Plain()).step(two, batch_of(8, seed=seed))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    means = [net.norm.running_mean for net in (ours, theirs)]
    assert not torch.equal(*means)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_radius_it_is_natural_training_to_rounding(norm: str) -> None:
    algorithm = gradalign(norm, eps=0.0, lam=5.0)
    ours, theirs = tiny_net(), tiny_net()
    one, two = state_of(ours, algorithm), state_of(theirs)
    for seed in range(2):
        algorithm.step(one, batch_of(8, seed=seed))
        Natural().build(ball_of(norm), Plain()).step(two, batch_of(8, seed=seed))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a.detach(), b.detach(), 1e-12)


def test_a_linear_network_of_two_classes_has_nothing_to_align() -> None:
    # Its gradients all point along one line: cos = 1, and stays 1 whatever the weights.
    base = batch_of(8, classes=2)
    ours, theirs = (
        Affine(torch.randn(1, 8, 8, generator=generator(0), dtype=torch.float64)) for _ in "ab"
    )
    algorithm, plain = gradalign(lam=1e3), gradalign(lam=0.0)
    outcome = algorithm.step(state_of(ours, algorithm), base)
    wanted = plain.step(state_of(theirs, plain), base)
    assert_near(outcome.losses, wanted.losses, 1e-12)
    assert_near(ours.slope.detach(), theirs.slope.detach(), 1e-11)


class Masked(nn.Module):
    """A smooth network for bright images; dark ones are classified without being looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.flatten(1).mean(1) > 0.5).double()
        return self.inner(x) * bright.view(-1, 1)


def test_samples_without_a_gradient_have_no_penalty_and_do_not_spoil_the_others() -> None:
    base = batch_of(6)
    light = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64).view(-1, 1, 1, 1)
    images = 0.1 * base.images + 0.8 * light
    batch = Batch(images, base.labels, base.index, base.rng)
    model, objective = Masked(), Aligned(lam=4.0)
    fixed = slope(model, images, batch.labels)
    there = slope(model, images + eta_of(batch), batch.labels)
    dark = fixed.flatten(1).abs().sum(1) == 0
    assert dark.tolist() == [False, True, False, True, True, False]
    assert torch.equal(dark, there.flatten(1).abs().sum(1) == 0)
    oracle, zero = oracle_of(model, batch, objective), torch.zeros_like(images)
    oracle.set_reference(fixed, eta_of(batch))
    losses = oracle.theta_grad(zero)
    plain = F.cross_entropy(model(images), batch.labels, reduction="none").detach()
    penalty = 4 * (1 - cosines(fixed[~dark], there[~dark]))
    assert_near(losses[dark], plain[dark], 0)
    assert_near(losses[~dark], plain[~dark] + penalty, 1e-12)
    # The gradient is that of the bright samples, and the mean is still over all.
    found = model.inner.first.weight.grad
    second = slope(model.inner, (images + eta_of(batch))[~dark], batch.labels[~dark], graph=True)
    natural = F.cross_entropy(model(images), batch.labels)
    total = natural + 4 * (1 - cosines(fixed[~dark], second)).sum() / 6
    (wanted,) = torch.autograd.grad(total, model.inner.first.weight)
    assert found is not None and bool(found.isfinite().all())
    assert_near(found, wanted, 1e-12)


@pytest.mark.parametrize("dark", [0, 1, 4])
def test_a_share_of_zero_gradients_weakens_the_public_penalty_by_that_share(dark: int) -> None:
    base, count = batch_of(6), 6
    light = (torch.arange(count) >= dark).double().view(-1, 1, 1, 1)
    images = 0.1 * base.images + 0.8 * light
    batch, model = Batch(images, base.labels, base.index, base.rng), Masked()
    fixed = slope(model, images, batch.labels)
    there = slope(model, images + eta_of(batch), batch.labels)
    bright = fixed.flatten(1).norm(dim=1) > 0
    assert int(bright.sum()) == count - dark
    zero = torch.zeros_like(images)
    losses = Aligned(lam=4.0).outer(model, batch, zero, (fixed, eta_of(batch)))
    public = 1 - cosines(fixed[bright], there[bright]).mean()  # over the others only
    natural = F.cross_entropy(model(images), batch.labels)
    assert_near((losses.mean() - natural).detach(), (1 - dark / count) * 4 * public, 1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_both_gradients_being_zero_is_enough_to_have_no_penalty(which: int) -> None:
    batch, model = batch_of(6), Smooth()
    fixed = slope(model, batch.images, batch.labels)
    if which:
        with torch.no_grad():
            model.last.weight.zero_()  # the second gradient is zero, and its length has a kink
    else:
        fixed = torch.zeros_like(fixed)
    oracle, zero = oracle_of(model, batch, Aligned(lam=4.0)), torch.zeros_like(fixed)
    oracle.set_reference(fixed, eta_of(batch))
    losses = oracle.theta_grad(zero)
    plain = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
    assert torch.equal(losses, plain.detach())
    grads = torch.autograd.grad(plain.mean(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert_near(parameter.grad, grad, 1e-14)


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-17, 1e-19, 1e-21, 1e-24, 1e-30])
def test_an_angle_does_not_depend_on_how_short_the_gradients_are(size: float) -> None:
    # In float32 the squares of a sure sample's gradients vanish, and one over them is infinite.
    one = torch.randn(4, 1, 8, 8, generator=generator(0))
    other = one + 0.5 * torch.randn(4, 1, 8, 8, generator=generator(1))
    batch, objective = batch_of(4, dtype=torch.float32), Aligned(lam=1.0)
    turn = other.clone().requires_grad_(True)

    def predict(images: Tensor) -> Tensor:
        """Two logits whose loss has the gradient -size * turn / 2 for the images."""
        score = size * (images * turn).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)

    labels = torch.ones_like(batch.labels)
    batch = Batch(batch.images, labels, batch.index, batch.rng)
    zero = torch.zeros_like(batch.images)
    # At zero pixels the prediction is one half whatever the size.
    batch = Batch(zero, labels, batch.index, batch.rng)
    losses = objective.outer(predict, batch, zero, (-size * one, zero))
    penalty = losses.detach() - F.cross_entropy(predict(zero), labels, reduction="none").detach()
    (grad,) = torch.autograd.grad(losses.sum(), turn)
    wide = other.double().requires_grad_(True)
    wanted = 1 - cosines(one.double(), wide)
    (slopes,) = torch.autograd.grad(wanted.sum(), wide)
    assert_near(penalty.double(), wanted.detach(), 1e-5)
    assert_near(grad.double(), slopes, 1e-5)


@pytest.mark.parametrize("sure", [20.0, 43.0, 47.0, 50.0, 53.0, 60.0])
def test_one_sure_sample_does_not_ruin_the_weights(sure: float) -> None:
    # A margin of 50 nats has a gradient of 1e-21: a single such image must not bring NaN.
    model = Affine(torch.full((1, 8, 8), -sure / 64))  # label 0, and the other logit far below
    base = batch_of(4, dtype=torch.float32)
    light = torch.tensor([1.0, 0.6, 0.3, 0.1]).view(-1, 1, 1, 1)
    images = light * torch.ones_like(base.images)
    batch = Batch(images, torch.zeros_like(base.labels), base.index, base.rng)
    algorithm = gradalign(eps=0.001)
    outcome = algorithm.step(state_of(model, algorithm), batch)
    assert bool(outcome.losses.isfinite().all())
    assert bool(model.slope.isfinite().all())


@pytest.mark.parametrize("norm", NORMS)
def test_the_noise_fills_the_ball_and_is_neither_clipped_nor_the_start(norm: str) -> None:
    batch, seen = batch_of(8), list[Tensor]()

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.inner(x)

    model = Watching()
    algorithm = gradalign(norm, start=Uniform())
    outcome = algorithm.step(state_of(model, algorithm), batch)
    assert len(seen) == 3
    start = Uniform().delta(ball_of(norm), batch, None)
    assert torch.equal(seen[0], batch.images + start)
    assert torch.equal(seen[1], batch.images + outcome.delta)
    assert torch.equal(seen[2], batch.images + eta_of(batch, norm))
    assert float(seen[2].min()) < 0 or float(seen[2].max()) > 1
    assert float(seen[1].min()) >= 0 and float(seen[1].max()) <= 1
    assert not torch.equal(seen[0], seen[2])


def test_it_keeps_no_perturbation_and_does_not_go_with_gradients_at_other_weights() -> None:
    recipe = GradAlign.model_validate({"name": "gradalign", "start": "remembered"})
    with pytest.raises(ValueError, match="start: gradalign keeps no perturbation per image"):
        recipe.build(ball_of("linf"), Plain())
    with pytest.raises(ValueError, match="outer: awp does not go with gradalign"):
        GradAlign().build(ball_of("linf"), Awp())
    algorithm = gradalign()
    assert state_of(tiny_net(), algorithm).parts == {}


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.2, 0.0])
def test_it_costs_eleven_forwards(lam: float) -> None:
    # Two for the FGSM gradient, three for the update, two for the second gradient, four for its own.
    algorithm = gradalign(lam=lam)
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    assert state.meter == Meter(forwards=8 * 3, input_backwards=8 * 2, full_backwards=8 * 3)
    assert state.meter.fe == 8 * 11


class Counting(TorchDispatchMode):
    """Adds up operations by torch's own formulas; FlopCounterMode itself trips over second gradients."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def operations(algorithm: AbstractAlgorithm, model: nn.Module) -> int:
    state = state_of(model, algorithm)
    with Counting() as counter:
        algorithm.step(state, batch_of(4))
    return counter.total


class Deep(nn.Module):
    """Six convolutions of one width, so that the first layer, which has no gradient to hand on, is small."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *[12] * 6]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False)
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.linear = nn.Linear(12, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.linear(x.mean((2, 3)))


def test_eleven_forwards_are_what_it_really_computes() -> None:
    natural = operations(Natural().build(ball_of("linf"), Plain()), Deep())
    assert abs(3 * operations(gradalign(), Deep()) / natural - 11) <= 0.25
