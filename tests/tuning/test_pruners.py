"""Early stopping by cost: closed forms, for trials that report at different costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from sweep_helpers import METRIC, Launch, space_of

from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.pruners import MedianAtCost, pruner_for
from raytrain.tuning.space.settings import Search


def study_of(*finished: dict[int, float], direction: Any = "maximize") -> optuna.Study:
    """A study whose finished trials reported these values at these costs."""
    study = optuna.create_study(direction=direction)
    for values in finished:
        trial = study.ask()
        for step, value in values.items():
            trial.report(value, step)
        study.tell(trial, list(values.values())[-1])
    return study


def stops(study: optuna.Study, pruner: optuna.pruners.BasePruner, mine: dict[int, float]) -> bool:
    study.pruner = pruner
    trial = study.ask()
    for step, value in mine.items():
        trial.report(value, step)
    stopped = trial.should_prune()
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return stopped


OTHERS = ({5: 0.1, 10: 0.3, 15: 0.5}, {8: 0.2, 16: 0.6}, {12: 0.4})


@pytest.mark.parametrize(
    ("mine", "stopped"),
    [
        ({10: 0.24}, True),  # by 10 the others had 0.3 and 0.2: median 0.25
        ({10: 0.26}, False),
        ({12: 0.29}, True),  # by 12: 0.3, 0.2, 0.4
        ({12: 0.3}, False),  # a median itself goes on
        ({6: 0.31, 12: 0.0}, False),  # the best so far counts
        ({16: 0.49}, True),  # by 16: 0.5, 0.6, 0.4
        ({16: 0.51}, False),
        ({4: 0.0}, False),  # before any other had reported
    ],
)
def test_a_trial_is_held_against_what_others_had_for_no_more(
    mine: dict[int, float], stopped: bool
) -> None:
    assert stops(study_of(*OTHERS), MedianAtCost(1, 2), mine) is stopped


def test_what_is_minimised_is_held_against_the_smallest() -> None:
    study = study_of(*OTHERS, direction="minimize")
    assert stops(study, MedianAtCost(1, 2), {10: 0.16})  # by 10: 0.1 and 0.2
    assert not stops(study, MedianAtCost(1, 2), {10: 0.14})


def test_nothing_is_stopped_before_its_first_cost_or_with_too_few_others() -> None:
    study = study_of(*OTHERS)
    assert not stops(study, MedianAtCost(13, 2), {12: 0.0})
    assert stops(study, MedianAtCost(12, 3), {12: 0.0})
    assert not stops(study, MedianAtCost(12, 4), {12: 0.0})
    assert not stops(study, MedianAtCost(1, 3), {10: 0.0}), "one had not reported by 10"
    assert not stops(study, MedianAtCost(1, 1), {})


def test_values_that_are_no_numbers_are_passed_over() -> None:
    nan, inf = float("nan"), float("inf")
    study = study_of({5: 0.1, 6: nan, 7: 0.2}, {5: 0.4, 6: -inf, 7: 0.3}, {5: inf, 7: 0.3})
    assert not stops(study, MedianAtCost(1, 2), {7: nan})
    assert stops(study, MedianAtCost(1, 3), {7: 0.29})  # 0.2, 0.4, 0.3
    assert not stops(study, MedianAtCost(1, 3), {7: 0.3})


@pytest.mark.parametrize(
    ("search", "length", "first"),
    [({}, 27.0, 9), ({"first_rung": 7.0}, 27.0, 7), ({}, 1.0, 1), ({"reduction": 2}, 100.0, 50)],
)
@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_the_first_rung_is_what_was_asked_for_or_a_share_of_a_run(
    search: dict[str, Any], length: float, first: int, kind: Any
) -> None:
    if kind == "hyperband" and "first_rung" not in search:
        first = max(1, round(first / search.get("reduction", 3)))
    pruner = pruner_for(kind, Search.model_validate(search), length)
    found = pruner._first if isinstance(pruner, MedianAtCost) else pruner._min_resource  # pyright: ignore
    assert found == first


def curve(cost: float) -> float:
    """What any method reaches for this much."""
    return cost / (cost + 100)


def survivors(folder: Path, pruner: str, dears: list[bool], quality: list[float]) -> list[int]:
    """The steps that trials reach of which each has 5 or 23 FE per image and epoch."""
    search = {"sampler": "random", "pruner": pruner, "first_rung": 115, "reduction": 2}
    base = {"fe_per_image": 460, "threat": {"norm": "linf", "eps": 0.2}}
    space = space_of(search=search, base=base, budget={"trials": len(dears)})
    launch = Launch(folder / "study", space=space, length=460.0)
    assert Fidelity.of(space.base_run, 10).by_cost
    reached = []
    for number, (dear, good) in enumerate(zip(dears, quality, strict=True)):
        each, name, epoch = 23 if dear else 5, f"t{number}", 0
        launch.begin(name)
        while True:
            epoch += 1
            cost = each * epoch
            metrics = {METRIC: good * curve(cost), "cost/fe": 10.0 * cost}
            result = {"metrics": json.dumps(metrics), "epoch": epoch, "final": cost >= 460}
            result["progress"] = cost / 460
            if cost >= 460 or launch.manager.row(name, result):
                launch.manager.end(name, result, lost=False)
                break
        reached.append(cost)
    return reached


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
def test_a_cheap_and_a_dear_method_of_equal_merit_are_stopped_alike(
    tmp_path: Path, pruner: str
) -> None:
    """Rungs at 115, 230 and 460, where both report: nothing but the curve matters."""
    quality = [1.0, 0.7, 0.9, 1.1, 0.8, 1.2, 0.6, 1.05, 1.15, 0.95, 1.01, 0.85]
    dear = survivors(tmp_path / "dear", pruner, [True] * 12, quality)
    mixed = [number % 2 == 0 for number in range(12)]
    one = survivors(tmp_path / "one", pruner, mixed, quality)
    other = survivors(tmp_path / "other", pruner, [not each for each in mixed], quality)
    if pruner == "median":  # it looks at every row, of which a cheap method has more
        assert [cost == 460 for cost in one] == [cost == 460 for cost in other]
    else:
        assert one == other == dear
    assert 1 <= sum(cost == 460 for cost in one) < 12


def test_trials_measured_in_epochs_report_at_epochs() -> None:
    assert Fidelity(False, 30.0, 10).step({"cost/fe": 990.0}, 7) == 7
    assert Fidelity(True, 30.0, 10).step({"cost/fe": 994.0}, 7) == 99
    assert Fidelity(True, 30.0, 10).fe_per_image({}) == 0.0
