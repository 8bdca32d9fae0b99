"""What a run is said to cost is what its meter counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raytrain.algorithms import RECIPES
from raytrain.config.cost_estimate import estimate_cost, is_bound
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.training.trainer import fit

IMAGES, BATCH = 64, 32

ATTACK = {"steps": 2, "step_size": "eps/2", "bn": "eval"}
OWN: dict[str, dict[str, Any]] = {"nested": {"attack": ATTACK}}


def run_of(algorithm: dict[str, Any], **changes: Any) -> RunConfig:
    """Two epochs of two steps on 64 digits; batches are whole, so that every image counts."""
    values = {
        "data": {"name": "digits", "train_size": IMAGES, "validation": 20},
        "algorithm": algorithm,
        "batch_size": BATCH,
        "epochs": 2,
        "evaluation": {"steps": 1, "every": 1000},
        "optimizer": {"lr": 0.01},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


def spent(run: RunConfig) -> float:
    """FE per training image of a real run."""
    *_, (report, _) = fit(run, DistributedContext())
    return report.fe / IMAGES


ROUNDING = 0.5 / IMAGES  # the meter's sum is a whole number


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.slow
def test_the_price_of_every_algorithm_is_what_it_spends_or_bounds_it(name: str) -> None:
    run = run_of({"name": name, **OWN.get(name, {})})
    assert spent(run) <= estimate_cost(run) + ROUNDING
    assert is_bound(run) or abs(estimate_cost(run) - spent(run)) <= ROUNDING
    assert is_bound(run) == (name in {"dynamic", "fat"})


CLOSED: dict[str, tuple[dict[str, Any], float]] = {
    "natural": ({"name": "natural"}, 3),
    "fgsm_rs": ({"name": "fgsm_rs"}, 5),
    "pgd-7": ({"name": "pgd", "steps": 7}, 2 * 7 + 3),
    "trades-7": ({"name": "trades", "steps": 7}, 2 * 7 + 7),
    "mart-7": ({"name": "mart", "steps": 7}, 2 * 7 + 6),
    "free-4": ({"name": "free", "m": 4}, 3 * 4),
    "gradalign": ({"name": "gradalign"}, 11),
    "dynamic-7": ({"name": "dynamic", "steps": 7}, 2 * 7 + 3),
    "si_hg-B-2": ({"name": "si_hg", "mode": "B", "m": 2}, 2 * 2 + 3),
    "si_hg-C": ({"name": "si_hg", "mode": "C"}, 2 + 4),
    "si_hg-J": ({"name": "si_hg", "mode": "J"}, 3),
    "si_hg-T": ({"name": "si_hg", "mode": "T"}, 2 + 4),
    "ssds": ({"name": "ssds"}, 5),
    "ssds-released": ({"name": "ssds", "preset": "released"}, 3),
    "l2l-5": ({"name": "l2l", "steps": 5}, 2 * 6 + 3),
    "l2l-trades-5": ({"name": "l2l", "loss": "trades", "steps": 5}, 2 * 6 + 7),
}


@pytest.mark.parametrize("case", sorted(CLOSED))
def test_an_epoch_costs_what_the_card_says(case: str) -> None:
    algorithm, wanted = CLOSED[case]
    assert estimate_cost(run_of(algorithm, epochs=9)) == 9 * wanted


OUTERS: dict[str, dict[str, Any]] = {
    "awp": {"name": "awp"},
    "awp-warm": {"name": "awp", "warmup": 1, "steps": 2},
    "awp-engm": {"name": "awp", "then": {"name": "engm", "tau": 2}},
    "clip": {"name": "clip"},
    "engm-affine": {"name": "engm", "tau": 2},
    "engm-probes": {"name": "engm", "tau": 2, "probes": 5},
    "engm-exact": {"name": "engm", "estimator": "exact"},
    "engm-input": {"name": "engm", "estimator": "input", "gradient": "reuse"},
    "engm-loss": {"name": "engm", "estimator": "loss", "tau": 4},
    "engm-train": {"name": "engm", "tau": 2, "probes": 3, "probe_bn": "train"},
    "engm-train-all": {"name": "engm", "estimator": "exact", "probe_bn": "train"},
}


@pytest.mark.parametrize("outer", sorted(OUTERS))
@pytest.mark.parametrize("name", ["natural", "trades"])
@pytest.mark.slow
def test_the_outer_update_is_priced_with_the_algorithm(name: str, outer: str) -> None:
    run = run_of(
        {"name": name, **({} if name == "natural" else {"steps": 1})}, outer=OUTERS[outer]
    )
    assert estimate_cost(run) == spent(run)


def test_replays_of_a_batch_are_updates_that_engm_counts() -> None:
    run = run_of({"name": "free", "m": 4}, outer={"name": "engm", "tau": 8})
    assert estimate_cost(run) == spent(run)


def test_a_stopping_rule_is_priced_as_never_reached() -> None:
    run = run_of({"name": "dynamic", "steps": 6, "c_max": 1.0})
    assert is_bound(run) and estimate_cost(run) == 30
    assert spent(run) < estimate_cost(run) == 2 * (2 * 6 + 3)
    own = {**ATTACK, "stop": {"kind": "gap", "c_max": 1.0}}
    assert is_bound(run_of({"name": "nested", "attack": own}))


def test_a_threshold_below_every_fosc_is_no_bound_but_the_price() -> None:
    run = run_of({"name": "dynamic", "steps": 4, "c_max": -1})
    assert not is_bound(run) and estimate_cost(run) == 22
    assert estimate_cost(run) == spent(run) == 2 * (2 * 4 + 3)


def test_what_begins_with_a_later_epoch_is_priced_from_there() -> None:
    warm = run_of({"name": "l2l", "steps": 2, "warm": 1})
    assert estimate_cost(warm) == spent(warm) == (2 * 2 + 3) + (2 * 3 + 3)
    own = run_of({"name": "dynamic", "steps": 2, "c_max": -1, "weighting": "own_ce"})
    assert estimate_cost(own) == spent(own) == (2 * 2 + 3) + (2 * 2 + 4)
    awp = run_of({"name": "pgd", "steps": 1}, outer={"name": "awp", "warmup": 7}, epochs=9)
    assert estimate_cost(awp) == 7 * 5 + 2 * 8


def test_a_curriculum_is_priced_at_twenty_points_or_more() -> None:
    run = run_of({"name": "pgd", "steps": 10}, curriculum={"steps": {"start": 1}}, epochs=10)
    at = [round(1 + 9 * (point + 0.5) / 20) for point in range(20)]
    assert estimate_cost(run) == pytest.approx(sum((2 * steps + 3) / 2 for steps in at), rel=1e-12)
    constant = run_of({"name": "pgd", "steps": 3}, curriculum={"eps": {"start": 0}}, epochs=10)
    assert estimate_cost(constant) == pytest.approx(90, rel=1e-12)


def test_a_given_cost_is_the_price() -> None:
    run = run_of({"name": "dynamic"}, fe_per_image=123.0)
    assert estimate_cost(run) == 123.0 and not is_bound(run)
    assert is_bound(run_of({"name": "pgd"}, fe_per_image=123.0, early_stop=3))


def test_yopo_is_priced_for_the_network_of_the_run() -> None:
    dear = run_of({"name": "yopo", "m": 1, "n": 9}, model="small_cnn", epochs=1)
    cheap = run_of({"name": "yopo", "m": 1, "n": 9}, model="resnet18", epochs=1)
    assert 3 < estimate_cost(cheap) < estimate_cost(dear)


def test_pricing_reads_no_data_and_no_global_randomness() -> None:
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())
    one = estimate_cost(run_of({"name": "l2l"}, data={"name": "cifar10"}))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before
    torch.rand(3)  # another state of the generator gives the same price
    assert (
        one == estimate_cost(run_of({"name": "l2l"}, data={"name": "nowhere.parquet"})) == 2 * 25
    )
