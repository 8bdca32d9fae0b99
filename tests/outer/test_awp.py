"""AWP: the step is taken where the weights are at their worst, and the weights come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    applied,
    assert_near,
    ball_of,
    batch_of,
    everything,
    moved,
    one_by_one,
    same,
    state_of,
    through_the_batch,
    tiny_net,
    weights_of,
)
from outer_helpers import CE, INSTANCES, OBJECTIVES, Scaled, ready, trained, update
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.algorithms import (
    AbstractRecipe,
    Free,
    GradAlign,
    L2l,
    Pgd,
    SiHg,
    Ssds,
    Yopo,
)
from raytrain.core.algorithm_state import Numbers
from raytrain.core.cost import Meter
from raytrain.core.losses import AbstractLoss
from raytrain.core.types import Batch
from raytrain.models import ModelSpec
from raytrain.outer import Awp, Clip, Engm, Plain
from raytrain.outer.base import AbstractOuter
from raytrain.outer.engm import EngmMemory

THEN: dict[str, AbstractOuter] = {
    "sgd": Plain(),
    "clip": Clip(max_norm=0.5),
    "exact": Engm(alpha=0.5, estimator="exact"),
    "affine": Engm(alpha=0.5, tau=2),
    "loss": Engm(alpha=0.5, estimator="loss", tau=2),
}
BASES = [
    "natural",
    "fgsm_rs",
    "n_fgsm",
    "pgd",
    "trades",
    "mart",
    "dynamic",
    "si_hg",
    "ssds",
    "l2l",
]
RECIPES: dict[str, AbstractRecipe] = {
    **{name: INSTANCES[name] for name in BASES},
    "si_hg_B": SiHg(mode="B"),
    "si_hg_N": SiHg(mode="N"),
    "ssds_w_first": Ssds(order="w_first"),
    "l2l_trades": L2l(steps=2, loss="trades"),
}


def awp(**fields: Any) -> Awp:
    return Awp.model_validate(fields)


def worst(
    model: nn.Module,
    batch: Batch,
    gamma: float,
    steps: int = 1,
    objective: AbstractLoss = CE,
) -> nn.Module:
    """A twin of the model at w + v, v by the formula and one gradient of the mean loss per step."""
    there = copy.deepcopy(model)
    for _ in range(steps):
        twin = copy.deepcopy(there).train()
        twin.zero_grad(set_to_none=True)
        objective.outer(twin, batch, moved(batch), ()).mean().backward()
        with torch.no_grad():
            for w, at, of in zip(
                model.parameters(), there.parameters(), twin.parameters(), strict=True
            ):
                if w.dim() > 1 and of.grad is not None:
                    at.add_(gamma * w.norm() * of.grad / (of.grad.norm() + 1e-20))
    return there


class Seen(nn.Module):
    """A network that remembers with which weights it was called, and in which mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls: list[tuple[bool, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, weights_of(self.net)))
        return self.net(x)


# --- the perturbation -------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1e-3, 0.02, 1.0])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_weight_tensor_moves_by_gamma_of_its_own_norm_up_the_mean_gradient(
    name: str, batch_norm: bool, gamma: float
) -> None:
    objective, batch = OBJECTIVES[name], batch_of(8)
    outer, model = awp(gamma=gamma), tiny_net(batch_norm=batch_norm)
    state = ready(outer, model, objective)
    found = outer.offsets(state, state.oracle(batch, objective, "eval"), moved(batch))
    weights = dict(model.named_parameters())
    assert found.keys() == {name for name, w in weights.items() if w.dim() > 1}
    mean = through_the_batch(model, objective, batch, moved(batch)).mean(0)
    parts = dict(zip(weights, mean.split([w.numel() for w in weights.values()]), strict=True))
    for key, v in found.items():
        w = weights[key].detach()
        assert float(v.norm()) == pytest.approx(gamma * float(w.norm()), rel=1e-12)
        assert_near(v.flatten() / v.norm(), parts[key] / parts[key].norm(), 1e-10)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
def test_the_training_pass_runs_at_the_moved_weights_and_nowhere_else(batch_norm: bool) -> None:
    batch, net = batch_of(8), tiny_net(batch_norm=batch_norm)
    model = Seen(net)
    here, there = weights_of(net), weights_of(worst(net, batch, 0.01))
    losses = update(awp(gamma=0.01), ready(awp(gamma=0.01), model), batch)
    assert [training for training, _ in model.calls] == [True, True]
    assert torch.equal(model.calls[0][1], here)
    assert_near(model.calls[1][1], there, 1e-14)
    # Tensors of one dimension are where they were, to the bit.
    flat = torch.cat([torch.full((p.numel(),), p.dim() == 1) for p in net.parameters()])
    assert torch.equal(model.calls[1][1][flat], here[flat])
    twin = worst(tiny_net(batch_norm=batch_norm), batch, 0.01).train()
    assert_near(losses, CE.outer(twin, batch, moved(batch), ()).detach(), 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_higher_where_the_gradient_is_measured(name: str) -> None:
    batch, objective = batch_of(8), OBJECTIVES[name]
    plain = update(Plain(), ready(Plain(), tiny_net(), objective), batch, objective)
    outer = awp(gamma=1e-3)
    adversarial = update(outer, ready(outer, tiny_net(), objective), batch, objective)
    assert float(adversarial.mean()) > float(plain.mean())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_each_ascent_step_starts_where_the_one_before_ended(steps: int) -> None:
    batch, outer, model = batch_of(8), awp(gamma=0.02, steps=steps), tiny_net(batch_norm=True)
    state = ready(outer, model)
    before = dict(everything(model))
    found = outer.offsets(state, state.oracle(batch, CE, "eval"), moved(batch))
    there = worst(model, batch, 0.02, steps)
    for (name, w), at in zip(model.named_parameters(), there.parameters(), strict=True):
        if w.dim() > 1:
            assert_near(found[name], (at - w).detach(), 1e-12)
            assert float(found[name].norm()) <= steps * 0.02 * float(w.detach().norm()) * (
                1 + 1e-12
            )
    # Looking for v changes nothing, to the bit.
    assert all(torch.equal(before[k], v) for k, v in everything(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["small_cnn", "small_cnn_nobn", "resnet18", "preact_resnet18", "wideresnet-10-1"]
)
def test_in_our_own_networks_every_tensor_that_moves_is_called_a_weight(name: str) -> None:
    with torch.device("meta"):
        model = ModelSpec(name=name).build(3, 32, 10, [0.5] * 3, [0.2] * 3)
    moving = [key for key, p in model.named_parameters() if p.dim() > 1]
    assert moving and all("weight" in key for key in moving)


def test_a_tensor_moves_whatever_its_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_net()
            self.embedding = nn.Parameter(torch.ones(1, 8, 8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.embedding)

    outer, model, batch = awp(gamma=0.01), Scaled(), batch_of(8)
    state = ready(outer, model)
    found = outer.offsets(state, state.oracle(batch, CE, "eval"), moved(batch))
    assert float(found["embedding"].norm()) == pytest.approx(0.01 * 8, rel=1e-12)


def test_the_scale_of_the_loss_does_not_move_v() -> None:
    batch, found = batch_of(8), []
    for smooth in (1.0, 1e-6):
        outer, model = awp(gamma=0.01), tiny_net()
        objective = Scaled(by=(smooth,) * 4)
        state = ready(outer, model, objective)
        found.append(outer.offsets(state, state.oracle(batch, objective, "eval"), moved(batch)))
    for name in found[0]:
        assert_near(found[0][name], found[1][name], 1e-9)


# --- the step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_weights_are_the_saved_ones_plus_the_step_taken_at_the_moved_ones(
    name: str, batch_norm: bool, steps: int
) -> None:
    objective, outer = OBJECTIVES[name], awp(gamma=0.02, steps=steps)
    model = tiny_net(batch_norm=batch_norm)
    state = ready(outer, model, objective, lr=0.05, momentum=0.8, weight_decay=0.03)
    momentum = torch.zeros_like(weights_of(model))
    for seed in range(3):
        batch, before = batch_of(8, seed=seed), weights_of(model)
        there = worst(model, batch, 0.02, steps, objective)
        grad = through_the_batch(there, objective, batch, moved(batch)).mean(0)
        update(outer, state, batch, objective)
        # Momentum and weight decay, too, belong to w + v.
        momentum = 0.8 * momentum + grad + 0.03 * weights_of(there)
        assert_near(weights_of(model), before - 0.05 * momentum, 1e-11)
    kept = [state.optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()]
    assert_near(torch.cat(kept), momentum, 1e-10)


@pytest.mark.parametrize("then", THEN)
def test_a_step_of_length_zero_puts_the_very_bits_back(then: str) -> None:
    for dtype in (torch.float32, torch.float64):
        outer = awp(gamma=0.3, steps=2, then=THEN[then])
        model = tiny_net(dtype)
        before = weights_of(model)
        update(outer, ready(outer, model, lr=0.0), batch_of(8, dtype=dtype))
        assert torch.equal(weights_of(model), before)


def test_in_float32_the_weights_do_not_drift_by_adding_and_subtracting() -> None:
    # Steps so small that the rounding of w + v would be larger than they are.
    outer, model = awp(gamma=0.5), tiny_net(torch.float32)
    state, before = ready(outer, model, lr=1e-12, momentum=0.0), weights_of(model)
    for seed in range(20):
        update(outer, state, batch_of(8, dtype=torch.float32, seed=seed))
    assert float((weights_of(model) - before).abs().max()) <= 1e-9


@pytest.mark.parametrize("then", THEN)
def test_a_zero_gradient_moves_nothing(then: str) -> None:
    outer, model = awp(gamma=0.1, steps=2, then=THEN[then]), tiny_net()
    objective = Scaled(by=(0.0,) * 4)
    before = weights_of(model)
    update(outer, ready(outer, model, objective), batch_of(8), objective)
    assert torch.equal(weights_of(model), before)


def test_a_weight_of_norm_zero_stays_where_it_is_during_the_ascent() -> None:
    outer, model = awp(gamma=0.1), tiny_net()
    with torch.no_grad():
        model.conv2.weight.zero_()
    state = ready(outer, model)
    found = outer.offsets(state, state.oracle(batch_of(8), CE, "eval"), moved(batch_of(8)))
    assert float(found["conv2.weight"].abs().max()) == 0
    update(outer, state, batch_of(8))
    assert bool(torch.isfinite(weights_of(model)).all())


def test_weights_that_are_not_trained_are_not_moved_either() -> None:
    model, outer, batch = tiny_net(batch_norm=True), awp(gamma=0.1), batch_of(8)
    model.conv1.weight.requires_grad_(False)
    kept = model.conv1.weight.clone()
    seen = Seen(model)
    state = ready(outer, seen)
    assert "net.conv1.weight" not in outer.offsets(
        state, state.oracle(batch, CE, "eval"), moved(batch)
    )
    update(outer, state, batch)
    size = kept.numel()
    assert all(torch.equal(weights[:size], kept.flatten()) for _, weights in seen.calls)
    assert torch.equal(model.conv1.weight, kept) and model.conv1.weight.grad is None


def test_a_weight_that_the_loss_does_not_use_is_left_alone() -> None:
    outer, model = awp(gamma=0.1), tiny_net()
    model.spare = nn.Linear(3, 2, dtype=torch.float64)
    kept = model.spare.weight.detach().clone()
    twin = copy.deepcopy(model)
    update(Plain(), ready(Plain(), twin), batch_of(8))  # plain SGD has no objection
    update(outer, ready(outer, model), batch_of(8))
    assert torch.equal(model.spare.weight, kept)


# --- what it leaves alone ---------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("then", THEN)
def test_running_statistics_see_the_training_pass_at_the_moved_weights_once(
    then: str, steps: int
) -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=True)
    there = worst(model, batch, 0.05, steps).train()
    for name, buffer in there.named_buffers():
        buffer.copy_(dict(model.named_buffers())[name])
    there(batch.images + moved(batch))
    outer = awp(gamma=0.05, steps=steps, then=THEN[then])
    update(outer, ready(outer, model), batch)
    for (name, buffer), wanted in zip(model.named_buffers(), there.buffers(), strict=True):
        assert_near(buffer.double(), wanted.double(), 1e-12)
        if name.endswith("tracked"):
            assert int(buffer) == 1


@pytest.mark.parametrize("training", [True, False])
def test_flags_randomness_and_the_batch_are_as_they_were(training: bool) -> None:
    outer, model, batch = awp(gamma=0.05, steps=2), tiny_net(batch_norm=True), batch_of(8)
    state = ready(outer, model)
    model.train(training)
    model.norm.eval()
    flags, random = [m.training for m in model.modules()], torch.get_rng_state()
    images, delta = batch.images.clone(), moved(batch)
    copied = delta.clone()
    outer.update(state, state.oracle(batch, CE, "eval"), delta)
    assert [m.training for m in model.modules()] == flags
    assert model.norm.track_running_stats
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch.images, images) and torch.equal(delta, copied)


class Interrupted(RuntimeError):
    """Something that goes wrong in the middle of a step."""


def test_an_update_that_fails_leaves_the_weights_where_they_were() -> None:
    outer, model = awp(gamma=0.1), tiny_net()
    state, before = ready(outer, model), weights_of(model)

    def fail(*_: Any) -> None:
        raise Interrupted

    state.optimizer.register_step_pre_hook(fail)
    with pytest.raises(Interrupted):
        update(outer, state, batch_of(8))
    assert torch.equal(weights_of(model), before)


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_without_size_or_before_its_first_epoch_it_is_the_base_method_bit_for_bit(
    name: str,
) -> None:
    base = trained(RECIPES[name], Plain())
    for outer in (awp(gamma=0), awp(gamma=0.1, warmup=1)):
        state = trained(RECIPES[name], outer)
        assert same(state.model, base.model) and state.meter == base.meter
    moving = trained(RECIPES[name], awp(gamma=0.1))
    assert not same(moving.model, base.model)
    assert bool(torch.isfinite(weights_of(moving.model)).all())


@pytest.mark.parametrize("then", THEN)
def test_without_size_it_is_the_update_that_follows_bit_for_bit(then: str) -> None:
    base = trained(Pgd(steps=1), THEN[then], steps=3)
    for fields in ({"gamma": 0.0}, {"gamma": 0.1, "warmup": 5}):
        state = trained(Pgd(steps=1), awp(then=THEN[then], **fields), steps=3)
        assert same(state.model, base.model) and state.meter == base.meter


def test_it_begins_with_the_epoch_after_the_warm_up() -> None:
    kept = {
        epoch: same(
            trained(Pgd(steps=1), awp(gamma=0.1, warmup=2), epoch=epoch).model,
            trained(Pgd(steps=1), Plain(), epoch=epoch).model,
        )
        for epoch in range(4)
    }
    assert kept == {0: True, 1: True, 2: False, 3: False}


# --- what follows -----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "affine", "input", "loss"])
def test_engm_measures_norms_and_gradients_at_the_moved_weights(estimator: str) -> None:
    batch, model = batch_of(8), tiny_net()
    there = worst(model, batch, 0.05)
    then = Engm.model_validate({"alpha": 1.0, "estimator": estimator, "kappa": 7.0})
    outer = awp(gamma=0.05, then=then)
    update(outer, ready(outer, model), batch)
    twin = ready(then, there)
    update(then, twin, batch)
    assert_near(applied(model), applied(there), 1e-11)
    if estimator == "exact":
        grads = one_by_one(worst(tiny_net(), batch, 0.05), CE, batch, moved(batch))
        weights = (1 / grads.norm(dim=1)).clamp(max=1)
        assert int((weights < 1).sum()) > 0
        assert_near(applied(model), (weights[:, None] * grads).mean(0), 1e-11)


def test_clip_bounds_the_gradient_at_the_moved_weights() -> None:
    batch, model = batch_of(8), tiny_net()
    there = worst(model, batch, 0.05)
    grad = one_by_one(there, CE, batch, moved(batch)).mean(0)
    outer = awp(gamma=0.05, then={"name": "clip", "max_norm": 0.1})
    update(outer, ready(outer, model), batch)
    assert float(applied(model).norm()) <= 0.1
    assert_near(applied(model), 0.1 * grad / (grad.norm() + 1e-6), 1e-12)


def test_engm_that_bounds_nothing_changes_nothing() -> None:
    states = [
        trained(Pgd(steps=1), awp(gamma=0.05, then=then))
        for then in (Plain(), Engm(alpha=float("inf")), Clip(max_norm=1e12))
    ]
    assert same(states[0].model, states[1].model) and same(states[0].model, states[2].model)


def test_its_memory_and_its_measures_are_those_of_what_follows() -> None:
    outer = awp(gamma=0.05, then={"name": "engm", "tau": 2})
    state = ready(outer, tiny_net())
    for seed in range(3):
        update(outer, state, batch_of(8, seed=seed))
    assert state.part("engm", EngmMemory).counts["updates"] == 3
    assert outer.measures(state).keys() == {"engm/clipped", "engm/gamma1", "engm/gamma0"}
    assert awp().measures(ready(awp(), tiny_net())) == {}


def test_a_factor_on_the_rate_reaches_the_step() -> None:
    batch, moves = batch_of(8), []
    for rate in (1.0, 0.25):
        outer, model = awp(gamma=0.05), tiny_net()
        state, before = ready(outer, model, momentum=0.0), weights_of(model)
        outer.update(state, state.oracle(batch, CE, "eval"), moved(batch), rate=rate)
        moves.append(weights_of(model) - before)
        assert [group["lr"] for group in state.optimizer.param_groups] == [0.1]
    assert_near(0.25 * moves[0], moves[1], 1e-14)


def test_the_multipliers_of_ssds_scale_its_rate() -> None:
    algorithm = Ssds(budget="full", lam0=0.0, lam_mode="plain", c2=1e12, alpha=1e-9).build(
        ball_of("linf"), awp(gamma=0.05)
    )
    state = state_of(tiny_net(), algorithm)
    before = weights_of(state.model)
    algorithm.step(state, batch_of(8))
    assert state.part("epigraph", Numbers)["lam"] < 1e-6
    assert float((weights_of(state.model) - before).abs().max()) < 1e-6


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("name", "walks"),
    [("natural", 1), ("pgd", 1), ("fgsm_rs", 1), ("si_hg", 1), ("ssds", 1), ("trades", 2)]
    + [("mart", 2), ("l2l", 1), ("l2l_trades", 2)],
)
def test_an_ascent_step_costs_one_training_pass(name: str, walks: int, steps: int) -> None:
    base = trained(RECIPES[name], Plain(), steps=1).meter
    ours = trained(RECIPES[name], awp(gamma=0.01, steps=steps), steps=1).meter
    more = steps * walks * 8
    assert ours == Meter(
        forwards=base.forwards + more,
        input_backwards=base.input_backwards,
        full_backwards=base.full_backwards + more,
    )
    assert ours.fe - base.fe == 8 * 3 * walks * steps


def test_costs_of_awp_and_of_what_follows_add_up() -> None:
    base = trained(Pgd(steps=1), Plain(), steps=1).meter.fe
    exact = awp(gamma=0.01, then=Engm(estimator="exact"))
    assert trained(Pgd(steps=1), exact, steps=1).meter.fe == base + 8 * (3 + 3)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["sgd", "clip", "engm"])
@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Free(), "one pass"),
        (Yopo(), "costate"),
        (GradAlign(), "aligns with"),
        (SiHg(mode="C"), "one pass"),
        (SiHg(mode="J"), "one pass"),
        (SiHg(mode="T"), "table"),
        (Ssds(order="jacobi"), "one pass"),
    ],
    ids=["free", "yopo", "gradalign", "si_hg_C", "si_hg_J", "si_hg_T", "ssds_jacobi"],
)
def test_algorithms_tied_to_the_present_weights_refuse_it(
    recipe: AbstractRecipe, reason: str, then: str
) -> None:
    name = type(recipe).model_fields["name"].default
    with pytest.raises(ValueError, match=f"outer: awp does not go with {name}: .*{reason}"):
        recipe.build(ball_of("linf"), awp(then=then))


@pytest.mark.parametrize(
    "fields",
    [{"gamma": -0.1}, {"gamma": float("inf")}, {"gamma": float("nan")}, {"steps": 0}]
    + [{"warmup": -1}, {"then": "awp"}, {"proxy_lr": 0.01}],
    ids=str,
)
def test_nonsense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        awp(**fields)


def test_it_survives_a_trip_through_its_own_record() -> None:
    outer = awp(gamma=0.01, warmup=3, then={"name": "engm", "alpha": "inf"})
    assert Awp.model_validate_json(outer.model_dump_json()) == outer
