"""Conformance tests of recipes: properties of every algorithm."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raytrain.algorithms import AbstractAlgorithm, AbstractRecipe
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable
from raytrain.core.network import stem_share
from raytrain.core.threat_models import THREAT_MODELS, in_box
from raytrain.core.train_state import TrainState
from raytrain.outer import OUTERS, AbstractOuter, Awp, Engm, Plain
from raytrain.testing.recorded import RecordedOperations
from raytrain.testing.toys import (
    TinyNet,
    ball_of,
    batch_of,
    resumed,
    same,
    state_of,
    tensors,
    tiny_net,
)
from raytrain.training.replay import ReplayedSteps, eager_steps, record_passes

NORMS = list(THREAT_MODELS)
EPOCHS = [0, 3]
"""Epochs at which costs are compared: before and after a late start, such as a warm-up of three."""


class AlgorithmConformance:
    """Subclass it in a test module and define the fixture `recipe`."""

    def largest_norm(self, recipe: AbstractRecipe) -> float:
        """Largest norm of the training perturbations in multiples of eps: 1 inside the threat model."""
        del recipe
        return 1.0

    @pytest.mark.parametrize("norm", NORMS)
    def test_trains_on_legal_pixels_inside_its_radius(
        self, recipe: AbstractRecipe, norm: str
    ) -> None:
        if norm not in (recipe.card.norms or NORMS):
            with pytest.raises(ValueError, match="not defined"):
                built(recipe, norm)
            return
        algorithm = built(recipe, norm)
        state = state_of(tiny_net(), algorithm)
        before = copy.deepcopy(state.model)
        factor = self.largest_norm(recipe)
        for seed in range(3):
            batch = batch_of(8, seed=seed)
            outcome = algorithm.step(state, batch)
            assert outcome.delta.shape == batch.images.shape and not outcome.delta.requires_grad
            assert outcome.losses.shape == (8,) and not outcome.losses.requires_grad
            assert outcome.losses.isfinite().all()
            assert torch.equal(outcome.delta, in_box(outcome.delta, batch.images))
            # Random starts of l2 and l1 are drawn in float32; l-inf is exact inside the ball.
            rounding = 1e-6 if norm != "linf" else 0 if factor == 1 else 1e-12
            largest = float(ball_of(norm).norm_of(outcome.delta).max())
            assert largest <= factor * ball_of(norm).eps * (1 + rounding)
        assert not same(state.model, before)

    def test_changes_the_training_state_only(self, recipe: AbstractRecipe) -> None:
        batch, algorithm = batch_of(8), built(recipe)
        state = state_of(tiny_net(batch_norm=True), algorithm)
        tensors = [batch.images, batch.labels, batch.index]
        copies, record = [t.clone() for t in tensors], recipe.model_dump_json()
        random, flags = torch.get_rng_state(), [m.training for m in state.model.modules()]
        algorithm.step(state, batch)
        assert all(map(torch.equal, tensors, copies))
        assert torch.equal(torch.get_rng_state(), random)
        assert recipe.model_dump_json() == record
        assert [m.training for m in state.model.modules()] == flags

    def test_the_same_steps_give_the_same_bits(self, recipe: AbstractRecipe) -> None:
        one, other = (trained(built(recipe), batch_norm=True) for _ in range(2))
        assert equal(one, other) and one.meter == other.meter

    def test_resumes_from_a_checkpoint_bit_for_bit(self, recipe: AbstractRecipe) -> None:
        algorithm = built(recipe)
        state = trained(algorithm, batch_norm=True)
        again = resumed(state, algorithm)
        for one in (state, again):
            algorithm.step(one, batch_of(8, seed=7))
        assert equal(state, again)

    def test_in_bfloat16_it_keeps_everything_in_float32(self, recipe: AbstractRecipe) -> None:
        algorithm = built(recipe)
        state = state_of(tiny_net(torch.float32, batch_norm=True), algorithm)
        state.precision = "bf16"
        algorithm.step(state, batch_of(8, dtype=torch.float32, seed=1))
        outcome = algorithm.step(state, batch_of(8, dtype=torch.float32))
        assert outcome.losses.dtype == outcome.delta.dtype == torch.float32
        for path, value in tensors([state.model.state_dict(), outcome.delta]):
            assert value.isfinite().all(), path
            assert value.dtype in (torch.float32, torch.int64), path
        # Pixels and per-sample state are exact: bfloat16 is for the network's own arithmetic.
        largest = float(ball_of("linf").norm_of(outcome.delta).max())
        assert largest <= ball_of("linf").eps * self.largest_norm(recipe) + 1e-6

    def test_old_gradients_do_not_reach_the_update(self, recipe: AbstractRecipe) -> None:
        algorithm = built(recipe)
        clean, dirty = (state_of(tiny_net(), algorithm) for _ in range(2))
        for parameter in dirty.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e6)
        for state in (clean, dirty):
            algorithm.step(state, batch_of(8))
        assert equal(clean, dirty)

    @pytest.mark.parametrize("epoch", EPOCHS)
    @pytest.mark.parametrize("outer", OUTERS.own)
    def test_costs_what_it_announces_with_every_outer_update(
        self, recipe: AbstractRecipe, outer: str, epoch: int
    ) -> None:
        update = outer_of(outer)
        try:
            algorithm = recipe.build(ball_of("linf"), update)
        except ValueError as error:
            assert str(error).startswith(f"outer: {update.name} does not go with {recipe.name}: ")
            return
        model = tiny_net(batch_norm=True)
        state, share = state_of(model, algorithm), _share(model)
        state.epoch = epoch
        setting = CostSetting(epoch, batch_size=8, stem_share=lambda: share)
        announced, steps = algorithm.fe_per_image(setting), 3
        for seed in range(steps):
            algorithm.step(state, batch_of(8, seed=seed))
            state.step += 1
        spent = state.meter.fe / (8 * steps)
        assert all(isinstance(v, float) for v in algorithm.measures(state, batch_of(8)).values())
        if algorithm.cost_varies:
            assert spent <= announced
        else:
            assert abs(spent - announced) <= 0.5 / (8 * steps) + 1e-9  # fe is rounded

    @pytest.mark.parametrize("outer", OUTERS.own)
    def test_a_recorded_step_is_the_step_with_every_outer_update(
        self, recipe: AbstractRecipe, outer: str
    ) -> None:
        # The steps in which engm measures norms are recorded apart.
        update, steps = (Engm(tau=2, chunk=1), 9) if outer == "engm" else (outer_of(outer), 5)
        try:
            algorithm = recipe.build(ball_of("linf"), update)
        except ValueError:
            pytest.skip("they do not go together")
        schedule = [{}] * steps
        try:
            recorded = stepwise(algorithm, recorded=True, scheduled=schedule)
        except NotReplayable as reason:
            pytest.skip(str(reason))
        assert_same_steps(recorded, stepwise(algorithm, recorded=False, scheduled=schedule))

    def test_recorded_passes_are_the_passes(self, recipe: AbstractRecipe) -> None:
        algorithm = built(recipe)
        one, other = (state_of(tiny_net(batch_norm=True), algorithm) for _ in range(2))
        record_passes(one, RecordedOperations, batch_size=8)
        for seed in range(5):
            for state in (one, other):
                algorithm.step(state, batch_of(8, seed=seed))
        assert one.meter == other.meter
        # 1e-9: samples that leave the batch are replaced by others, and sums run in another order.
        for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)

    def test_its_card_names_its_source_and_its_own_fields(self, recipe: AbstractRecipe) -> None:
        card = recipe.card
        assert card.paper and card.rule and card.cost and set(card.norms or ()) <= set(NORMS)
        assert {field.split(".")[0] for field in card.ranges} <= set(type(recipe).model_fields)

    def test_is_frozen_and_refuses_unknown_fields(self, recipe: AbstractRecipe) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            recipe.name = "other"
        with pytest.raises(ValidationError, match="no_such_field"):
            type(recipe).model_validate({**recipe.model_dump(), "no_such_field": 6})

    def test_survives_a_trip_through_its_own_record(self, recipe: AbstractRecipe) -> None:
        assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe
        assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe


def built(
    recipe: AbstractRecipe, norm: str = "linf", eps: float | None = None
) -> AbstractAlgorithm:
    """Return the algorithm with the plain outer update."""
    return recipe.build(ball_of(norm, eps), Plain())


def trained(
    algorithm: AbstractAlgorithm, steps: int = 2, *, batch_norm: bool = False
) -> TrainState:
    """Return the state after steps of momentum SGD on different batches."""
    state = state_of(tiny_net(batch_norm=batch_norm), algorithm)
    for seed in range(steps):
        algorithm.step(state, batch_of(8, seed=seed))
    return state


def equal(one: TrainState, other: TrainState) -> bool:
    """Whether networks and momenta are equal bit for bit."""
    momenta = [
        [state.optimizer.state[p]["momentum_buffer"] for p in state.model.parameters()]
        for state in (one, other)
    ]
    return same(one.model, other.model) and all(map(torch.equal, *momenta))


@dataclass
class Stepwise:
    """A state after several steps, and the tensors that each of them returned."""

    state: TrainState
    results: list[list[Tensor]]
    replayed: int


def stepwise(
    algorithm: AbstractAlgorithm,
    *,
    recorded: bool,
    batch_norm: bool = True,
    scheduled: Sequence[Mapping[str, float]] = ({},) * 8,
) -> Stepwise:
    """Train on other images and at another learning rate in every step, one for each of `scheduled`."""
    state = state_of(tiny_net(batch_norm=batch_norm), algorithm, num_images=64)
    (group,) = state.optimizer.param_groups
    group |= {"lr": torch.tensor(0.1, dtype=torch.float64), "fused": True, "foreach": False}
    replayed = ReplayedSteps(state, RecordedOperations())
    steps = replayed if recorded else eager_steps(state)
    results: list[list[Tensor]] = []
    for seed, numbers in enumerate(scheduled):
        group["lr"].fill_(0.1 / (seed + 1))
        batch = replace(batch_of(8, seed=seed), index=torch.arange(8) + 8 * (seed % 8))
        result = steps(algorithm, batch, numbers)
        results.append([result.losses.clone(), result.delta.clone(), result.steps.clone()])
        state.step += 1
    return Stepwise(state, results, replayed.replayed)


def assert_same_steps(recorded: Stepwise, plain: Stepwise) -> None:
    """Assert that the recorded steps were replayed, and computed the same bits at the same cost."""
    assert recorded.replayed > 0 and equal(recorded.state, plain.state)
    for ours, theirs in zip(recorded.results, plain.results, strict=True):
        assert all(map(torch.equal, ours, theirs))
    ours, theirs = (
        dict(tensors({name: part.state_dict() for name, part in one.state.parts.items()}))
        for one in (recorded, plain)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[path]) for path, value in ours.items())
    costs = asdict(recorded.state.meter), asdict(plain.state.meter)
    assert costs[0] == pytest.approx(costs[1], rel=1e-12)


def outer_of(name: str) -> AbstractOuter:
    """Return an outer update whose period of measurements divides the steps of a test, for an exact cost."""
    if name == "engm":
        return Engm(tau=3, chunk=1)
    return Awp(warmup=2) if name == "awp" else OUTERS[name].model_validate({})


def _share(model: TinyNet) -> float:
    return stem_share(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
