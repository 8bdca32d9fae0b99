"""Samplers go on after whatever they were told, and keep away from what cannot be trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sweep_helpers import METRIC, SPACE, Launch, diverged, row, space_of

CLEAN = "valid/clean"


def told(value: float, **more: float) -> dict[str, Any]:
    result = row(1, value, final=True)
    return {**result, "metrics": json.dumps({**json.loads(result["metrics"]), **more})}


def mixed(launch: Launch, count: int) -> None:
    """Trials that end in every way there is."""
    for number in range(count):
        name = f"m{number}"
        launch.begin(name)
        match number % 6:
            case 1:
                launch.manager.end(name, diverged("diverged"), lost=False)
            case 2:
                drop = {"valid/robust_drop": 0.9, CLEAN: 0.5}
                launch.manager.end(name, told(0.5, **drop), lost=False)
            case 3:
                launch.manager.end(name, told(math.nan, **{CLEAN: 0.5}), lost=False)
            case 4:
                launch.manager.end(name, None, lost=True)
            case _:
                launch.manager.end(name, told(0.02 * number, **{CLEAN: 0.6}), lost=False)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.slow), "nsga2", "tpe"])
def test_a_sampler_proposes_on_after_mixed_trials(tmp_path: Path, sampler: str, two: bool) -> None:
    objective = [{"metric": METRIC}, {"metric": CLEAN}] if two else {"metric": METRIC}
    space = space_of(
        search={"sampler": sampler, "pruner": "none", "startup": 3},
        base={**SPACE["base"], "max_failures": 0},
        constraints=["optimizer.lr < 0.25"],
        objective=objective,
        budget={"trials": 15},
    )
    launch = Launch(tmp_path / "s", space=space)
    mixed(launch, 12)
    for number in range(3):
        launch.begin(f"n{number}")
        launch.manager.end(f"n{number}", told(0.3, **{CLEAN: 0.3}), lost=False)
    assert launch.manager.progress().finished == 15
    complete = launch.trials(TrialState.COMPLETE)
    sets = {tuple(trial.constraints) for trial in complete}
    assert sets == {("optimizer.lr < 0.25", "valid/robust_drop", "trained")}
    assert all(math.isfinite(v) for trial in complete for v in trial.constraints.values())
    if (
        sampler == "tpe"
    ):  # the others may propose a point again: noise, or a child like its parents
        rates = [trial.params["optimizer.lr"] for trial in launch.trials()]
        assert len(set(rates)) == len(rates)


def _above(folder: Path, seed: int, fate: str) -> int:
    """How many of 24 proposals after the first 12 are where half of the space goes wrong."""
    space = space_of(
        search={"sampler": "tpe", "pruner": "none", "startup": 8, "seed": seed},
        space={"optimizer.lr": {"float": [0.0001, 1.0]}},
        budget={"trials": 36},
    )
    launch = Launch(folder / "s", space=space)
    rates = []
    for number in range(36):
        name = f"t{number}"
        launch.begin(name)
        live = launch.trials(TrialState.RUNNING)[0]
        rates.append(rate := live.params["optimizer.lr"])
        if rate <= 0.5:  # the nearer to the cliff the better
            launch.manager.end(name, told(rate), lost=False)
        elif fate == "diverged":
            launch.manager.end(name, diverged("diverged"), lost=False)
        elif fate == "infeasible":
            launch.manager.end(name, told(rate, **{"valid/robust_drop": 0.9}), lost=False)
        else:
            launch.manager._live.pop(name)
            launch.manager.study.tell(live.number, state=TrialState.FAIL)
    return sum(rate > 0.5 for rate in rates[12:])


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The same where failures are told as FAIL, which samplers do not look at."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return sum(_above(tmp_path_factory.mktemp(f"f{seed}"), seed, "fail") for seed in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["diverged", "infeasible"])
def test_tpe_keeps_away_from_what_goes_wrong(tmp_path: Path, ignorant: int, fate: str) -> None:
    went = sum(_above(tmp_path / str(seed), seed, fate) for seed in range(3))
    assert 2 * went < ignorant
