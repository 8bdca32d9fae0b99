"""SSDS: the saddle it converges to, the released code's numbers, and what it remembers per image."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    UNITS,
    Affine,
    Saddle,
    SaddleObjective,
    applied,
    assert_near,
    assert_three_visits,
    ball_of,
    bank,
    batch_of,
    equal,
    generator,
    grey,
    momenta,
    pixels_seen,
    state_of,
    tiny_net,
    trajectory,
    unchecked,
    views_of,
    visited,
    weights_of,
    whole_and_resumed,
)
from pydantic import ValidationError
from torch import Tensor

from raytrain.algorithms import Natural, SiHg, Ssds
from raytrain.algorithms.ssds import SaddlePoint
from raytrain.core.algorithm_state import Numbers
from raytrain.core.losses import AbstractLoss
from raytrain.core.sample_store import SampleStore, paste
from raytrain.core.threat_models import Linf, in_box
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, BatchNorm
from raytrain.outer import Awp, Clip, Engm, Plain

NORMS = ["linf", "l2", "l1"]
ORDERS = ["delta_first", "w_first", "jacobi"]


def ssds(norm: str = "linf", eps: float | None = None, **fields: Any) -> SaddlePoint:
    algorithm = Ssds.model_validate(fields).build(ball_of(norm, eps), Plain())
    assert isinstance(algorithm, SaddlePoint)
    return algorithm


def slopes(state: TrainState, batch: Batch, delta: Tensor) -> Tensor:
    """d f_i / d delta_i of the network as it is, from a copy of it."""
    twin, point = copy.deepcopy(state.model), delta.clone().requires_grad_(True)
    losses = F.cross_entropy(twin(batch.images + point), batch.labels, reduction="sum")
    return torch.autograd.grad(losses, point)[0]


# --- the convex-concave saddle: w = 0.7, delta = 0.3, v = 0.4, lambda = 1, t = f = 0.21 --------


class Convex(SaddleObjective):
    """(w - 1)^2 / 2 + w delta - delta^2 / 2."""

    def value(self, w: Tensor, delta: Tensor, labels: Tensor) -> Tensor:
        del labels
        return 0.5 * (w - 1).square() + w * delta - 0.5 * delta.square()


def toy(
    sigma: float,
    objective: AbstractLoss,
    units: float = UNITS,
    eps: float = 0.3,
    **fields: Any,
) -> SaddlePoint:
    """Raw steps of `sigma` and the radius `eps`, both in the units of the toy."""
    algorithm = ssds(eps=eps / units, ascent="raw", sigma=sigma / units**2, **fields)
    return dataclasses.replace(algorithm, objective=objective)


def test_simultaneous_projected_steps_are_the_tabled_ones() -> None:
    found = trajectory(toy(0.1, Convex(), order="jacobi"), 200, lr=0.1, start=(0.0, 0.0))
    exact = torch.tensor([(0, 0), (0.1, 0), (0.19, 0.01), (0.27, 0.028)], dtype=torch.float64)
    assert_near(found[:4], exact, 1e-15)
    table = {10: (0.58275656, 0.2512524), 50: (0.69837556, 0.3), 200: (0.7, 0.3)}
    for k, wanted in table.items():
        assert_near(found[k], torch.tensor(wanted, dtype=torch.float64), 5e-9)


@pytest.mark.parametrize("order", ["delta_first", "w_first"])
def test_alternating_projected_steps_end_at_the_same_saddle(order: str) -> None:
    found = trajectory(toy(0.1, Convex(), order=order), 200, lr=0.1, start=(0.0, 0.0))
    assert_near(found[-1], torch.tensor((0.7, 0.3), dtype=torch.float64), 1e-8)
    # The first one by hand: delta moves along w = 0, or w has moved to 0.1 before.
    delta = 0.1 * 0.1 if order == "w_first" else 0.0
    assert_near(found[1], torch.tensor((0.1, delta), dtype=torch.float64), 1e-15)


def epigraph(
    lam_mode: str, steps: int, order: str = "jacobi"
) -> tuple[SaddlePoint, dict[str, float], Tensor, list[dict[str, float]]]:
    """Everything after `steps` from w = delta = 0, v = 1, lambda = 4, t = 1, alpha = lr = 0.05."""
    # In pixels: delta stays between -0.03 and 0.37, where the box does not bind.
    algorithm = toy(
        0.05,
        Convex(),
        units=1.0,
        order=order,
        budget="full",
        clamp_delta=False,
        lam_mode=lam_mode,
        alpha=0.05,
        c1=1.0,
        c2=1.0,
        v0=1.0,
        lam0=4.0,
        t0=1.0,
    )
    model = Saddle(torch.zeros(1, dtype=torch.float64))
    state = state_of(
        model, algorithm, lr=0.05, momentum=0, num_images=1, batch_size=1, shape=(1, 1, 1)
    )
    batch, history = grey([0]), []
    for k in range(steps):
        with unchecked(k > 1):
            algorithm.step(state, batch)
        history.append(dict(state.part("epigraph", Numbers)))
    delta = float(state.part("delta", SampleStore).read(batch))
    v = float(state.part("v", SampleStore).read(batch))
    found = torch.tensor((float(model.w.detach()), delta, v), dtype=torch.float64)
    return algorithm, history[-1], found, history


SADDLE = torch.tensor((0.7, 0.3, 0.4), dtype=torch.float64)


@pytest.mark.slow
def test_the_full_form_settles_in_w_delta_and_v_while_lambda_and_t_cycle_for_ever() -> None:
    algorithm, now, found, history = epigraph("plain", 1450)
    assert_near(found, SADDLE, 1e-9)
    lams, ts = [one["lam"] for one in history], [one["t"] for one in history]
    assert min(lams[-200:]) < 0.1 and max(lams[-200:]) > 1.9
    # f = 0.21 and S = 0 from here on: the recursion alone, to the 40,000 steps of the table.
    for _ in range(40_000 - 1450):
        now = algorithm.recipe.epigraph(now, loss=0.21, slack=0.0, count=1.0, decay=1.0)
        lams.append(now["lam"])
        ts.append(now["t"])
    late = slice(20_000, None)
    assert sum(lams[late]) / 20_000 == pytest.approx(1.001, abs=5e-5)
    assert sum(ts[late]) / 20_000 == pytest.approx(0.2101, abs=5e-5)
    assert min(lams[late]) == pytest.approx(0.011, abs=1e-3)
    assert max(lams[late]) == pytest.approx(1.989, abs=1e-3)


@pytest.mark.slow
def test_the_extrapolated_pair_settles_too() -> None:
    algorithm, now, found, _ = epigraph("extrapolated", 1200, "delta_first")
    assert_near(found, SADDLE, 1e-9)
    for _ in range(20_000):
        now = algorithm.recipe.epigraph(now, loss=0.21, slack=0.0, count=1.0, decay=1.0)
    assert now["lam"] == pytest.approx(1, abs=1e-6) and now["t"] == pytest.approx(0.21, abs=1e-6)


def test_the_first_step_of_the_full_form_by_hand() -> None:
    _, now, found, _ = epigraph("plain", 1)
    # g = w - delta = 0 and sign(0) = 0; v = 1 + 0.05 (0 - 0.3); t = 1 + 0.05 (4 - 1);
    # lambda = 4 + 0.05 (f - t - v (0 - 0.3)), f = 1/2; w = 0 - 0.05 lambda (w - 1 + delta).
    v, t = 1 - 0.015, 1.15
    lam = 4 + 0.05 * (0.5 - t + 0.3 * v)
    assert now == pytest.approx({"lam": lam, "lam_before": 4.0, "t": t}, rel=1e-15)
    assert_near(found, torch.tensor((0.05 * lam, 0.0, v), dtype=torch.float64), 1e-15)


# --- lambda and t with the released constants --------------------------------------------------


def cycle(loss: float, slack: float, steps: int) -> list[tuple[float, float]]:
    recipe = Ssds(preset="released")
    now = {"lam": recipe.lam0, "lam_before": recipe.lam0, "t": recipe.t0}
    found = []
    for _ in range(steps):
        now = recipe.epigraph(now, loss, slack, count=128.0, decay=1.0)
        found.append((now["t"], now["lam"]))
    return found


def test_the_released_constants_cycle_with_period_four_and_mean_one() -> None:
    found = cycle(2.3, -3.6, 400)
    table = [(7, 0.646), (6.292, 0), (4.292, 0), (2.292, 1.354), (3, 2), (5, 0.646)]
    table += [(4.292, 0), (2.292, 1.354)]
    assert torch.tensor(found[:8]).flatten().tolist() == pytest.approx(
        [number for pair in table for number in pair], abs=1e-6
    )
    for k in range(10, 396):
        assert found[k] == pytest.approx(found[k + 4], abs=1e-10)
        assert abs(found[k][1] - found[k + 1][1]) > 0.1
    assert sum(lam for _, lam in found[100:300]) / 200 == pytest.approx(1, abs=1e-10)


def test_without_slack_the_rate_is_zero_at_every_fourth_batch() -> None:
    found = cycle(2.3, 0.0, 400)[200:204]
    lams = sorted(lam for _, lam in found)
    assert lams == pytest.approx([0, 0.954, 1.046, 2.0], abs=1e-9)
    assert sorted(t for t, _ in found) == pytest.approx([-1, -0.908, 1, 1.092], abs=1e-9)


@pytest.mark.parametrize("lam_mode", ["released", "plain", "extrapolated"])
def test_lambda_never_falls_below_zero_and_alpha_decays(lam_mode: str) -> None:
    recipe = Ssds.model_validate({"budget": "full", "lam_mode": lam_mode, "alpha": 2.0, "c2": 1.0})
    now = {"lam": 0.5, "lam_before": 0.25, "t": 3.0}
    sunk = recipe.epigraph(now, loss=0.0, slack=50.0, count=1.0, decay=1.0)
    assert sunk["lam"] == 0.0 and sunk["lam_before"] == 0.5
    still = recipe.epigraph(now, loss=1.0, slack=0.0, count=4.0, decay=0.0)
    towards = {"released": 0.0, "plain": 0.5, "extrapolated": 0.5}  # 0.5 - t, cut at zero
    assert still == pytest.approx({"lam": towards[lam_mode], "lam_before": 0.5, "t": 3.0})


# --- the step written out ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ascent", ["steepest", "raw"])
def test_the_fused_pass_is_the_two_passes_at_the_old_point(norm: str, ascent: str) -> None:
    size = 0.4 if ascent == "raw" else ball_of(norm).eps / 3
    algorithm = ssds(norm, order="jacobi", ascent=ascent, sigma=size)
    state = state_of(tiny_net(), algorithm)
    other, delta = copy.deepcopy(state.model), torch.zeros(8, 1, 8, 8).double()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for seed in range(4):
        batch = batch_of(8, seed=seed)
        start = algorithm.ball.feasible(delta, batch.images)
        point = start.clone().requires_grad_(True)
        losses = F.cross_entropy(other(batch.images + point), batch.labels, reduction="sum")
        (grad,) = torch.autograd.grad(losses, point)
        away = grad if ascent == "raw" else algorithm.ball.direction(grad, start, batch.images)
        delta = algorithm.ball.feasible(start + size * away, batch.images)
        optimizer.zero_grad()
        F.cross_entropy(other(batch.images + start), batch.labels).backward()
        optimizer.step()
        outcome = algorithm.step(state, batch)
        assert torch.equal(outcome.delta, start)
        assert_near(bank(state), delta, 1e-10)
        assert_near(weights_of(state.model), weights_of(other), 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ["delta_first", "w_first"])
def test_the_alternating_orders_use_the_newest_of_the_other_player(order: str, norm: str) -> None:
    algorithm = ssds(norm, order=order, sigma="eps/3")
    state, delta = state_of(tiny_net(), algorithm), torch.zeros(8, 1, 8, 8).double()
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        start = algorithm.ball.feasible(delta, batch.images)
        before = slopes(state, batch, start)
        outcome = algorithm.step(state, batch)
        grad = before if order == "delta_first" else slopes(state, batch, start)
        away = algorithm.ball.direction(grad, start, batch.images)
        delta = algorithm.ball.feasible(start + algorithm.ball.eps / 3 * away, batch.images)
        assert_near(bank(state), delta, 1e-13)
        assert_near(outcome.delta, delta if order == "delta_first" else start, 1e-13)


@pytest.mark.parametrize("order", ORDERS)
def test_the_ascent_does_not_depend_on_the_batch_size(order: str) -> None:
    algorithm = ssds(order=order, ascent="raw", sigma=0.3)
    whole, banks = batch_of(8), []
    for size in (1, 2, 8):
        state = state_of(tiny_net(), algorithm, lr=0.0)
        for _ in range(2):
            for rows in torch.arange(8).split(size):
                algorithm.step(state, whole[rows])
        banks.append(bank(state))
    assert banks[0].flatten(1).any(1).all()
    for other in banks[:-1]:
        assert_near(other, banks[-1], 1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("noise", [False, True])
def test_radius_zero_is_natural_training_bit_for_bit(order: str, norm: str, noise: bool) -> None:
    robust = visited(ssds(norm, 0.0, order=order, noise=noise), batch_norm=True)
    natural = visited(Natural().build(ball_of(norm, 0.0), Plain()), batch_norm=True)
    assert equal(robust, natural) and not bank(robust).any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ascent", ["steepest", "raw"])
def test_a_vanishing_step_is_natural_training_too(order: str, ascent: str) -> None:
    # sigma = 0 is refused; what is far below the last bit of any pixel comes to the same.
    robust = visited(ssds(order=order, ascent=ascent, sigma=1e-300), batch_norm=True)
    natural = visited(Natural().build(ball_of("linf"), Plain()), batch_norm=True)
    assert equal(robust, natural)


# --- the bilinear saddle -----------------------------------------------------------------------


def test_on_w_delta_simultaneous_steps_diverge_and_alternating_ones_cycle() -> None:
    runs = {
        order: trajectory(toy(0.5, SaddleObjective(), eps=2.0**28, order=order), 100, lr=0.5)
        for order in ("jacobi", "delta_first")
    }
    assert runs["jacobi"][1:5].tolist() == [
        [0.5, 1.5],
        [-0.25, 1.75],
        [-1.125, 1.625],
        [-31 / 16, 17 / 16],
    ]
    assert runs["delta_first"][1:5].tolist() == [
        [0.25, 1.5],
        [-9 / 16, 13 / 8],
        [-79 / 64, 43 / 32],
        [-409 / 256, 93 / 128],
    ]
    far = {order: run.norm(dim=1) for order, run in runs.items()}
    assert float(far["jacobi"][100]) == pytest.approx(math.sqrt(2) * 1.25**50, rel=1e-12)
    assert float(far["delta_first"][50]) == pytest.approx(1.42276, rel=5e-6)
    assert float(far["delta_first"][100]) == pytest.approx(1.4475, rel=5e-5)


@pytest.mark.parametrize("p", [0.1, 1.0, 1.3])
def test_the_orders_have_their_own_characteristic_polynomials(p: float) -> None:
    for order, trace, determinant in (
        ("jacobi", 2.0, 1 + p),
        ("delta_first", 2 - p, 1.0),
        ("w_first", 2 - p, 1.0),
    ):
        algorithm = toy(p / 0.4, SaddleObjective(), eps=2.0**28, order=order)
        found = trajectory(algorithm, 12, lr=0.4, start=(0.8, -0.3))
        assert_near(found[2:] - trace * found[1:-1], -determinant * found[:-2], 1e-13)


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_multipliers_of_zero_leave_only_the_projection(order: str) -> None:
    dragged = visited(ssds(order=order, budget="multiplier", v0=0.0), batch_norm=True)
    projected = visited(ssds(order=order, budget="project"), batch_norm=True)
    assert equal(dragged, projected) and torch.equal(bank(dragged), bank(projected))


@pytest.mark.parametrize("order", ORDERS)
def test_lambda_of_one_that_cannot_move_leaves_the_multipliers(order: str) -> None:
    # c2 = inf and t moving with lambda - 1 = 0.
    still: dict[str, Any] = {"budget": "full", "lam0": 1.0, "c2": 1e300, "lam_mode": "plain"}
    full = visited(ssds(order=order, **still))
    multiplier = visited(ssds(order=order, budget="multiplier"))
    assert equal(full, multiplier) and torch.equal(bank(full, "v"), bank(multiplier, "v"))


@pytest.mark.parametrize("norm", NORMS)
def test_delta_first_is_the_plain_alternation_of_si_hg(norm: str) -> None:
    shared: dict[str, Any] = {"sigma": "eps/3", "bank_dtype": "fp16"}
    ours = visited(ssds(norm, **shared), batch_norm=True)
    recipe = SiHg.model_validate({"mode": "N", "m": 1, **shared})
    theirs = visited(recipe.build(ball_of(norm), Plain()), batch_norm=True)
    assert equal(ours, theirs) and torch.equal(bank(ours), bank(theirs))


def test_the_orders_differ() -> None:
    states = [visited(ssds(order=order)) for order in ORDERS]
    for i, one in enumerate(states):
        assert not any(equal(one, other) for other in states[:i])


# --- multipliers -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ascent", ["steepest", "raw"])
def test_where_delta_is_clamped_the_multipliers_only_fall(
    norm: str, order: str, ascent: str
) -> None:
    algorithm = ssds(norm, order=order, ascent=ascent, budget="multiplier", alpha=0.5, v0=0.2)
    state = state_of(tiny_net(), algorithm)
    last = bank(state, "v").clone()
    assert last.tolist() == [0.2] * 8
    for seed in range(8):
        algorithm.step(state, batch_of(8, seed=seed))
        now = bank(state, "v").clone()
        # l2 and l1 divide: a norm may exceed eps by its last bit.
        assert bool((now <= last + 1e-15).all()) and bool((now >= 0).all())
        last = now
    assert float(last.max()) < 0.2


@pytest.mark.parametrize("norm", NORMS)
def test_the_multipliers_grow_by_the_excess_of_the_old_delta_and_drag_it_back(norm: str) -> None:
    fields = {"budget": "multiplier", "clamp_delta": False, "alpha": 0.7, "c1": 3.0, "v0": 0.5}
    size = 8.0 if norm == "l2" else 2.0
    algorithm = ssds(norm, order="jacobi", ascent="raw", sigma=size, **fields)
    state, ball = state_of(tiny_net(), algorithm), algorithm.ball
    delta, v, grown = torch.zeros(8, 1, 8, 8).double(), torch.full((8,), 0.5).double(), False
    for seed in range(8):
        batch = batch_of(8, seed=seed)
        start = in_box(delta, batch.images)
        grad = slopes(state, batch, start)
        length = start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        away = start / (length + 1e-12) if norm == "l2" else start.sign()
        drag = v.view(-1, 1, 1, 1) / 3.0 * away
        algorithm.step(state, batch)
        delta = in_box(start + size * (grad - drag), batch.images)
        after = (v + 0.7 * (ball.norm_of(start) - ball.eps)).clamp_min(0)
        grown |= bool((after > v).any())
        v = after
        assert_near(bank(state), delta, 1e-12)
        assert_near(bank(state, "v"), v, 1e-12)
    assert grown and float(ball.norm_of(delta).max()) > ball.eps  # nothing clamped it


@pytest.mark.parametrize("kept", ["fp32", "fp16", "int8"])
def test_an_unclamped_perturbation_is_remembered_beyond_the_ball(kept: str) -> None:
    fields = {"budget": "multiplier", "clamp_delta": False, "v0": 0.0, "alpha": 1e-6}
    try:
        algorithm = ssds(bank_dtype=kept, sigma="eps", order="delta_first", **fields)
    except ValidationError:
        assert kept == "int8"  # holds nothing beyond eps: refusing it is right too
        return
    state, batch = state_of(tiny_net(), algorithm, lr=0.0), batch_of(8)
    outcome = [algorithm.step(state, batch) for _ in range(4)][-1]
    assert float(outcome.delta.abs().max()) > 1.5 * algorithm.ball.eps
    # A half has 11 bits.
    assert_near(state.part("delta", SampleStore).read(batch), outcome.delta, 2e-3)


def test_at_zero_the_drag_of_l2_is_zero_and_finite() -> None:
    algorithm = ssds("l2", budget="multiplier", ascent="raw", sigma=1e-300, v0=1e6)
    state = visited(algorithm, 2)
    assert bank(state).isfinite().all() and weights_of(state.model).isfinite().all()
    assert float(bank(state).abs().max()) < 1e-200


def test_the_drag_alone_shrinks_a_remembered_perturbation() -> None:
    for norm in NORMS:
        algorithm = ssds(
            norm, budget="multiplier", ascent="raw", sigma=1e-6, v0=100.0, c1=0.01, alpha=1e-6
        )
        state, batch = state_of(tiny_net(), algorithm), batch_of(8)
        store = state.part("delta", SampleStore)
        start = algorithm.ball.feasible(0.05 * torch.ones_like(batch.images), batch.images)
        store.write(batch, start)
        algorithm.step(state, batch)
        lengths = [algorithm.ball.norm_of(one) for one in (start, store.read(batch))]
        assert bool((lengths[1] < lengths[0]).all())


# --- lambda ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_lambda_multiplies_the_learning_rate_and_not_the_momentum(order: str) -> None:
    # lambda sinks to zero at the first batch: the weights stay, their momentum does not.
    algorithm = ssds(order=order, budget="full", lam0=0.0, t0=1e6, lam_mode="plain", alpha=1.0)
    state = state_of(tiny_net(), algorithm)
    before = weights_of(state.model)
    algorithm.step(state, batch_of(8))
    assert torch.equal(weights_of(state.model), before)
    assert_near(momenta(state), applied(state.model), 1e-15)
    assert state.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_the_pair_moves_by_the_mean_loss_and_the_slack_of_the_old_delta(order: str) -> None:
    fields: dict[str, Any] = {"alpha": 0.3, "c2": 2.0, "v0": 0.4, "lam0": 1.5, "t0": 0.5}
    algorithm = ssds(order=order, budget="full", lam_mode="released", **fields)
    state, batch = state_of(tiny_net(), algorithm), batch_of(8)
    store = state.part("delta", SampleStore)
    start = algorithm.ball.feasible(torch.full_like(batch.images, 0.06), batch.images)
    store.write(batch, start)
    twin = copy.deepcopy(state.model)
    loss = float(F.cross_entropy(twin(batch.images + start), batch.labels).detach())
    algorithm.step(state, batch)
    excess = algorithm.ball.norm_of(start) - algorithm.ball.eps
    v = (0.4 + 0.3 * excess).clamp_min(0)
    t = 0.5 + 0.3 * (1.5 - 1)
    lam = 1.5 + 0.3 / 2.0 * loss - t - float((v * excess).sum())
    numbers = dict(state.part("epigraph", Numbers))
    assert numbers == pytest.approx({"lam": lam, "lam_before": 1.5, "t": t}, rel=1e-12)
    rate = 1.5 if order == "w_first" else lam
    moved = weights_of(state.model) - weights_of(twin)
    assert_near(moved, -0.1 * rate * momenta(state), 1e-14)
    found = algorithm.measures(state, batch)
    assert found == {"ssds/lambda": numbers["lam"], "ssds/t": numbers["t"]}


# --- the released code -------------------------------------------------------------------------


def test_the_preset_is_the_released_code_in_pixel_space() -> None:
    eps, count = 0.03, 128
    recipe = Ssds(preset="released")
    algorithm = recipe.build(Linf(eps=eps), Plain())
    model = tiny_net()
    state = state_of(model, algorithm, momentum=0.9, weight_decay=2e-4, num_images=count)
    # Away from black and white, where the code's clamp and a projection are the same.
    raw = torch.rand(count, 1, 8, 8, generator=generator(3), dtype=torch.float64)
    plain = batch_of(count)
    batch = dataclasses.replace(plain, images=0.1 + 0.8 * raw)
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    delta, v = torch.zeros_like(batch.images), torch.ones(count, dtype=torch.float64)
    lam, t, alpha, c1, c2 = 4.0, 1.0, 2.0, 100.0, 100.0
    for _ in range(24):
        algorithm.step(state, batch)
        point = delta.clone().requires_grad_(True)
        mean = F.cross_entropy(other((batch.images + point).clamp(0, 1)), batch.labels)
        (grad,) = torch.autograd.grad(mean, point)
        excess = delta.flatten(1).abs().amax(1) - eps
        new = delta + alpha * (grad - v.view(-1, 1, 1, 1) * delta.sign() / c1)
        v = (v + alpha * excess).clamp_min(0)
        t = t + alpha * (lam - 1)
        lam = max(0.0, lam + alpha / c2 * float(mean.detach()) - t - float((v * excess).sum()))
        optimizer.zero_grad()
        F.cross_entropy(other((batch.images + delta).clamp(0, 1)), batch.labels).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * lam
        optimizer.step()
        delta = new.clamp(-eps, eps)
        # The drag turns on signs, which rounding may flip only where delta is next to zero.
        assert_near(bank(state), delta, 1e-12)
        assert_near(bank(state, "v"), v, 1e-12)
        assert_near(weights_of(state.model), weights_of(other), 1e-11)
        numbers = state.part("epigraph", Numbers)
        assert numbers["lam"] == pytest.approx(lam, abs=1e-11)
        assert numbers["t"] == pytest.approx(t, abs=1e-11)
    assert float(v.max()) < 0.5  # the drag was at work


def test_where_the_box_binds_delta_stays_in_it_and_the_code_goes_another_way() -> None:
    eps, visits, shape = 0.03, 6, (2, 1, 8, 8)
    plain, slope = batch_of(2), torch.full((1, 8, 8), 4.0, dtype=torch.float64)
    batch = dataclasses.replace(
        plain,
        images=torch.full(shape, 0.99, dtype=torch.float64),
        labels=torch.zeros_like(plain.labels),
    )
    algorithm = Ssds(preset="released").build(Linf(eps=eps), Plain())
    model = Affine(slope)  # every pixel's gradient is upwards, and a step is longer than eps
    state = state_of(model, algorithm, lr=0.0, num_images=2, batch_size=2)
    for _ in range(visits):
        algorithm.step(state, batch)
    delta, v = torch.zeros(shape).double(), torch.ones(2).double()
    lam, t = 4.0, 1.0
    for _ in range(visits):  # the released code
        point = delta.clone().requires_grad_(True)
        losses = F.cross_entropy(
            model((batch.images + point).clamp(0, 1)), batch.labels, reduction="none"
        )
        (grad,) = torch.autograd.grad(losses.sum(), point)
        excess = delta.flatten(1).abs().amax(1) - eps
        new = delta + 2 / 128 * (grad - v.view(-1, 1, 1, 1) * delta.sign() / (100 / 128))
        v = (v + 2 * excess).clamp_min(0)
        t = t + 2 * (lam - 1)
        mean = float(losses.detach().mean())
        lam = max(0.0, lam + 0.02 * mean - t - float((v * excess).sum()))
        delta = new.clamp(-eps, eps)
    # Ours moves to the bound of the box at the first visit and stays there.
    assert_near(bank(state), torch.full(shape, 0.01, dtype=torch.float64), 1e-15)
    wanted = 1 - 2 * (eps - 0.0) - (visits - 1) * 2 * (eps - 0.01)
    assert_near(bank(state, "v"), torch.full((2,), wanted, dtype=torch.float64), 1e-15)
    numbers = state.part("epigraph", Numbers)
    assert float((bank(state) - delta).abs().min()) > 1e-3
    assert float((bank(state, "v") - v).abs().min()) > 1e-3
    assert abs(numbers["lam"] - lam) > 1e-3 and abs(numbers["t"] - t) > 1e-3


def test_the_preset_fills_what_is_not_given_and_what_is_given_wins() -> None:
    released = Ssds(preset="released")
    assert (released.order, released.ascent, released.sigma) == ("jacobi", "raw", 2 / 128)
    assert (released.alpha, released.v0, released.lam0, released.t0) == (2.0, 1.0, 4.0, 1.0)
    assert (released.c1, released.c2, released.clamp_delta) == (100 / 128, 100.0, True)
    assert (released.budget, released.lam_mode, released.bank_align) == (
        "full",
        "released",
        "none",
    )
    mine = Ssds(preset="released", order="delta_first", sigma=0.5)
    assert (mine.order, mine.sigma, mine.lam_mode) == ("delta_first", 0.5, "released")
    assert Ssds.model_validate_json(mine.model_dump_json()) == mine
    plain = Ssds()
    assert (plain.order, plain.budget, plain.step_size) == ("delta_first", "project", "eps/4")
    assert Ssds(ascent="raw").step_size == 0.1 and plain.bank_dtype == "fp32"
    with pytest.raises(ValidationError, match="released"):
        Ssds.model_validate({"preset": "paper"})


def test_the_released_decay_falls_every_hundred_epochs_by_more() -> None:
    recipe = Ssds(preset="released")
    for epoch, power in ((0, 0), (99, 0), (100, 100), (199, 100), (200, 300), (300, 600)):
        assert recipe.decay(epoch) == pytest.approx(math.exp(-power / 1000), rel=1e-15)
    assert recipe.alpha * recipe.decay(1000) == pytest.approx(0.00817, abs=5e-6)
    # Where the code stops, once alpha is not above 1e-4, it goes on.
    assert recipe.alpha * recipe.decay(1300) > 1e-4
    assert recipe.alpha * recipe.decay(1400) == pytest.approx(5.5e-5, abs=1e-6)
    assert recipe.decay(1500) == pytest.approx(recipe.decay(1499) * math.exp(-1.5), rel=1e-12)


def test_a_number_for_the_decay_is_the_factor_per_hundred_epochs() -> None:
    assert [Ssds().decay(epoch) for epoch in (0, 7, 1000)] == [1.0, 1.0, 1.0]
    half = Ssds(sigma_decay=0.5)
    for epoch, factor in ((0, 1.0), (50, math.sqrt(0.5)), (100, 0.5), (300, 0.125)):
        assert half.decay(epoch) == pytest.approx(factor, rel=1e-15)


def test_the_decay_reaches_sigma_and_alpha() -> None:
    fields: dict[str, Any] = {"ascent": "raw", "budget": "multiplier", "c1": 10.0}
    late = visited(ssds(sigma=0.4, alpha=2.0, sigma_decay=0.25, **fields), epoch=100)
    early = visited(ssds(sigma=0.1, alpha=0.5, **fields))
    assert_near(bank(late), bank(early), 1e-14)
    assert_near(bank(late, "v"), bank(early, "v"), 1e-14)
    assert_near(weights_of(late.model), weights_of(early.model), 1e-14)


@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf, -1])
def test_a_decay_that_is_no_factor_is_refused(factor: float) -> None:
    # A negative number to the power of half a hundred epochs is complex.
    with pytest.raises(ValidationError):
        Ssds(sigma_decay=factor)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ascent": "raw", "sigma": "eps/4"}, "pixel^2 per nat"),
        ({"sigma": 0.0}, "positive"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"v0": -1.0}, "greater than or equal to 0"),
        ({"c1": 0.0}, "greater than 0"),
        ({"lam0": -1.0}, "greater than or equal to 0"),
        ({"replays": 0}, "greater than 0"),
        ({"order": "w_last"}, "jacobi"),
        ({"t0": math.nan}, "t0"),
        ({"v0": math.nan}, "v0"),
    ],
    ids=str,
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Ssds.model_validate(fields)
    assert words in str(caught.value)


def test_only_the_simultaneous_order_refuses_awp() -> None:
    for order in ORDERS:
        recipe = Ssds.model_validate({"order": order})
        if order == "jacobi":
            with pytest.raises(ValueError, match="awp does not go with ssds: .*one pass"):
                recipe.build(ball_of("linf"), Awp())
        else:
            recipe.build(ball_of("linf"), Awp())


@pytest.mark.parametrize("order", ORDERS)
def test_weighting_by_nothing_changes_nothing_and_clipping_clips(order: str) -> None:
    recipe = Ssds.model_validate({"order": order})
    plain = visited(recipe.build(ball_of("linf"), Plain()))
    weighed = visited(recipe.build(ball_of("linf"), Engm(alpha=math.inf)))
    assert_near(weights_of(weighed.model), weights_of(plain.model), 1e-13)
    assert_near(bank(weighed), bank(plain), 1e-12)
    # One norm for all of them, small enough that every sample is weighed down.
    small = recipe.build(ball_of("linf"), Engm(alpha=1e-3, estimator="exact"))
    state = state_of(tiny_net(), small)
    small.step(state, batch_of(8))
    start = torch.zeros(8, 1, 8, 8).double()
    if order == "jacobi":  # the weights of the mean do not reach the perturbation
        grad = slopes(state_of(tiny_net(), small), batch_of(8), start)
        away = small.ball.feasible(small.ball.eps / 4 * grad.sign(), batch_of(8).images)
        assert_near(bank(state), away, 1e-12)
    clipped = recipe.build(ball_of("linf"), Clip(max_norm=1e-3))
    state = state_of(tiny_net(), clipped, lr=1.0, momentum=0)
    before = weights_of(state.model)
    clipped.step(state, batch_of(8))
    assert float((weights_of(state.model) - before).norm()) == pytest.approx(1e-3, rel=1e-6)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_only_the_images_of_the_batch_are_remembered_anew(order: str) -> None:
    algorithm = ssds(order=order, budget="multiplier", alpha=0.1)
    state, whole = state_of(tiny_net(), algorithm, num_images=11), batch_of(11)
    algorithm.step(state, whole)
    before = {name: bank(state, name).clone() for name in ("delta", "v")}
    index = torch.tensor([7, 0, 4])
    algorithm.step(state, whole[index])
    others = torch.tensor([i for i in range(11) if i not in index])
    for name, old in before.items():
        assert torch.equal(bank(state, name)[others], old[others])
        assert bool((bank(state, name)[index] != old[index]).view(3, -1).any(1).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_canonical_bank_follows_crop_and_flip_and_keeps_what_the_crop_left_out(
    order: str, mirrored: bool
) -> None:
    algorithm = ssds(order=order, sigma="eps/3")
    state = state_of(tiny_net(), algorithm)
    store, plain = state.part("delta", SampleStore), batch_of(8)
    for seed in range(4):
        view = views_of(8, pad=2, seed=seed, mirrored=mirrored)
        batch = dataclasses.replace(batch_of(8, seed=seed), view=view)
        before = bank(state).clone()
        algorithm.step(state, batch)
        after = bank(state)
        shown = paste(torch.ones_like(before), view, torch.zeros_like(before)) > 0
        assert torch.equal(after[~shown], before[~shown]) and bool((~shown).any())
        # Inside, the bank is what the batch's own frame reads, pasted back.
        assert torch.equal(paste(store.read(batch), view, after), after)
        assert (after[shown] != before[shown]).any()
        assert torch.equal(store.read(plain), after)


def test_a_bank_that_is_not_aligned_ignores_the_view() -> None:
    runs = []
    for pad in (0, 2):
        algorithm = ssds(bank_align="none")
        state = state_of(tiny_net(), algorithm)
        for seed in range(3):
            view = views_of(8, pad, seed) if pad else None
            algorithm.step(state, dataclasses.replace(batch_of(8, seed=seed), view=view))
        runs.append(state)
    assert equal(*runs) and torch.equal(bank(runs[0]), bank(runs[1]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("budget", ["project", "multiplier", "full"])
def test_a_resumed_run_goes_on_bit_for_bit(order: str, budget: str) -> None:
    algorithm = ssds(order=order, budget=budget, bank_dtype="fp16", alpha=0.5, noise=True)
    state, other = whole_and_resumed(algorithm)
    assert equal(state, other)
    assert algorithm.measures(state, batch_of(8)) == algorithm.measures(other, batch_of(8))


def test_memory_is_what_the_budget_needs() -> None:
    wanted = {"project": {"delta"}, "multiplier": {"delta", "v"}}
    wanted["full"] = {"delta", "v", "epigraph"}
    for budget, names in wanted.items():
        assert state_of(tiny_net(), ssds(budget=budget)).parts.keys() == names


# --- noise, replays, cost ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_noise_is_fresh_at_each_visit_feasible_and_not_remembered(norm: str, order: str) -> None:
    algorithm = ssds(norm, order=order, noise=True, sigma=1e-300, replays=2)
    state, ball = state_of(tiny_net(), algorithm), algorithm.ball
    seen = pixels_seen(state)
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        seen.clear()
        algorithm.step(state, batch)
        assert len(seen) == (2 if order == "jacobi" else 4)
        for images in seen:
            # 1e-6: the noise of l2 and l1 is drawn in float32.
            assert float(ball.norm_of(images - batch.images).max()) <= ball.eps * (1 + 1e-6)
            assert float(images.min()) >= 0 and float(images.max()) <= 1
        # delta stands still, so that nothing but the noise can differ.
        second = 1 if order == "jacobi" else 2
        assert not torch.equal(seen[0], seen[second])


def test_the_noise_moves_the_point_of_the_gradient_and_nothing_else() -> None:
    algorithm = ssds(order="jacobi", noise=True, sigma="eps/3")
    state, ball = state_of(tiny_net(), algorithm), algorithm.ball
    delta = torch.zeros(8, 1, 8, 8).double()
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        start = ball.feasible(delta, batch.images)
        noise = ball.noise(batch.images, batch.rng, "noise/0")
        point = ball.feasible(start + noise, batch.images)
        grad = slopes(state, batch, point)
        outcome = algorithm.step(state, batch)
        assert torch.equal(outcome.delta, point)
        delta = ball.feasible(start + ball.eps / 3 * grad.sign(), batch.images)
        assert_near(bank(state), delta, 1e-13)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("budget", ["project", "multiplier", "full"])
def test_replays_are_as_many_visits_of_the_batch(order: str, budget: str) -> None:
    fields: dict[str, Any] = {"order": order, "budget": budget, "alpha": 0.3}
    once, often = ssds(**fields), ssds(replays=3, **fields)
    assert_three_visits(once, often)


@pytest.mark.parametrize(("order", "fe"), [("delta_first", 5), ("w_first", 5), ("jacobi", 3)])
@pytest.mark.parametrize("budget", ["project", "full"])
def test_cost_is_what_the_card_says(order: str, budget: str, fe: int) -> None:
    state = visited(ssds(order=order, budget=budget, replays=2, noise=True), 2)
    assert state.meter.fe == 2 * 2 * 8 * fe


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bn", ["eval", "batch_nostat", "train"])
def test_running_statistics_move_once_per_update_unless_the_attack_trains_too(
    order: str, bn: BatchNorm
) -> None:
    state = visited(ssds(order=order, attack_bn=bn), 3, batch_norm=True)
    norm = state.model.get_submodule("norm")
    passes = 6 if bn == "train" and order != "jacobi" else 3
    assert int(norm.num_batches_tracked) == passes  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", ["fp32", "fp16", "int8"])
def test_what_the_network_sees_is_feasible_whatever_the_bank_and_the_crop(
    norm: str, order: str, kept: str
) -> None:
    algorithm, ball = ssds(norm, order=order, bank_dtype=kept, sigma="eps/2"), ball_of(norm)
    state = state_of(tiny_net(), algorithm)
    seen = pixels_seen(state)
    for seed in range(3):
        batch = dataclasses.replace(batch_of(8, seed=seed), view=views_of(8, 2, seed))
        seen.clear()
        algorithm.step(state, batch)
        for images in seen:
            assert float(ball.norm_of(images - batch.images).max()) <= ball.eps + 1e-13
            assert float(images.min()) >= 0 and float(images.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_at_fixed_weights_the_loss_of_the_remembered_perturbations_climbs(
    norm: str, order: str
) -> None:
    # Steps of eps/8: small enough that a perturbation does not jump over its maximum.
    algorithm = ssds(norm, order=order, sigma="eps/8")
    state, batch = state_of(tiny_net(), algorithm, lr=0.0), batch_of(8)
    means = [float(algorithm.step(state, batch).losses.mean()) for _ in range(12)]
    # In l1 a step of a few pixels at a time takes from others what the projection cuts.
    steady = all(later > sooner - 1e-3 for sooner, later in zip(means, means[1:], strict=False))
    assert steady or norm == "l1"
    assert means[-1] > means[0] + 0.05
