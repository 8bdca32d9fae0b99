"""L2L: a sign-fed attacker is PGD, and its meta-gradient is the one through the whole graph."""

from __future__ import annotations

import copy
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    EPS,
    Affine,
    assert_near,
    ball_of,
    batch_of,
    generator,
    rng_of,
    same,
    state_of,
    tensors,
    tiny_net,
)
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.algorithms import AbstractRecipe, L2l, Pgd, TradesRecipe
from raytrain.algorithms.l2l import Learned
from raytrain.attacks import AttackerSpec, LearnedAscent, Uniform, Zero
from raytrain.attacks.learned import Attacker
from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.losses import CrossEntropy
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import in_box
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch
from raytrain.outer import Plain

CELLS = ["lstm", "gru", "rnn", "linear"]
FEATURES = ["rms", "linf", "sign", "logsign", "raw"]


def learned(norm: str = "linf", eps: float | None = None, **fields: Any) -> Learned:
    """L2L with four steps of a small attacker, unless told otherwise."""
    algorithm = L2l(**{"steps": 4, "hidden": 3, **fields}).build(ball_of(norm, eps), Plain())
    assert isinstance(algorithm, Learned)
    return algorithm


def trained(recipe: AbstractRecipe, batches: int = 3, *, norm: str = "linf") -> TrainState:
    """The state after some batches, counted as the loop counts them."""
    algorithm = recipe.build(ball_of(norm), Plain())
    state = state_of(tiny_net(batch_norm=True), algorithm)
    for seed in range(batches):
        algorithm.step(state, batch_of(8, seed=seed))
        state.step += 1
    return state


def attacker_of(state: TrainState) -> Attacker:
    return state.part("attacker", Attacker)


def built(seed: int = 3, **fields: Any) -> Attacker:
    """A float64 attacker whose steps are neither tiny nor saturated."""
    spec = AttackerSpec(**{"hidden": 3, "readout_scale": 1.0, **fields})
    return Attacker.seeded(spec, seed).double()


def ascent_of(**fields: Any) -> LearnedAscent:
    defaults = {"bn": "eval", "weighting": "t", "projection": "hard", "truncate": None}
    return LearnedAscent(**{"steps": 4, **defaults, **fields})


def oracle_of(model: nn.Module, batch: Batch, meter: Meter | None = None) -> Oracle:
    return Oracle(model, CrossEntropy(), batch, meter or Meter(), attack_bn="eval")


def start_of(norm: str, batch: Batch) -> Tensor:
    return Uniform().delta(ball_of(norm), batch, None)


def grads_of(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


class Watched(nn.Module):
    """A network that remembers the images it was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


# --- invariant 1: PGD and TRADES --------------------------------------------------------------


@pytest.mark.parametrize("loss", ["adv", "trades"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("squash", "layers", "projection", "phi_lr"),
    [
        ("tanh", 1, "hard", 0.1),  # flat: it cannot leave PGD, whatever the rate
        ("hardtanh", 1, "hard", 0.0),
        ("linear", 2, "straight_through", 0.0),
    ],
)
def test_an_attacker_that_begins_as_pgd_is_pgd_bit_for_bit(
    loss: str, cell: str, squash: str, layers: int, projection: str, phi_lr: float
) -> None:
    shared: dict[str, Any] = {"steps": 4, "label_smoothing": 0.1}
    ours = trained(
        L2l(
            **shared,
            loss=loss,  # pyright: ignore[reportArgumentType]
            cell=cell,  # pyright: ignore[reportArgumentType]
            squash=squash,  # pyright: ignore[reportArgumentType]
            projection=projection,  # pyright: ignore[reportArgumentType]
            layers=layers,
            hidden=3,
            features="sign",
            init="pgd",
            phi_lr=phi_lr,
        )
    )
    other = TradesRecipe(**shared) if loss == "trades" else Pgd(**shared)
    theirs = trained(other)
    assert same(ours.model, theirs.model)
    for one, two in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        momenta = [s.optimizer.state[p] for s, p in ((ours, one), (theirs, two))]
        assert torch.equal(momenta[0]["momentum_buffer"], momenta[1]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_of_such_an_attacker_is_the_sign_and_nothing_near_it(
    dtype: torch.dtype,
) -> None:
    grad = torch.randn(4, 1, 3, 3, generator=generator(0), dtype=dtype)
    grad[0, 0, 0, 0] = 0
    for cell, squash in itertools.product(CELLS, ["tanh", "hardtanh", "linear"]):
        attacker = built(cell=cell, squash=squash, features="sign", init="pgd").to(dtype)
        move, memory = attacker(grad, [])
        assert torch.equal(move, grad.sign())
        assert torch.equal(attacker(-grad, memory)[0], -grad.sign())


def test_from_pgd_hardtanh_learns_on_and_tanh_does_not() -> None:
    moved = {}
    for squash in ("tanh", "hardtanh"):
        recipe = L2l(steps=3, hidden=3, features="sign", init="pgd", squash=squash)
        begun = attacker_of(state_of(tiny_net(), recipe.build(ball_of("linf"), Plain())))
        moved[squash] = not same(attacker_of(trained(recipe, 2)), begun)
    assert moved == {"tanh": False, "hardtanh": True}


def test_only_signs_may_begin_as_pgd() -> None:
    for features in FEATURES:
        fields: dict[str, Any] = {"features": features, "init": "pgd"}
        if features == "sign":
            AttackerSpec(**fields)
        else:
            with pytest.raises(ValidationError, match="init=pgd needs features=sign"):
                L2l(**fields).build(ball_of("linf"), Plain())


# --- invariants 2 to 4: steps -----------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("cell", CELLS)
def test_an_attacker_of_zeros_stays_at_the_start(norm: str, cell: str) -> None:
    algorithm, batch = learned(norm, cell=cell, phi_lr=0.0), batch_of(8)
    state = state_of(tiny_net(), algorithm)
    with torch.no_grad():
        for parameter in attacker_of(state).parameters():
            parameter.zero_()
    found = algorithm.step(state, batch).delta
    # l2 rescales a start that rounding left outside by a part in 1e16.
    assert_near(found, start_of(norm, batch), 0 if norm == "linf" else 1e-15)
    assert torch.equal(found, in_box(found, batch.images))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("cell", CELLS)
def test_pixels_and_images_may_be_permuted_before_or_after_a_step(
    cell: str, features: str
) -> None:
    attacker = built(cell=cell, features=features, layers=2)
    pixels, images = torch.randperm(64, generator=generator(1)), torch.tensor([2, 0, 3, 1])

    def permuted(values: Tensor) -> Tensor:
        return values[images].flatten(1)[:, pixels].view_as(values)

    memories: list[list[Any]] = [[], []]
    for step in range(3):  # the memories must follow, too
        grad = torch.randn(4, 1, 8, 8, generator=generator(step), dtype=torch.float64)
        move, memories[0] = attacker(grad, memories[0])
        other, memories[1] = attacker(permuted(grad), memories[1])
        assert_near(other.detach(), permuted(move).detach(), 1e-14)


def test_a_permuted_batch_is_attacked_as_the_batch_is() -> None:
    batch, rows = batch_of(8), torch.tensor([5, 2, 7])
    start, attacker, model = start_of("linf", batch), built(), tiny_net(batch_norm=True)
    found = [
        ascent_of().maximise(
            oracle_of(model, batch[part]), ball_of("linf"), start[part], attacker, True
        )
        for part in (torch.arange(8), rows)
    ]
    assert_near(found[1].delta, found[0].delta[rows], 1e-13)


@pytest.mark.parametrize("squash", ["tanh", "hardtanh", "linear"])
def test_no_pixel_moves_further_than_the_scale_unless_steps_are_linear(squash: str) -> None:
    attacker = built(squash=squash, readout_scale=50.0)
    furthest, memory = 0.0, list[Any]()
    for step in range(4):
        grad = torch.randn(8, 1, 8, 8, generator=generator(step), dtype=torch.float64)
        move, memory = attacker(100 * grad, memory)
        furthest = max(furthest, float(move.detach().abs().max()))
    assert (furthest > 1) == (squash == "linear")
    assert furthest > 0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("projection", ["hard", "straight_through"])
def test_every_image_the_attack_looks_at_is_feasible_and_near_the_last(
    norm: str, projection: str
) -> None:
    batch, ball = batch_of(8), ball_of(norm)
    watched = Watched(tiny_net())
    attacker = built(readout_scale=30.0, scale="eps/3")
    ascent_of(steps=6, projection=projection).maximise(
        oracle_of(watched, batch), ball, start_of(norm, batch), attacker, True
    )
    assert len(watched.seen) == 7
    deltas = [seen - batch.images for seen in watched.seen]
    for seen, delta in zip(watched.seen, deltas, strict=True):
        assert float(seen.min()) >= 0 and float(seen.max()) <= 1
        # 1e-7: the random start of l2 is drawn in float32.
        assert float(ball.norm_of(delta).max()) <= EPS[norm] * (1 + 1e-7)
    for one, two in itertools.pairwise(deltas):  # projections bring points no further apart
        assert float(ball.norm_of(two - one).max()) <= EPS[norm] / 3 * (1 + 1e-6)
    assert len({float(delta.sum()) for delta in deltas}) == 7


def test_a_full_step_in_l2_is_as_long_as_the_scale() -> None:
    base = batch_of(4, channels=3)
    batch = Batch(torch.full_like(base.images, 0.5), base.labels, base.index, base.rng)
    attacker = built(cell="linear", features="sign", init="pgd", scale=0.21)
    model = tiny_net(channels=3)
    found = ascent_of(steps=1).maximise(
        oracle_of(model, batch), ball_of("l2"), torch.zeros_like(batch.images), attacker, False
    )
    assert_near(
        ball_of("l2").norm_of(found.delta), torch.full((4,), 0.21, dtype=torch.float64), 1e-14
    )


# --- invariant 5: the meta-gradient -----------------------------------------------------------


def inside(norm: str, delta: Tensor, images: Tensor) -> Tensor:
    """The projection, written out."""
    if norm == "linf":
        delta = torch.clamp(delta, -EPS["linf"], EPS["linf"])
    else:
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = torch.where(length > EPS["l2"], delta * (EPS["l2"] / length), delta)
    return torch.max(torch.min(delta, 1 - images), -images)


def climbed(
    model: nn.Module,
    norm: str,
    batch: Batch,
    delta: Tensor,
    attacker: Attacker,
    weights: list[float],
    projection: str = "hard",
    truncate: int | None = None,
) -> Tensor:
    """sum_t w_t mean_i f_i(delta_t) with a graph through the classifier; gradients fed are fixed."""
    images, labels = batch.images, batch.labels
    size = EPS[norm] / 4 / (1 if norm == "linf" else images[0].numel() ** 0.5)
    total, memory = torch.zeros((), dtype=delta.dtype), []
    for step in range(len(weights)):
        leaf = delta.detach().requires_grad_(True)
        here = F.cross_entropy(model(images + leaf), labels, reduction="sum")
        (grad,) = torch.autograd.grad(here, leaf)
        if truncate and step and step % truncate == 0:
            delta = delta.detach()
            memory = [
                tuple(h.detach() for h in state) if isinstance(state, tuple) else state.detach()
                for state in memory
            ]
        move, memory = attacker(grad, memory)
        there = delta + size * move
        delta = inside(norm, there, images)
        if projection == "straight_through":
            delta = there + (delta - there).detach()
        total = total + weights[step] * F.cross_entropy(model(images + delta), labels)
    return total


WEIGHTS = {
    "t": [0.1, 0.2, 0.3, 0.4],
    "uniform": [0.25] * 4,
    "last": [0.0, 0.0, 0.0, 1.0],
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("projection", ["hard", "straight_through"])
@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("truncate", [None, 1, 3])
def test_the_meta_gradient_is_that_through_the_whole_graph(
    norm: str, projection: str, weighting: str, truncate: int | None
) -> None:
    batch, model, attacker = batch_of(6), tiny_net(), built()
    start = start_of(norm, batch)
    ascent_of(weighting=weighting, projection=projection, truncate=truncate).maximise(
        oracle_of(model, batch), ball_of(norm), start, attacker, True
    )
    found = grads_of(attacker)
    args = (model, norm, batch, start, attacker, WEIGHTS[weighting], projection, truncate)
    wanted = torch.autograd.grad(climbed(*args), list(attacker.parameters()), allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs is not None
        assert_near(ours, -theirs, 1e-12)  # Adam descends, so p.grad points down
    assert any(float(grad.abs().max()) > 1e-3 for grad in found)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("squash", ["tanh", "hardtanh"])
def test_the_meta_gradient_is_right_for_every_attacker(
    cell: str, features: str, squash: str
) -> None:
    attacker = built(cell=cell, features=features, squash=squash, layers=2)
    with torch.no_grad():
        attacker.direct.fill_(0.3)
    batch, model = batch_of(4), tiny_net()
    start = start_of("linf", batch)
    ascent_of().maximise(oracle_of(model, batch), ball_of("linf"), start, attacker, True)
    total = climbed(model, "linf", batch, start, attacker, WEIGHTS["t"])
    wanted = torch.autograd.grad(total, list(attacker.parameters()))
    for ours, theirs in zip(grads_of(attacker), wanted, strict=True):
        assert_near(ours, -theirs, 1e-12)


def test_for_one_step_the_meta_gradient_is_the_slope_of_the_loss_itself() -> None:
    # With one step the gradient fed does not depend on the attacker: finite differences apply.
    batch, model, attacker = batch_of(6), tiny_net(), built(cell="gru")
    start = start_of("linf", batch)

    def loss() -> float:
        found = ascent_of(steps=1).maximise(
            oracle_of(model, batch), ball_of("linf"), start, attacker, False
        )
        return float(oracle_of(model, batch).losses(found.delta).mean())

    ascent_of(steps=1).maximise(oracle_of(model, batch), ball_of("linf"), start, attacker, True)
    weight, grad, h = attacker.readout.weight, grads_of(attacker)[-2], 1e-6
    assert grad.shape == weight.shape
    for column in range(3):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, column] += sign * h
                ends.append(loss())
                weight[0, column] -= sign * h
        slope = (ends[0] - ends[1]) / (2 * h)
        assert abs(slope + float(grad[0, column])) <= 1e-6 * (1 + abs(slope))


def test_only_straight_through_hands_a_slope_to_pixels_at_their_bounds() -> None:
    # The loss grows with <slope, x> and one step of 2 eps saturates every pixel.
    base, ball = batch_of(6), ball_of("linf")
    batch = Batch(base.images, torch.zeros_like(base.labels), base.index, base.rng)
    model = Affine(torch.randn(1, 8, 8, generator=generator(0), dtype=torch.float64))
    slopes = {}
    for projection in ("hard", "straight_through"):
        attacker = built(cell="linear", features="sign", squash="linear", scale="2*eps")
        with torch.no_grad():
            attacker.direct.fill_(1.5 - attacker.readout.weight.item())
        ascent = ascent_of(steps=1, projection=projection)
        start = torch.zeros_like(batch.images)
        ascent.maximise(oracle_of(model, batch), ball, start, attacker, True)
        _, grad = oracle_of(model, batch).delta_grad(
            ball.feasible(grad_sign(model, batch), batch.images)
        )
        assert attacker.direct.grad is not None
        slopes[projection] = float(attacker.direct.grad)
        wanted = -2 * ball.eps * float(grad.abs().sum()) / 6
    assert slopes["hard"] == 0
    assert abs(slopes["straight_through"] - wanted) <= 1e-12


def grad_sign(model: nn.Module, batch: Batch) -> Tensor:
    return oracle_of(model, batch).delta_grad(torch.zeros_like(batch.images))[1].sign()


def test_reaching_back_less_far_changes_the_gradient_and_not_the_attack() -> None:
    batch, model = batch_of(6), tiny_net()
    found, grads = [], []
    for truncate in (None, 1):
        attacker = built()
        found.append(
            ascent_of(truncate=truncate).maximise(
                oracle_of(model, batch), ball_of("linf"), start_of("linf", batch), attacker, True
            )
        )
        grads.append(torch.cat([grad.flatten() for grad in grads_of(attacker)]))
    assert torch.equal(found[0].delta, found[1].delta)
    assert float((grads[0] - grads[1]).abs().max()) > 1e-6


# --- invariants 6 and 7 -----------------------------------------------------------------------


def test_without_a_rate_the_attacker_stays_and_the_weights_still_move() -> None:
    recipe = L2l(steps=3, hidden=3, phi_lr=0.0)
    begun = state_of(tiny_net(batch_norm=True), recipe.build(ball_of("linf"), Plain()))
    one, two = trained(recipe), trained(recipe)
    assert same(attacker_of(one), attacker_of(begun)) and not same(one.model, begun.model)
    assert same(one.model, two.model) and one.meter == two.meter


@pytest.mark.parametrize("features", FEATURES)
def test_the_size_of_the_loss_matters_only_to_raw_and_logarithmic_features(features: str) -> None:
    attacker = built(features=features)
    with torch.no_grad():
        attacker.direct.fill_(0.1)
    grad = torch.randn(4, 1, 8, 8, generator=generator(0), dtype=torch.float64)
    first, *others = (attacker(c * grad, [])[0].detach() for c in (1, 1e-6, 0.3, 1e5))
    apart = max(float((other - first).abs().max()) for other in others)
    assert (apart > 1e-3) if features in ("raw", "logsign") else (apart <= 1e-14)


@pytest.mark.parametrize("features", FEATURES)
def test_tiny_and_zero_gradients_are_features_without_nan(features: str) -> None:
    attacker = Attacker.seeded(AttackerSpec(features=features), 0)  # pyright: ignore[reportArgumentType]
    raw = torch.randn(3, 1, 8, 8, generator=generator(0))
    sizes = torch.tensor([0.0, 1e-38, 1e30]).view(-1, 1, 1, 1)
    move, _ = attacker(raw * sizes, [])
    assert bool(move.isfinite().all())
    if features in ("rms", "linf", "sign"):
        assert_near(move[1:].detach(), attacker(raw[1:], [])[0].detach(), 1e-5)


def test_logarithmic_features_are_those_of_the_paper() -> None:
    # Andrychowicz et al. 2016, appendix A, with p = 10.
    attacker = built(cell="linear", features="logsign", squash="linear")
    values = [2.0, -0.5, 1e-3, -4e-6, 0.0]
    grad = torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)
    wanted = []
    for value in grad.flatten():
        large = abs(float(value)) >= 4.539992976248485e-05  # e^-10
        first = value.abs().log() / 10 if large else torch.tensor(-1.0).double()
        second = value.sign() if large else 22026.465794806718 * value
        wanted.append(
            attacker.readout.weight[0, 0] * first + attacker.readout.weight[0, 1] * second
        )
    found = attacker(grad, [])[0].flatten().detach()
    assert_near(found, torch.stack(wanted).detach(), 1e-14)


# --- invariant 8: who touches which gradient --------------------------------------------------


def test_the_attackers_step_leaves_the_weights_gradients_alone_and_the_other_way_round() -> None:
    batch, algorithm = batch_of(8), learned(phi_clip=0.0)
    state = state_of(tiny_net(), algorithm)
    attacker = copy.deepcopy(attacker_of(state))
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    oracle = oracle_of(state.model, batch)
    start = start_of("linf", batch)
    algorithm.ascent.maximise(oracle, algorithm.ball, start, attacker, False)
    assert all(parameter.grad is None for parameter in attacker.parameters())
    algorithm.ascent.maximise(oracle, algorithm.ball, start, attacker, True)
    for parameter in state.model.parameters():
        assert parameter.grad is not None and bool((parameter.grad == 7).all())
    algorithm.step(state, batch)  # the weights' step must not add to the attacker's
    for ours, theirs in zip(grads_of(attacker_of(state)), grads_of(attacker), strict=True):
        assert torch.equal(ours, theirs)


def test_the_weights_move_at_the_perturbation_of_the_attacker_before_its_step() -> None:
    batch, algorithm = batch_of(8), learned(phi_lr=0.5)
    state = state_of(tiny_net(), algorithm)
    before, twin = copy.deepcopy(attacker_of(state)), copy.deepcopy(state.model)
    outcome = algorithm.step(state, batch)
    found = algorithm.ascent.maximise(
        oracle_of(twin, batch), algorithm.ball, start_of("linf", batch), before, False
    )
    assert torch.equal(outcome.delta, found.delta)
    loss = F.cross_entropy(twin(batch.images + found.delta), batch.labels)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    weights = zip(state.model.parameters(), twin.parameters(), grads, strict=True)
    for ours, theirs, grad in weights:
        assert_near(ours.detach(), (theirs - 0.1 * grad).detach(), 1e-14)
    assert outcome.steps.tolist() == [4] * 8
    assert_near(outcome.losses.mean(), loss.detach(), 1e-14)


def test_the_attackers_first_step_is_that_of_adam_uphill() -> None:
    algorithm, batch = learned(phi_lr=0.01, phi_clip=0.0), batch_of(8)
    state = state_of(tiny_net(), algorithm)
    before = copy.deepcopy(attacker_of(state))
    algorithm.step(state, batch)
    total = climbed(tiny_net(), "linf", batch, start_of("linf", batch), before, WEIGHTS["t"])
    wanted = torch.autograd.grad(total, list(before.parameters()))
    pairs = zip(attacker_of(state).parameters(), before.parameters(), wanted, strict=True)
    for now, was, grad in pairs:
        assert_near((now - was).detach(), 0.01 * grad / (grad.abs() + 1e-8), 1e-9)


# --- invariant 10: it learns ------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.slow
def test_on_a_frozen_network_the_attacker_learns_to_attack_images_it_has_not_seen(
    norm: str,
) -> None:
    algorithm = learned(norm, steps=3, hidden=3, phi_lr=0.02)
    state = state_of(tiny_net(), algorithm, lr=0.0)
    held_out = batch_of(16, seed=1000)
    before = algorithm.measures(state, held_out)
    for seed in range(100):
        algorithm.step(state, batch_of(4, seed=seed))
    after = algorithm.measures(state, held_out)
    start = oracle_of(state.model, held_out).losses(start_of(norm, held_out)).mean()
    assert before["l2l/pgd_loss"] == after["l2l/pgd_loss"]
    gained = after["l2l/attack_loss"] - float(start)
    assert after["l2l/attack_loss"] > before["l2l/attack_loss"]
    # From nearly nothing to a good part of what PGD gains.
    assert gained > 0.6 * (after["l2l/pgd_loss"] - float(start)) > 0


# --- switches ---------------------------------------------------------------------------------


def test_the_attacker_moves_at_every_kth_batch_only() -> None:
    algorithm = learned(phi_every=3)
    state = state_of(tiny_net(), algorithm)
    moved = []
    for seed in range(7):
        before = copy.deepcopy(attacker_of(state))
        algorithm.step(state, batch_of(8, seed=seed))
        state.step += 1
        moved.append(not same(before, attacker_of(state)))
    assert moved == [True, False, False] * 2 + [True]


def test_each_of_the_attackers_gradients_is_clipped_by_itself() -> None:
    found = {}
    for clip in (0.0, 1e-3, 1e9):
        state = state_of(tiny_net(), algorithm := learned(phi_clip=clip))
        algorithm.step(state, batch_of(8))
        found[clip] = torch.cat([grad.flatten() for grad in grads_of(attacker_of(state))])
    assert float(found[0.0].abs().max()) > 1e-3
    assert torch.equal(found[1e9], found[0.0])
    assert torch.equal(found[1e-3], found[0.0].clamp(-1e-3, 1e-3))


def test_warm_epochs_are_pgd_and_leave_the_attacker_alone() -> None:
    algorithm = learned(warm=2)
    states = state_of(tiny_net(), algorithm), state_of(tiny_net())
    begun, pgd = (
        copy.deepcopy(attacker_of(states[0])),
        Pgd(steps=4).build(ball_of("linf"), Plain()),
    )
    for epoch in range(3):
        batch = batch_of(8, seed=epoch)
        for state, one in zip(states, (algorithm, pgd), strict=True):
            state.epoch = epoch
            one.step(state, batch)
        warm = epoch < 2
        assert same(states[0].model, states[1].model) == warm
        assert same(attacker_of(states[0]), begun) == warm


def test_the_memory_starts_anew_with_every_batch() -> None:
    algorithm = learned(phi_lr=0.0, cell="gru")
    state = state_of(tiny_net(), algorithm, lr=0.0)
    first = algorithm.step(state, batch_of(8, seed=0)).delta
    algorithm.step(state, batch_of(8, seed=1))
    assert torch.equal(algorithm.step(state, batch_of(8, seed=0)).delta, first)


def test_in_l1_it_is_refused_with_a_reason() -> None:
    message = "threat.norm: l2l is not defined in l1.*one pixel.*expected linf or l2"
    with pytest.raises(ValueError, match=message):
        L2l().build(ball_of("l1"), Plain())


def test_a_remembered_start_is_refused() -> None:
    recipe = L2l.model_validate({"name": "l2l", "start": "remembered"})
    with pytest.raises(ValueError, match="start: l2l keeps no perturbation per image"):
        recipe.build(ball_of("linf"), Plain())


# --- the network ------------------------------------------------------------------------------


def test_the_default_attacker_has_531_weights_and_the_direct_one() -> None:
    def count(**fields: Any) -> int:
        return sum(p.numel() for p in Attacker.seeded(AttackerSpec(**fields), 0).parameters())

    assert count() == 531 + 1
    assert count(layers=2, hidden=20, features="logsign") == 5301 + 2
    assert count(cell="linear") == 2 + 1


def test_the_first_attacker_depends_on_the_seed_of_the_run_and_on_nothing_else() -> None:
    recipe, model = L2l().build(ball_of("linf"), Plain()), tiny_net()

    def attacker(seed: int, junk: int) -> Attacker:
        torch.manual_seed(junk)
        before = torch.get_rng_state()
        setup = TrainingSetup(DistributedContext(CPU), model, 8, (1, 8, 8), 8, torch.float64, seed)
        found = recipe.memory(setup)["attacker"]
        assert torch.equal(torch.get_rng_state(), before)
        assert isinstance(found, Attacker)
        return found

    assert same(attacker(0, junk=1), attacker(0, junk=2))
    assert not same(attacker(0, junk=1), attacker(1, junk=1))
    with torch.random.fork_rng(devices=[]):  # the readout is scaled, and nothing else
        torch.manual_seed(0)
        plain, small = (Attacker.seeded(AttackerSpec(readout_scale=s), 0) for s in (1.0, 0.1))
    assert_near(small.readout.weight.detach(), 0.1 * plain.readout.weight.detach(), 1e-7)
    assert float(small.readout.bias.detach().abs().max()) == 0


@pytest.mark.parametrize(("loss", "fe"), [("adv", 25), ("trades", 29)])
def test_it_costs_what_its_card_says(loss: str, fe: int) -> None:
    algorithm = learned(loss=loss, steps=10)
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    once = 1 if loss == "trades" else 0
    assert state.meter == Meter(
        forwards=8 * (11 + 1 + 2 * once), input_backwards=8 * 11, full_backwards=8 * (1 + once)
    )
    assert state.meter.fe == 8 * fe
    warm = state_of(tiny_net(), algorithm := learned(loss=loss, steps=10, warm=1))
    algorithm.step(warm, batch_of(8))
    assert warm.meter.fe == 8 * (fe - 2)  # PGD has no gradient at its last point


def test_a_run_goes_on_from_the_saved_parts_as_if_it_had_not_stopped() -> None:
    algorithm = learned(cell="gru", phi_lr=0.1)
    state = state_of(tiny_net(), algorithm)
    for seed in range(2):
        algorithm.step(state, batch_of(8, seed=seed))
    other = state_of(tiny_net(seed=5), algorithm)
    other.model.load_state_dict(state.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    for name, part in state.parts.items():
        other.parts[name].load_state_dict(copy.deepcopy(part.state_dict()))
    for one in (state, other):
        algorithm.step(one, batch_of(8, seed=2))
    assert same(state.model, other.model) and same(attacker_of(state), attacker_of(other))
    saved = [dict(tensors(s.parts["attacker_optimizer"].state_dict())) for s in (state, other)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


# --- measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["adv", "trades"])
def test_measures_are_the_mean_losses_of_both_attacks_from_one_start(loss: str) -> None:
    algorithm, batch = learned(loss=loss), batch_of(8)
    state = state_of(tiny_net(), algorithm)
    found = algorithm.measures(state, batch)
    assert set(found) == {"l2l/attack_loss", "l2l/pgd_loss"}
    start = algorithm.start.delta(algorithm.ball, batch, None)

    def value(delta: Tensor) -> float:
        clean, moved = state.model(batch.images), state.model(batch.images + delta)
        if loss == "adv":
            return float(F.cross_entropy(moved, batch.labels))
        kl = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return float(kl)

    oracle = Oracle(state.model, algorithm.objective, batch, Meter(), attack_bn="eval")
    attacker = attacker_of(state)
    with torch.no_grad():
        attack = value(
            algorithm.ascent.maximise(oracle, algorithm.ball, start, attacker, False).delta
        )
        pgd = value(
            algorithm.warm_ascent.maximise(oracle, algorithm.ball, start, state.progress).delta
        )
    assert abs(found["l2l/attack_loss"] - attack) <= 1e-13
    assert abs(found["l2l/pgd_loss"] - pgd) <= 1e-13
    assert pgd > attack > 0  # a fresh attacker is weak


def test_an_attacker_that_is_pgd_measures_as_pgd() -> None:
    algorithm = learned(features="sign", init="pgd")
    found = algorithm.measures(state_of(tiny_net(), algorithm), batch_of(8))
    assert found["l2l/attack_loss"] == found["l2l/pgd_loss"]


@pytest.mark.parametrize("attack_bn", ["eval", "batch_nostat", "train"])
def test_measuring_changes_nothing(attack_bn: str) -> None:
    algorithm, batch = learned(attack_bn=attack_bn), batch_of(8)
    state = state_of(tiny_net(batch_norm=True), algorithm)
    algorithm.step(state, batch)
    model, attacker = copy.deepcopy(state.model), copy.deepcopy(attacker_of(state))
    meter, random = copy.copy(state.meter), torch.get_rng_state()
    grads = grads_of(state.model) + grads_of(attacker_of(state))
    algorithm.measures(state, batch)
    assert same(attacker_of(state), attacker)
    assert state.meter == meter and torch.equal(torch.get_rng_state(), random)
    now = grads_of(state.model) + grads_of(attacker_of(state))
    assert all(map(torch.equal, grads, now))
    assert same(state.model, model)


# --- starts -----------------------------------------------------------------------------------


def test_the_start_is_uniform_or_with_trades_a_little_noise_unless_one_is_given() -> None:
    batch = batch_of(8)
    sizes = {}
    for loss, start in itertools.product(("adv", "trades"), (None, Zero())):
        algorithm = learned(loss=loss, start=start, phi_lr=0.0)
        delta = algorithm.start.delta(algorithm.ball, batch, None)
        sizes[loss, start is None] = float(delta.abs().max())
    assert 0.5 * EPS["linf"] < sizes["adv", True] <= EPS["linf"]
    assert 0 < sizes["trades", True] < 0.01
    assert sizes["adv", False] == sizes["trades", False] == 0
    assert rng_of(8).seed == batch.rng.seed


@pytest.mark.parametrize("recorded", [True, False])
def test_the_attackers_optimiser_may_be_recorded_on_a_gpu(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = L2l(steps=2, hidden=3).build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm)
    stream = SimpleNamespace(is_capturing=lambda: recorded)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm.step(state, batch_of(8))
