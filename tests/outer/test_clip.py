"""Clipping: the mean gradient, whole and averaged, is never longer than max_norm."""

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
    moved,
    one_by_one,
    same,
    state_of,
    tiny_net,
    weights_of,
)
from outer_helpers import CE, INSTANCES, ready, trained, update
from pydantic import ValidationError
from torch import Tensor

from raytrain.algorithms import (
    AbstractRecipe,
    Free,
    Pgd,
    SiHg,
    Ssds,
    Yopo,
)
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch
from raytrain.outer import Clip, Engm, Plain
from raytrain.outer.base import AbstractOuter

EVERY: dict[str, AbstractRecipe] = {
    **INSTANCES,
    "si_hg_C": SiHg(mode="C"),
    "si_hg_T": SiHg(mode="T"),
}


def updated(outer: AbstractOuter, batch: Batch, **options: Any) -> TrainState:
    state = ready(outer, tiny_net(), **options)
    update(outer, state, batch)
    return state


@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_takes_it_and_a_huge_bound_is_sgd_bit_for_bit(name: str) -> None:
    plain = trained(EVERY[name], Plain())
    bound = 1e12 if name == "pgd" else float("inf")
    state = trained(EVERY[name], Clip(max_norm=bound))
    assert same(state.model, plain.model) and state.meter == plain.meter
    state = trained(EVERY[name], Clip(max_norm=1e-3))
    assert 0 < float(applied(state.model).norm()) <= 1e-3
    assert not same(state.model, plain.model)


@pytest.mark.parametrize("bound", [1e-3, 0.1, 1.0, 100.0])
def test_the_mean_gradient_keeps_its_direction_and_is_no_longer_than_the_bound(
    bound: float,
) -> None:
    batch = batch_of(8)
    mean = one_by_one(tiny_net(), CE, batch, moved(batch)).mean(0)
    found = applied(updated(Clip(max_norm=bound), batch).model)
    assert float(found.norm()) <= bound
    # torch adds 1e-6 to the norm.
    wanted = mean * min(1.0, bound / (float(mean.norm()) + 1e-6))
    assert_near(found, wanted, 1e-12)


def test_weight_decay_and_momentum_are_outside_the_bound() -> None:
    batch = batch_of(8)
    state = updated(Clip(max_norm=0.1), batch, lr=0.05, weight_decay=0.3)
    before = weights_of(tiny_net())
    step = applied(state.model) + 0.3 * before
    assert_near(weights_of(state.model), before - 0.05 * step, 1e-14)
    assert float(step.norm()) > 0.1


@pytest.mark.parametrize("bound", [0.1, 1.0, 1e3])
def test_one_sample_is_bounded_as_engm_does(bound: float) -> None:
    batch = batch_of(1)
    clip, engm = (
        applied(updated(outer, batch).model)
        for outer in (Clip(max_norm=bound), Engm(alpha=bound, estimator="exact"))
    )
    assert_near(clip, engm, 1e-6)


def test_several_samples_are_not_bounded_as_engm_does() -> None:
    batch = batch_of(8)
    norms = one_by_one(tiny_net(), CE, batch, moved(batch)).norm(dim=1)
    bound = float(norms.median())
    clip, engm = (
        applied(updated(outer, batch).model)
        for outer in (Clip(max_norm=bound), Engm(alpha=bound, estimator="exact"))
    )
    assert float((clip - engm).norm()) > 0.01 * float(clip.norm())


def test_a_zero_gradient_stays_zero() -> None:
    model = tiny_net()
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.copy_(torch.tensor([0.0, -1e9, -1e9, -1e9]))
    batch = batch_of(4, classes=1)
    state = ready(Clip(max_norm=0.1), model)
    before = weights_of(model)
    update(Clip(max_norm=0.1), state, batch)
    assert torch.equal(weights_of(model), before)


def test_weights_that_are_not_trained_do_not_count() -> None:
    model, batch = tiny_net(), batch_of(8)
    model.conv1.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 1e6)
    kept = model.conv1.weight.clone()
    mean = one_by_one(model, CE, batch, moved(batch)).mean(0)
    state = ready(Clip(max_norm=0.1), model)
    update(Clip(max_norm=0.1), state, batch)
    assert torch.equal(model.conv1.weight, kept)
    assert_near(applied(model), 0.1 * mean / (mean.norm() + 1e-6), 1e-12)


def full_gradient(recipe: AbstractRecipe) -> Tensor:
    """The gradient that one unbounded step applies."""
    algorithm = recipe.build(ball_of("linf"), Plain())
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    return applied(state.model)


@pytest.mark.parametrize(
    "recipe",
    [
        SiHg(mode="C", theta=1.0),
        Yopo(m=3, n=1),
        Yopo(m=2, n=1, stem_grad="both"),
        Free(m=1),
        Ssds(order="jacobi"),
        Pgd(steps=1),
    ],
    ids=["si_hg_C", "yopo", "yopo_both", "free", "ssds_jacobi", "pgd"],
)
def test_what_is_bounded_is_the_whole_gradient_of_the_step(recipe: AbstractRecipe) -> None:
    whole = full_gradient(recipe)
    bound = float(whole.norm()) / 3
    algorithm = recipe.build(ball_of("linf"), Clip(max_norm=bound))
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    found = applied(state.model)
    assert float(found.norm()) == pytest.approx(bound, rel=1e-5)
    assert_near(found, whole * bound / (whole.norm() + 1e-6), 1e-12)


def test_the_extrapolated_gradient_is_bounded_as_one() -> None:
    # (1 + theta) g(delta') - theta g(delta): bounding the two terms would give another direction.
    recipe, batch, twin = (
        SiHg(mode="C", theta=1.0, store="none", init="zero"),
        batch_of(8),
        tiny_net(),
    )
    algorithm = recipe.build(ball_of("linf"), Clip(max_norm=0.2))
    state = state_of(copy.deepcopy(twin), algorithm)
    outcome = algorithm.step(state, batch)
    first = one_by_one(twin, CE, batch, torch.zeros_like(batch.images)).mean(0)
    second = one_by_one(twin, CE, batch, outcome.delta).mean(0)
    combined = 2 * second - first
    assert float(combined.norm()) > 0.2
    assert_near(applied(state.model), 0.2 * combined / (combined.norm() + 1e-6), 1e-11)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_the_bound_is_a_positive_number(bound: float) -> None:
    with pytest.raises(ValidationError):
        Clip(max_norm=bound)
