"""TRADES and MART: their losses against torch's own functions, their costs, their limits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EPS,
    assert_near,
    ball_of,
    batch_of,
    generator,
    same,
    state_of,
    tiny_net,
)
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.algorithms import AbstractRecipe, MartRecipe, Natural, Pgd, TradesRecipe
from raytrain.attacks import Gaussian, ProjectedAscent, Zero
from raytrain.core.cost import Meter
from raytrain.core.losses import (
    AbstractLoss,
    CrossEntropy,
    Mart,
    Trades,
    cross_entropy,
    kl_divergence,
)
from raytrain.core.oracle import Oracle
from raytrain.core.types import Batch, BatchNorm, Progress
from raytrain.outer import Plain

NORMS = ["linf", "l2", "l1"]


def logits_of(
    num: int, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    drawn = torch.randn(num, classes, generator=generator(seed), dtype=torch.float64)
    return (3 * drawn).to(dtype)


def oracle_of(
    model: nn.Module,
    batch: Batch,
    objective: AbstractLoss,
    bn: BatchNorm = "eval",
    meter: Meter | None = None,
) -> Oracle:
    return Oracle(model, objective, batch, meter or Meter(), attack_bn=bn)


def perturbed(batch: Batch, seed: int = 9) -> Tensor:
    """Some feasible perturbation."""
    raw = torch.randn(batch.images.shape, generator=generator(seed), dtype=torch.float64)
    return ball_of("linf").feasible(EPS["linf"] * raw, batch.images)


class Shown(nn.Module):
    """Logits that are the pixels themselves: a loss becomes a function of two rows of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def outer_of(objective: AbstractLoss, clean: Tensor, moved: Tensor, labels: Tensor) -> Tensor:
    """The training loss for these clean and perturbed logits."""
    shape = (len(clean), 1, 1, clean.shape[1])
    batch = Batch(clean.view(shape), labels, torch.arange(len(clean)), batch_of(1).rng)
    return objective.outer(Shown(), batch, (moved - clean).view(shape), ())


def trades_by_torch(
    clean: Tensor, moved: Tensor, labels: Tensor, beta: float, smoothing: float = 0.0
) -> Tensor:
    """The mean TRADES loss with torch's own loss functions."""
    natural = F.cross_entropy(clean, labels, label_smoothing=smoothing)
    # kl_div(log q, p) is KL(p | q), batchmean divides its sum by the number of rows alone.
    robust = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
    return natural + beta * robust


def mart_by_torch(clean: Tensor, moved: Tensor, labels: Tensor, beta: float) -> Tensor:
    """The mean MART loss as its public code writes it, sorting and all, but for the 1e-12 in the KL."""
    probabilities = moved.softmax(1)
    order = probabilities.argsort(1)
    other = torch.where(order[:, -1] == labels, order[:, -2], order[:, -1])
    boosted = F.cross_entropy(moved, labels) + F.nll_loss(
        torch.log(1.0001 - probabilities + 1e-12), other
    )
    true = clean.softmax(1).gather(1, labels[:, None])[:, 0]
    kl = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    return boosted + beta * (kl * (1.0000001 - true)).mean()


# --- losses -----------------------------------------------------------------------------------


def test_the_divergence_is_torchs_with_the_clean_prediction_first() -> None:
    clean, moved = logits_of(7), logits_of(7, seed=1)
    found = kl_divergence(clean, moved)
    wanted = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
    assert_near(found.mean(), wanted, 1e-13)
    assert abs(float(found.mean() - kl_divergence(moved, clean).mean())) > 1e-2
    p, q = clean.softmax(1), moved.softmax(1)
    assert_near(found, (p * (p / q).log()).sum(1), 1e-13)
    assert float(found.min()) > 0


def test_a_prediction_diverges_from_itself_by_exactly_nothing() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = logits_of(50, dtype=dtype)
        assert not kl_divergence(logits, logits.clone()).any()
        assert not kl_divergence(1e4 * logits, 1e4 * logits).any()
    shifted = kl_divergence(logits_of(50), logits_of(50) + 100)
    assert float(shifted.abs().max()) <= 1e-12


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_trades_loss_is_that_of_the_paper(beta: float, smoothing: float) -> None:
    clean, moved = logits_of(9), logits_of(9, seed=1)
    labels = torch.randint(5, (9,), generator=generator(2))
    found = outer_of(Trades(beta=beta, label_smoothing=smoothing), clean, moved, labels)
    assert_near(found.mean(), trades_by_torch(clean, moved, labels, beta, smoothing), 1e-13)
    for row in range(9):  # a sample's loss is its own
        rows = slice(row, row + 1)
        alone = trades_by_torch(clean[rows], moved[rows], labels[rows], beta, smoothing)
        assert_near(found[row], alone, 1e-13)


@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_the_mart_loss_is_that_of_the_public_code(beta: float, classes: int) -> None:
    clean, moved = logits_of(40, classes), logits_of(40, classes, seed=1)
    labels = torch.randint(classes, (40,), generator=generator(2))
    found = outer_of(Mart(beta=beta), clean, moved, labels)
    assert_near(found.mean(), mart_by_torch(clean, moved, labels, beta), 1e-12)
    alone = outer_of(Mart(beta=beta), clean[:1], moved[:1], labels[:1])
    assert_near(alone, found[:1], 1e-13)
    assert_near(alone[0], mart_by_torch(clean[:1], moved[:1], labels[:1], beta), 1e-12)


def test_the_divergence_of_mart_is_exact_and_the_public_one_is_bounded_by_its_constant() -> None:
    clean, moved = logits_of(9), 10 * logits_of(9, seed=1)  # some probabilities far below 1e-12
    labels = torch.randint(5, (9,), generator=generator(2))
    p, q = clean.softmax(1), moved.softmax(1)
    rest = 1.0000001 - p.gather(1, labels[:, None])[:, 0]
    whole, without = (outer_of(Mart(beta=beta), clean, moved, labels) for beta in (1.0, 0.0))
    ours = (whole - without) / rest
    public = (p * (p.log() - (q + 1e-12).log())).sum(1)
    assert_near(ours, (p * (clean.log_softmax(1) - moved.log_softmax(1))).sum(1), 1e-9)
    assert_near(ours - public, (p * torch.log1p(1e-12 / q)).sum(1), 1e-9)
    assert float((ours - public).max()) > 1 and float(public.max()) <= 27.7
    near = logits_of(9, seed=1)
    assert float(near.softmax(1).min()) > 1e-9
    public = (p * (p.log() - (near.softmax(1) + 1e-12).log())).sum(1)
    assert_near(kl_divergence(clean, near), public, 1e-3)


def test_smoothing_of_the_other_classes_only_is_a_smaller_share_of_all() -> None:
    logits, labels = logits_of(7), torch.randint(5, (7,), generator=generator(2))
    target = torch.full((7, 5), 0.3 / 4, dtype=torch.float64).scatter(1, labels[:, None], 0.7)
    wanted = -(target * logits.log_softmax(1)).sum(1)  # as the public code of Pang et al. has it
    assert_near(cross_entropy(logits, labels, 0.3 * 5 / 4), wanted, 1e-13)


@pytest.mark.parametrize("kind", ["trades", "mart"])
def test_gradients_go_through_both_branches_and_the_weight(kind: str) -> None:
    found, wanted = [], []
    labels = torch.randint(5, (9,), generator=generator(2))
    for results in (found, wanted):
        clean = logits_of(9).requires_grad_(True)
        moved = logits_of(9, seed=1).requires_grad_(True)
        if results is wanted:
            by_torch = trades_by_torch if kind == "trades" else mart_by_torch
            loss = by_torch(clean, moved, labels, 4.0)
        else:
            objective = Trades(beta=4.0) if kind == "trades" else Mart(beta=4.0)
            loss = outer_of(objective, clean, moved, labels).mean()
        # moved - clean is added to clean again: its gradient must not be counted there.
        results.extend(torch.autograd.grad(loss, (clean, moved)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(ours.abs().max()) > 1e-3
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize(
    "recipe", [TradesRecipe(beta=3.0, steps=2), MartRecipe(beta=3.0, steps=2)]
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_step_moves_the_weights_along_the_gradient_of_that_loss(
    recipe: TradesRecipe | MartRecipe, batch_norm: bool
) -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=batch_norm)
    algorithm, twin = recipe.build(ball_of("linf"), Plain()), copy.deepcopy(model).train()
    outcome = algorithm.step(state_of(model, algorithm), batch)
    clean, moved = twin(batch.images), twin(batch.images + outcome.delta)
    by_torch = trades_by_torch if isinstance(recipe, TradesRecipe) else mart_by_torch
    loss = by_torch(clean, moved, batch.labels, 3.0)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    for ours, theirs, grad in zip(model.parameters(), twin.parameters(), grads, strict=True):
        assert_near(ours.detach(), (theirs - 0.1 * grad).detach(), 1e-12)
    assert_near(outcome.losses.mean(), loss.detach(), 1e-12)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # the clean pass first, each of them once


@pytest.mark.parametrize("objective", [Trades(), Mart(), CrossEntropy()])
def test_half_precision_logits_make_losses_of_single_precision(
    objective: AbstractLoss,
) -> None:
    clean, moved = (logits_of(9, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    labels = torch.randint(5, (9,), generator=generator(2))
    shape = (9, 1, 1, 5)
    batch = Batch(clean.view(shape), labels, torch.arange(9), batch_of(1).rng)
    zero = torch.zeros_like(batch.images)
    rows = iter([moved] if isinstance(objective, CrossEntropy) else [clean, moved])
    losses = objective.outer(lambda images: next(rows), batch, zero, ())
    assert losses.dtype == torch.float32
    rows = iter([moved] if isinstance(objective, CrossEntropy) else [clean, moved])
    exact = objective.outer(lambda images: next(rows).double(), batch, zero, ())
    assert exact.dtype == torch.float64
    assert_near(losses.double(), exact, 1e-5)
    inner = objective.inner(lambda images: moved, batch, zero, (clean,))
    assert inner.dtype == torch.float32


# --- limits -----------------------------------------------------------------------------------


def test_without_beta_trades_has_the_gradient_of_natural_training_but_other_statistics() -> None:
    ours, theirs = (tiny_net(batch_norm=True) for _ in range(2))
    algorithm = TradesRecipe(beta=0.0, steps=3).build(ball_of("linf"), Plain())
    natural = Natural().build(ball_of("linf"), Plain())
    one, two = state_of(ours, algorithm), state_of(theirs)
    algorithm.step(one, batch_of(8))
    natural.step(two, batch_of(8))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    means = [net.norm.running_mean for net in (ours, theirs)]
    assert isinstance(means[0], Tensor) and isinstance(means[1], Tensor)
    assert float((means[0] - means[1]).abs().max()) > 1e-3
    counts = [int(net.norm.num_batches_tracked) for net in (ours, theirs)]  # pyright: ignore
    assert counts == [2, 1]
    plain = [tiny_net() for _ in range(2)]  # nothing to tell them apart without BatchNorm
    algorithm.step(state_of(plain[0], algorithm), batch_of(8))
    natural.step(state_of(plain[1]), batch_of(8))
    assert same(*plain)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_radius_trades_is_natural_training_to_rounding(norm: str) -> None:
    ours, theirs = (tiny_net(batch_norm=True) for _ in range(2))
    algorithm = TradesRecipe(steps=2).build(ball_of(norm, 0.0), Plain())
    one, two = state_of(ours, algorithm), state_of(theirs)
    for seed in range(2):
        algorithm.step(one, batch_of(8, seed=seed))
        Natural().build(ball_of(norm), Plain()).step(two, batch_of(8, seed=seed))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a.detach(), b.detach(), 1e-12)


def test_without_a_radius_mart_is_training_on_boosted_cross_entropy() -> None:
    batch, model = batch_of(8), tiny_net()
    algorithm, twin = MartRecipe().build(ball_of("linf", 0.0), Plain()), copy.deepcopy(model)
    outcome = algorithm.step(state_of(model, algorithm), batch)
    p = twin(batch.images).softmax(1)
    own = p.gather(1, batch.labels[:, None])[:, 0]
    other = p.scatter(1, batch.labels[:, None], -1.0).amax(1)
    boosted = -own.log() - (1.0001 - other).log()
    assert_near(outcome.losses, boosted.detach(), 1e-11)
    grads = torch.autograd.grad(boosted.mean(), list(twin.parameters()))
    for a, b, grad in zip(model.parameters(), twin.parameters(), grads, strict=True):
        assert_near(a.detach(), (b - 0.1 * grad).detach(), 1e-11)


def test_the_runner_up_is_never_the_label_and_a_tie_is_no_trouble() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    moved = torch.tensor(
        [[9.0, 1, 0], [0, 4, 4], [1, 1, 1], [0, 5, 9]], dtype=torch.float64, requires_grad=True
    )
    found = outer_of(Mart(beta=0.0), moved.detach(), moved, labels)
    p = moved.detach().softmax(1)
    runner_up = torch.stack([p[0, 1], p[1, 1], p[2, 1], p[3, 1]])
    wanted = F.cross_entropy(moved.detach(), labels, reduction="none") - torch.log(
        1.0001 - runner_up + 1e-12
    )
    assert_near(found.detach(), wanted, 1e-13)
    (grad,) = torch.autograd.grad(found.sum(), moved)
    assert bool(grad.isfinite().all())
    assert float(grad.sum(1).abs().max()) <= 1e-13  # a shift of all logits changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sure_clean_prediction_switches_the_divergence_off(dtype: torch.dtype) -> None:
    clean = torch.tensor([[200.0, 0, 0], [0.0, 200, 0]], dtype=dtype)
    moved = torch.tensor([[1.0, 2, 0], [1.0, 2, 0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0])
    objective, plain = Mart(beta=5.0), Mart(beta=0.0)

    def loss(chosen: Mart) -> Tensor:
        rows = iter([clean, moved])
        images = torch.zeros(2, 1, 1, 3, dtype=dtype)
        batch = Batch(images, labels, torch.arange(2), batch_of(1).rng)
        return chosen.outer(lambda images: next(rows), batch, images, ())

    extra = loss(objective) - loss(plain)
    divergence = kl_divergence(clean, moved)
    # What is left is 1.0000001 - p_y: about 1e-7 for a sure one, and one for a wrong one.
    assert 0 < float(extra[0].detach()) <= 5 * 2e-7 * float(divergence[0].detach()) + 1e-6
    assert_near(extra[1].detach(), 5 * 1.0000001 * divergence[1].detach(), 1e-6)
    (grad,) = torch.autograd.grad(loss(objective).sum(), moved)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [Trades(), Mart()])
def test_very_sure_and_very_wrong_predictions_have_finite_gradients(
    objective: AbstractLoss, dtype: torch.dtype
) -> None:
    clean = torch.tensor([[80.0, 0, 0], [0, 80, 0], [80, 0, 0], [1e4, 0, 0]], dtype=dtype)
    moved = torch.tensor([[0, 80.0, 0], [0, 80, 0], [80, 0, 0], [0, 1e4, 0]], dtype=dtype)
    labels = torch.tensor([0, 0, 0, 0])
    clean.requires_grad_(True)
    moved.requires_grad_(True)
    rows = iter([clean, moved])
    images = torch.zeros(4, 1, 1, 3)
    batch = Batch(images, labels, torch.arange(4), batch_of(1).rng)
    losses = objective.outer(lambda images: next(rows), batch, images, ())
    assert bool(losses.isfinite().all()) and float(losses.detach().min()) >= -1e-3
    for grad in torch.autograd.grad(losses.sum(), (clean, moved)):
        assert bool(grad.isfinite().all())


# --- attacks ----------------------------------------------------------------------------------


def test_the_divergence_has_no_gradient_at_no_perturbation_so_the_attack_needs_its_noise() -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=True)
    oracle = oracle_of(model, batch, Trades())
    start = Gaussian().delta(ball_of("linf"), batch, None)
    sizes = []
    for delta in (torch.zeros_like(batch.images), start):
        losses, grad = oracle.delta_grad(delta)
        sizes.append((float(losses.max()), float(grad.abs().max())))
    assert sizes[0][0] == 0 and sizes[0][1] <= 1e-15
    assert sizes[1][0] > 1e-9 and sizes[1][1] > 1e-6
    # In l2 a step along rounding errors is as long as any other, and leads nowhere in particular.
    gains = []
    for begun in (Zero(), Gaussian()):
        attack = ProjectedAscent(start=begun, steps=1, step_size="eps", bn="eval")
        oracle = oracle_of(model, batch, Trades())
        ball = ball_of("l2")
        found = attack.maximise(oracle, ball, begun.delta(ball, batch, None), Progress(0.0, 0.0))
        gains.append(float(oracle.losses(found.delta).mean()))
    assert gains[1] > gains[0]


@pytest.mark.parametrize("bn", ["eval", "train", "batch_nostat"])
def test_clean_logits_of_the_attack_are_computed_once_in_its_own_mode(bn: BatchNorm) -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=True)
    with torch.no_grad():  # statistics that are not those of the batch
        assert isinstance(model.norm.running_mean, Tensor)
        model.norm.running_mean.add_(0.5)
    twin, meter = copy.deepcopy(model), Meter()
    twin.train(bn != "eval")
    oracle = oracle_of(model, batch, Trades(), bn, meter)
    (clean,) = oracle.reference
    for seed in (1, 2, 3):
        losses, _ = oracle.delta_grad(perturbed(batch, seed))
    assert meter == Meter(forwards=8 * 4, input_backwards=8 * 3)
    wanted = twin(batch.images).detach()
    assert torch.equal(clean, wanted) and not clean.requires_grad
    there = kl_divergence(wanted, twin(batch.images + perturbed(batch, 3))).detach()
    assert_near(losses, there, 1e-13)


@pytest.mark.parametrize("attack_bn", ["eval", "batch_nostat"])
def test_the_attack_of_trades_climbs_the_divergence_written_out(attack_bn: BatchNorm) -> None:
    batch, model, eps = batch_of(8), tiny_net(batch_norm=True), EPS["linf"]
    recipe = TradesRecipe(steps=3, step_size="eps/3", attack_bn=attack_bn, label_smoothing=0.3)
    algorithm, twin = recipe.build(ball_of("linf"), Plain()), copy.deepcopy(model)
    found = algorithm.step(state_of(model, algorithm), batch).delta
    twin.train(attack_bn != "eval")
    clean = twin(batch.images).softmax(1).detach()
    noise = batch.rng.normal("start", 1, 8, 8).double()
    delta = torch.max(torch.min(0.001 * noise, 1 - batch.images), -batch.images)
    for _ in range(3):
        delta = delta.requires_grad_(True)
        moved = twin(batch.images + delta).log_softmax(1)
        (up,) = torch.autograd.grad(F.kl_div(moved, clean, reduction="sum"), delta)
        delta = (delta + eps / 3 * up.sign()).clamp(-eps, eps).detach()
        delta = torch.max(torch.min(delta, 1 - batch.images), -batch.images)
    assert_near(found, delta, 1e-15)


def test_in_l2_the_attack_of_trades_projects_on_the_ball_and_then_clips_to_the_box() -> None:
    batch, eps = batch_of(8), EPS["l2"]
    recipe, twin = TradesRecipe(steps=3, step_size="0.8*eps"), tiny_net()
    algorithm = recipe.build(ball_of("l2"), Plain())
    found = algorithm.step(state_of(tiny_net(), algorithm), batch).delta
    clean = twin(batch.images).softmax(1).detach()

    def length(delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def ball(delta: Tensor) -> Tensor:
        return delta * (eps / length(delta)).clamp(max=1)

    def box(delta: Tensor) -> Tensor:
        return torch.max(torch.min(delta, 1 - batch.images), -batch.images)

    ends = []
    for project in (lambda delta: box(ball(delta)), lambda delta: ball(box(delta))):
        delta = box(0.001 * batch.rng.normal("start", 1, 8, 8).double())
        for _ in range(3):
            delta = delta.requires_grad_(True)
            moved = twin(batch.images + delta).log_softmax(1)
            (up,) = torch.autograd.grad(F.kl_div(moved, clean, reduction="sum"), delta)
            delta = project((delta + 0.8 * eps * up / length(up)).detach())
        ends.append(delta)
    assert_near(found, ends[0], 1e-12)
    assert float((found - ends[1]).abs().max()) > 1e-3  # the order of the public code
    # Of any displacement, ours keeps no more, and as much where the box does not bind.
    for seed in range(20):
        far = torch.randn(batch.images.shape, generator=generator(seed)).double() / (seed + 1)
        assert bool((length(box(ball(far))) <= length(ball(box(far))) * (1 + 1e-15)).all())
        free = far * ((batch.images > 0.4) & (batch.images < 0.6))
        near = free * (0.3 / free.abs().amax((1, 2, 3), keepdim=True))
        assert torch.equal(box(ball(near)), ball(box(near)))


@pytest.mark.parametrize("mu", [0.4, 0.7])
def test_running_statistics_weigh_clean_and_perturbed_images_by_their_order(mu: float) -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=True)
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = mu
    twin = copy.deepcopy(model).train()
    recipe = TradesRecipe(steps=1, attack_bn="batch_nostat")
    algorithm = recipe.build(ball_of("linf"), Plain())
    state = state_of(model, algorithm, lr=0.0)  # the same images, weights and delta every time
    delta = [algorithm.step(state, batch).delta for _ in range(40)][-1]
    shown = {"clean": batch.images, "perturbed": batch.images + delta}
    means = {name: model.conv1(images).mean((0, 2, 3)) for name, images in shown.items()}
    for _ in range(40):  # the public code
        for name in ("clean", "perturbed", "clean"):
            twin(shown[name])
    shares = (1 / (2 - mu), (1 - mu) / (1 + (1 - mu) + (1 - mu) ** 2))
    for layer, share in zip((norm, twin.norm), shares, strict=True):
        wanted = share * means["perturbed"] + (1 - share) * means["clean"]
        assert isinstance(layer.running_mean, Tensor)
        assert_near(layer.running_mean, wanted.detach(), 1e-12)


def test_the_attack_of_mart_is_that_of_pgd_from_the_same_start() -> None:
    start = Gaussian()
    recipes = (MartRecipe(steps=3), Pgd(steps=3, start=start))
    found = []
    for recipe in recipes:
        algorithm = recipe.build(ball_of("linf"), Plain())
        found.append(algorithm.step(state_of(tiny_net(), algorithm), batch_of(8)).delta)
    assert torch.equal(*found)


def test_smoothed_labels_change_what_is_trained_and_not_what_is_attacked() -> None:
    batch, deltas, models = batch_of(8), [], []
    for smoothing in (0.0, 0.4):
        recipe = TradesRecipe(steps=3, label_smoothing=smoothing)
        algorithm = recipe.build(ball_of("linf"), Plain())
        models.append(tiny_net())
        deltas.append(algorithm.step(state_of(models[-1], algorithm), batch).delta)
        objective = CrossEntropy(label_smoothing=smoothing)
        losses, _ = oracle_of(tiny_net(), batch, objective).delta_grad(perturbed(batch))
        logits = tiny_net()(batch.images + perturbed(batch)).detach()
        assert_near(losses, cross_entropy(logits, batch.labels), 1e-14)
    assert torch.equal(*deltas) and not same(*models)


def test_mart_has_no_smoothed_labels() -> None:
    assert "label_smoothing" not in MartRecipe.model_fields
    with pytest.raises(ValidationError, match="label_smoothing"):
        MartRecipe.model_validate({"name": "mart", "label_smoothing": 0.1})


@pytest.mark.parametrize("field", ["beta"])
@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_weights_of_the_divergence_that_make_no_sense_are_refused(field: str, bad: float) -> None:
    for kind in (TradesRecipe, MartRecipe):
        with pytest.raises(ValidationError, match=field):
            kind.model_validate({"name": kind.model_fields["name"].default, field: bad})


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("kind", [TradesRecipe, MartRecipe])
def test_they_cost_what_their_cards_say(kind: Any, steps: int) -> None:
    recipe: AbstractRecipe = kind(steps=steps)
    algorithm = recipe.build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    # Without a step TRADES needs no clean logits for the attack.
    once = 1 if kind is TradesRecipe and steps else 0
    assert state.meter == Meter(
        forwards=8 * (steps + 2 + once), input_backwards=8 * steps, full_backwards=8 * 2
    )
    assert state.meter.fe == 8 * (2 * steps + 6 + once)


@pytest.mark.parametrize("kind", [TradesRecipe, MartRecipe])
def test_a_batch_of_one_is_trained_on_as_any_other(kind: Any) -> None:
    recipe: AbstractRecipe = kind(steps=2)
    algorithm = recipe.build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm, batch_size=1)
    outcome = algorithm.step(state, batch_of(1))
    assert outcome.losses.shape == (1,) and bool(outcome.losses.isfinite().all())
    assert not same(state.model, tiny_net())
