"""Conformance tests of outer updates."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from raytrain.algorithms import Pgd, TradesRecipe
from raytrain.core.cost import CostSetting
from raytrain.outer import AbstractOuter
from raytrain.testing.algorithms import equal, trained
from raytrain.testing.toys import ball_of, batch_of, resumed, same, state_of, tiny_net

RECIPES = [Pgd(steps=1), TradesRecipe(steps=1)]
STEPS = 12
"""Steps over which costs are compared: a multiple of the period of rare measurements."""


class OuterConformance:
    """Subclass it in a test module and define the fixture `outer`.

    What the update measures rarely must have a period that divides 12.
    """

    def test_moves_the_weights_by_finite_steps_and_the_same_ones_again(
        self, outer: AbstractOuter
    ) -> None:
        algorithm = Pgd(steps=1).build(ball_of("linf"), outer)
        one, other = (trained(algorithm, batch_norm=True) for _ in range(2))
        assert all(p.isfinite().all() for p in one.model.parameters())
        assert equal(one, other) and not same(one.model, tiny_net(batch_norm=True))

    def test_resumes_from_a_checkpoint_bit_for_bit(self, outer: AbstractOuter) -> None:
        algorithm = Pgd(steps=1).build(ball_of("linf"), outer)
        state = trained(algorithm, batch_norm=True)
        again = resumed(state, algorithm)
        for one in (state, again):
            algorithm.step(one, batch_of(8, seed=7))
        assert equal(state, again)

    def test_changes_neither_flags_nor_random_state_nor_the_perturbation(
        self, outer: AbstractOuter
    ) -> None:
        algorithm = Pgd(steps=1).build(ball_of("linf"), outer)
        state = state_of(tiny_net(batch_norm=True), algorithm)
        random, flags = torch.get_rng_state(), [m.training for m in state.model.modules()]
        found = algorithm.step(state, batch_of(8)).delta
        expected = algorithm.step(
            state_of(tiny_net(batch_norm=True), algorithm), batch_of(8)
        ).delta
        assert torch.equal(found, expected) and torch.equal(torch.get_rng_state(), random)
        assert [m.training for m in state.model.modules()] == flags

    def test_a_rate_of_zero_leaves_every_weight_where_it_was(self, outer: AbstractOuter) -> None:
        algorithm = Pgd(steps=1).build(ball_of("linf"), outer)
        state = state_of(tiny_net(), algorithm, lr=0.0)
        before = copy.deepcopy(state.model)
        algorithm.step(state, batch_of(8))
        assert same(state.model, before)

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
    def test_costs_what_it_announces(self, outer: AbstractOuter, recipe: Pgd) -> None:
        algorithm = recipe.build(ball_of("linf"), outer)
        state = state_of(tiny_net(), algorithm)
        for seed in range(STEPS):
            algorithm.step(state, batch_of(8, seed=seed))
        announced = algorithm.fe_per_image(CostSetting(batch_size=8))
        assert state.meter.fe == pytest.approx(8 * STEPS * announced, abs=0.5)

    def test_its_card_names_its_source_and_its_own_fields(self, outer: AbstractOuter) -> None:
        card = outer.card
        assert card.paper and card.rule and card.cost
        assert {field.split(".")[0] for field in card.ranges} <= set(type(outer).model_fields)

    def test_is_frozen_and_survives_a_trip_through_its_own_record(
        self, outer: AbstractOuter
    ) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            outer.name = "other"
        assert type(outer).model_validate_json(outer.model_dump_json()) == outer
