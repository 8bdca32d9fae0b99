"""Dynamic adversarial training as printed and as released: anchors, weights, presets, and its clock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, ball_of, batch_of, probe_of, state_of, tiny_net

from raytrain.algorithms import Dynamic, Nested, Pgd
from raytrain.attacks import Gap, Uniform
from raytrain.core.cost import Meter
from raytrain.core.schedules import Power
from raytrain.core.types import Progress, per_sample_dot
from raytrain.outer import Plain

NORMS = ["linf", "l2", "l1"]


@pytest.mark.parametrize("norm", NORMS)
def test_fosc_from_the_start_differs_by_the_start_times_the_gradient(norm: str) -> None:
    # c_start - c_natural = <u, g>: found by moving the threshold across each sample's value.
    ball, batch = ball_of(norm), batch_of(16)
    start = Uniform().delta(ball, batch, None)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(batch.images.shape, generator=generator, dtype=torch.float64)
    delta = ball.feasible(start + 0.1 * grad, batch.images)
    wanted = ball.gap(delta, grad) + per_sample_dot(start, grad)
    for i in range(16):
        for nudge, reached in ((1e-9, True), (-1e-9, False)):
            c_max = float(wanted[i]) + nudge
            if c_max <= 0:
                continue
            stop = Gap(c_max=c_max, anchor="start")
            _, found = stop.update((), probe_of(ball, batch, delta, grad, start=start))
            assert found is not None
            assert bool(found[i]) is reached


def test_fosc_from_the_start_may_be_negative_and_the_paper_s_may_not() -> None:
    ball, batch = ball_of("linf"), batch_of(64)
    start = Uniform().delta(ball, batch, None)
    grad = torch.randn(batch.images.shape, dtype=torch.float64)
    vertex = ball.eps * grad.sign()  # the best of the ball: FOSC from the image is 0
    share = {}
    for anchor in ("start", "natural"):
        stop = Gap.model_validate({"c_max": 0.0, "anchor": anchor})
        _, found = stop.update((), probe_of(ball, batch, vertex, grad, start=start))
        assert found is not None
        share[anchor] = found.double().mean()
    assert share["natural"] == 1
    assert 0.1 < float(share["start"]) < 0.9  # a coin-flip


def test_own_loss_weights_give_the_gradient_of_half_the_mean_squared_loss() -> None:
    batch = batch_of(8)
    algorithm = Dynamic(preset="official", steps=2).build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm, lr=1.0, momentum=0.0)
    state.epoch = 1
    twin = tiny_net()
    outcome = algorithm.step(state, batch)
    loss = F.cross_entropy(twin(batch.images + outcome.delta), batch.labels, reduction="none")
    (0.5 * loss.square().mean()).backward()
    for ours, theirs in zip(state.model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert_near(ours.detach(), (theirs - theirs.grad).detach(), 1e-13)


def test_the_first_epoch_is_not_weighted() -> None:
    models = []
    for weighting in ("none", "own_ce"):
        recipe = Dynamic.model_validate({"weighting": weighting, "steps": 2})
        algorithm = recipe.build(ball_of("linf"), Plain())
        state = state_of(tiny_net(), algorithm)
        algorithm.step(state, batch_of(8))
        models.append(torch.cat([p.flatten() for p in state.model.parameters()]))
    assert torch.equal(*models)


def test_own_loss_weights_cost_one_forward_more() -> None:
    algorithm = Dynamic(preset="official", c_max=-1).build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm)
    state.epoch = 1
    algorithm.step(state, batch_of(8))
    assert state.meter == Meter(forwards=8 * 12, input_backwards=80, full_backwards=8)
    assert state.meter.fe == 8 * 24


def test_a_preset_fills_what_is_not_given_and_nothing_else() -> None:
    paper, official = Dynamic(preset="paper"), Dynamic(preset="official")
    assert (paper.anchor, paper.weighting, paper.compact) == ("natural", "none", True)
    assert (official.anchor, official.weighting, official.compact) == ("start", "own_ce", False)
    assert paper.decay == Power(end=100 / 120) == official.decay
    own = Dynamic(preset="official", anchor="natural", steps=5)
    assert (own.anchor, own.steps, own.weighting) == ("natural", 5, "own_ce")
    assert Dynamic.model_validate(own.model_dump(mode="json")) == own


def test_the_paper_s_threshold_at_its_epochs() -> None:
    algorithm = Dynamic(preset="paper").build(ball_of("linf"), Plain())
    assert isinstance(algorithm, Nested)
    stop = algorithm.attack.stop
    assert isinstance(stop, Gap)
    wanted = {0: 0.5, 50: 0.25, 99: 0.005, 100: 0.0, 119: 0.0}
    for epoch, threshold in wanted.items():
        assert stop.threshold(epoch / 120) == pytest.approx(threshold, abs=1e-12)


@pytest.mark.parametrize(
    ("per", "clock"), [("epoch", Progress(0.0, 0.9)), ("step", Progress(0.9, 0.0))]
)
def test_the_threshold_follows_the_clock_that_was_asked_for(per: str, clock: Progress) -> None:
    # The other hand of the clock is past the end, where every sample takes all steps.
    recipe = Dynamic.model_validate({"per": per, "c_max": 1e9, "steps": 4})
    algorithm = recipe.build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm)
    state.progress = clock
    assert algorithm.step(state, batch_of(8)).steps.tolist() == [1] * 8
    state.progress = Progress(0.9, 0.9)
    assert algorithm.step(state, batch_of(8)).steps.tolist() == [4] * 8


@pytest.mark.parametrize("norm", NORMS)
def test_with_own_loss_weights_clamped_to_one_it_is_the_paper_s(norm: str) -> None:
    # In the first epoch, where they are one; the anchor alone changes where samples stop.
    recipes = [
        Dynamic(preset="official", anchor="natural", compact=True),
        Dynamic(preset="paper"),
    ]
    states = []
    for recipe in recipes:
        algorithm = recipe.build(ball_of(norm), Plain())
        state = state_of(tiny_net(), algorithm)
        algorithm.step(state, batch_of(8))
        states.append(torch.cat([p.flatten() for p in state.model.parameters()]))
    assert torch.equal(*states)


def test_a_threshold_below_zero_in_the_official_preset_is_pgd_in_the_first_epoch() -> None:
    states = []
    for recipe in (Dynamic(preset="official", c_max=float("-inf")), Pgd()):
        algorithm = recipe.build(ball_of("linf"), Plain())
        state = state_of(tiny_net(), algorithm)
        algorithm.step(state, batch_of(8))
        states.append(torch.cat([p.flatten() for p in state.model.parameters()]))
    assert torch.equal(*states)
