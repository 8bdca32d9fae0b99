"""Every algorithm of the catalogue keeps the same promises; known ones are each other's limits."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, TinyNet, ball_of, batch_of, same, state_of, tiny_net
from pydantic import ValidationError

import raytrain.algorithms
from raytrain.algorithms import (
    RECIPES,
    AbstractRecipe,
    Dynamic,
    FgsmRs,
    Natural,
    NestedRecipe,
    NFgsm,
    Pgd,
)
from raytrain.attacks import Gap, ProjectedAscent, Remembered, Uniform, Zero
from raytrain.core.cost import Meter
from raytrain.core.sample_store import SampleStore
from raytrain.core.schedules import Constant
from raytrain.core.types import Batch
from raytrain.outer import Plain
from raytrain.testing import AlgorithmConformance
from raytrain.testing.algorithms import built, equal, trained

NORMS = ["linf", "l2", "l1"]

OWN = NestedRecipe(attack=ProjectedAscent(steps=2, step_size="eps/2", bn="eval"))
INSTANCES: dict[str, AbstractRecipe] = {
    name: OWN if kind is NestedRecipe else kind() for name, kind in RECIPES.items()
}

UNUSUAL = {"free", "yopo", "trades", "mart", "gradalign"}
"""Their update is not one step of SGD on cross-entropy at the perturbation they end with."""

AT_RADIUS_ZERO = {"free", "yopo", "trades", "mart", "gradalign"}
"""At eps = 0 they replay batches, sum passes, or minimise a loss that is cross-entropy to rounding."""


class TestEveryAlgorithm(AlgorithmConformance):
    @pytest.fixture(params=INSTANCES)
    def recipe(self, request: pytest.FixtureRequest) -> AbstractRecipe:
        return INSTANCES[request.param]

    test_a_recorded_step_is_the_step_with_every_outer_update = pytest.mark.slow(
        AlgorithmConformance.test_a_recorded_step_is_the_step_with_every_outer_update
    )

    def largest_norm(self, recipe: AbstractRecipe) -> float:
        return 1 + recipe.k if isinstance(recipe, NFgsm) else 1.0  # it leaves the ball on purpose


@pytest.mark.parametrize("name", sorted(INSTANCES.keys() - UNUSUAL))
def test_reports_the_losses_before_the_update(name: str) -> None:
    batch, model = batch_of(8), tiny_net()
    algorithm = built(INSTANCES[name])
    state, twin = state_of(model, algorithm), copy.deepcopy(model)
    outcome = algorithm.step(state, batch)
    logits = twin(batch.images + outcome.delta)
    wanted = F.cross_entropy(logits, batch.labels, reduction="none").detach()
    assert torch.equal(outcome.losses, wanted)


@pytest.mark.parametrize("name", sorted(INSTANCES.keys() - UNUSUAL))
def test_changes_the_weights_as_sgd_on_the_perturbed_batch_does(name: str) -> None:
    batch, model = batch_of(8), tiny_net()
    algorithm = built(INSTANCES[name])
    twin = copy.deepcopy(model)
    outcome = algorithm.step(state_of(model, algorithm), batch)
    other = state_of(twin)
    F.cross_entropy(twin(batch.images + outcome.delta), batch.labels).backward()
    other.optimizer.step()
    # 1e-14: the mean is taken in another order.
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) <= 1e-14


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", sorted(INSTANCES.keys() - AT_RADIUS_ZERO))
def test_radius_zero_is_natural_training_bit_for_bit(name: str, norm: str) -> None:
    if norm in (INSTANCES[name].card.norms or NORMS):
        robust = trained(built(INSTANCES[name], norm, eps=0.0))
        assert equal(robust, trained(built(Natural(), norm, eps=0.0)))


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "fe"),
    [
        (Natural(), 3),
        (FgsmRs(), 5),
        (NFgsm(), 5),
        (Pgd(steps=1), 5),
        (Pgd(), 23),
        (Pgd(steps=7), 17),
        (Dynamic(c_max=-1), 23),
        (Dynamic(c_max=1e9), 7),
        (Dynamic(c_max=1e9, compact=False), 23),
        (OWN, 7),
    ],
    ids=repr,
)
def test_step_costs_exactly_what_the_paper_says(recipe: AbstractRecipe, fe: int) -> None:
    state = trained(built(recipe), steps=2)
    inner = (fe - 3) // 2
    assert state.meter == Meter(
        forwards=16 * (inner + 1), input_backwards=16 * inner, full_backwards=16
    )
    assert state.meter.fe == 16 * fe


@pytest.mark.parametrize("norm", NORMS)
def test_dynamic_training_costs_one_gradient_more_than_the_steps_of_each_sample(norm: str) -> None:
    algorithm, state = built(Dynamic(c_max=0.15), norm), state_of(tiny_net())
    outcome = algorithm.step(state, batch_of(24))
    cost = 2 * (outcome.steps + 1).clamp_max(10) + 3
    assert len(cost.unique()) > 1  # samples did stop at different steps
    assert state.meter.fe == int(cost.sum())
    assert float(cost.min()) >= 7 and float(cost.max()) <= 23


@pytest.mark.parametrize(
    ("recipe", "steps"), [(Natural(), 0), (FgsmRs(), 1), (NFgsm(), 1), (Pgd(), 10), (OWN, 2)]
)
def test_steps_are_those_the_attack_took(recipe: AbstractRecipe, steps: int) -> None:
    outcome = built(recipe).step(state_of(tiny_net()), batch_of(8))
    assert outcome.steps.tolist() == [steps] * 8


# --- reductions -------------------------------------------------------------------------------

CLIPPED = NestedRecipe(
    attack=ProjectedAscent(
        start=Uniform(radius=1.0), steps=1, step_size="1.25*eps", bn="train", confined=True
    )
)


WIDE = NestedRecipe(
    attack=ProjectedAscent(
        start=Uniform(radius=2), steps=1, step_size="eps", bn="train", confined=False
    )
)
STOPPING = NestedRecipe(
    attack=ProjectedAscent(
        steps=10, step_size="eps/4", bn="eval", stop=Gap(c_max=0.2, decay=Constant())
    )
)
LIMITS: dict[str, tuple[AbstractRecipe, AbstractRecipe]] = {
    "one_long_pgd_step_is_fgsm_rs": (
        Pgd(steps=1, step_size="1.25*eps", attack_bn="train"),
        FgsmRs(),
    ),
    "confined_n_fgsm_with_k_1_is_fgsm_rs": (CLIPPED, FgsmRs()),
    "n_fgsm_is_a_nested_recipe": (WIDE, NFgsm()),
    "no_pgd_step_from_zero_is_natural": (Pgd(steps=0, start=Zero()), Natural()),
    "no_pgd_step_in_train_mode_too": (
        Pgd(steps=0, start=Zero(), attack_bn="train"),
        Natural(),
    ),
    "a_threshold_below_zero_is_pgd": (Dynamic(c_max=-math.inf), Pgd()),
    "also_with_batch_statistics": (
        Dynamic(c_max=-1, compact=False, attack_bn="train"),
        Pgd(attack_bn="train"),
    ),
    "a_huge_threshold_is_one_step": (Dynamic(c_max=1e9), Pgd(steps=1)),
    "dynamic_with_one_step_is_fgsm_rs": (
        Dynamic(steps=1, step_size="1.25*eps", c_max=0),
        FgsmRs(attack_bn="eval"),
    ),
    "dynamic_is_a_nested_recipe": (STOPPING, Dynamic(c_max=0.2, decay=Constant())),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limit", LIMITS)
def test_one_algorithm_is_the_limit_of_another_bit_for_bit(limit: str, norm: str) -> None:
    states = [trained(built(recipe, norm), batch_norm=True) for recipe in LIMITS[limit]]
    assert equal(*states)


def test_a_step_size_in_pixels_is_the_same_multiple_of_the_radius() -> None:
    recipes = [Pgd(step_size=EPS["linf"] / 4), Pgd(step_size="eps/4")]
    assert equal(*(trained(built(recipe)) for recipe in recipes))


def test_an_infinite_threshold_survives_a_trip_through_its_record() -> None:
    for c_max in (math.inf, -math.inf):
        recipe = Dynamic(c_max=c_max)
        assert Dynamic.model_validate_json(recipe.model_dump_json()) == recipe


def test_different_algorithms_train_differently() -> None:
    states = [trained(built(recipe)) for recipe in INSTANCES.values()]
    for i, one in enumerate(states):
        assert not any(same(one.model, other.model) for other in states[:i])


def test_only_a_remembered_start_asks_for_a_store() -> None:
    recipes: list[AbstractRecipe] = [
        Pgd(start=Remembered()),
        Dynamic(start=Remembered()),
        FgsmRs(start=Remembered()),
    ]
    for recipe in recipes:
        plain = type(recipe)()
        assert state_of(tiny_net(), built(plain)).parts == {}
        state = trained(built(recipe), steps=1)
        outcome = built(recipe).step(state, batch_of(8))
        store = state.part("delta", SampleStore)
        assert torch.equal(store.read(batch_of(8)), outcome.delta)


def test_neighbours_in_the_batch_do_not_change_an_attack_in_eval_mode() -> None:
    # batch_nostat and train do let neighbours in, which is why eval is the default of PGD.
    whole, rows = batch_of(8), torch.arange(4)
    half = Batch(whole.images[rows], whole.labels[rows], whole.index[rows], whole.rng)
    moved: dict[str, bool] = {}
    for bn in ("eval", "batch_nostat", "train"):
        attack = ProjectedAscent(start=Zero(), steps=3, step_size="eps/4", bn=bn)
        algorithm = NestedRecipe(attack=attack).build(ball_of("l2"), Plain())
        nets: list[TinyNet] = [tiny_net(batch_norm=True) for _ in range(2)]
        full = algorithm.step(state_of(nets[0]), whole).delta[rows]
        part = algorithm.step(state_of(nets[1]), half).delta
        moved[bn] = float((full - part).abs().max()) > 1e-12  # sums in another order
    assert moved == {"eval": False, "batch_nostat": True, "train": True}


# --- the catalogue ----------------------------------------------------------------------------


def test_the_catalogue_is_the_files_of_the_folder() -> None:
    folder = Path(str(raytrain.algorithms.__file__)).parent
    files = {file.stem for file in folder.glob("*.py")} - {"__init__", "base"}
    assert set(RECIPES) == files


def test_the_catalogue_is_what_a_configuration_may_name() -> None:
    from pydantic import TypeAdapter

    from raytrain.algorithms import Recipe

    recipes: TypeAdapter[AbstractRecipe] = TypeAdapter(Recipe)
    for name, kind in RECIPES.items():
        if kind is not NestedRecipe:
            assert recipes.validate_python(name) == kind()
        assert kind.model_fields["name"].default == name
    with pytest.raises(ValidationError, match="natural"):
        recipes.validate_python("trade")
