"""Optuna is told the truth about every trial, whatever became of it and whichever sampler asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from sweep_helpers import METRIC, SPACE, Launch, diverged, row, space_of

SAMPLERS = ("tpe", "random", "grid", "gp", "nsga2")
SEES_STOPPED = ("tpe", "random", "grid")
RULE = "optimizer.lr < 0.2"
KEYS = [RULE, "valid/robust_drop", "trained"]
DROP = {"valid/robust_drop": 0.75}
CLEAN = "valid/clean"


def launch_of(folder: Path, sampler: str, two: bool = False, rate: float = 0.1) -> Launch:
    """A sweep whose first proposal has this learning rate."""
    search = {"sampler": sampler, "pruner": "none", "startup": 2}
    objective = [{"metric": METRIC}, {"metric": CLEAN}] if two else {"metric": METRIC}
    base = {**SPACE["base"], "max_failures": 0}
    space = space_of(
        search=search, constraints=[RULE], base=base, objective=objective, budget={"trials": 9}
    )
    launch = Launch(folder / "s", space=space)
    # A grid has nothing left after its last point.
    launch.manager.enqueue({"optimizer.lr": rate, "algorithm.step_size": 0.25})
    if rate > 0.2:
        launch.manager.enqueue({"optimizer.lr": 0.1, "algorithm.step_size": 0.25})
    return launch


def told(epoch: int, value: float | None, final: bool = False, **more: float) -> dict[str, Any]:
    result = row(epoch, value, final)
    return {**result, "metrics": json.dumps({**json.loads(result["metrics"]), **more})}


def first(launch: Launch) -> FrozenTrial:
    return launch.trials()[0]


def has_no_best(launch: Launch) -> None:
    assert launch.manager.best() is None and launch.manager.history.front() == []
    with pytest.raises(ValueError, match=r"No (feasible )?trials"):
        _ = launch.manager.study.best_trial


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_complete(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler)
    launch.begin("a")
    launch.manager.row("a", told(1, 0.2))
    launch.manager.end("a", told(2, 0.4, final=True, **{"valid/robust_drop": 0.1}), lost=False)
    trial = first(launch)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.4])
    assert trial.intermediate_values == {1: 0.2, 2: 0.4}
    assert list(trial.constraints) == KEYS
    assert list(trial.constraints.values()) == pytest.approx([0.1 - 0.2, 0.1 - 0.5, -1.0])
    assert launch.manager.study.best_trial.number == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stopped(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler)
    launch.begin("a")
    launch.manager.end("a", told(1, 0.2), lost=False)
    trial = first(launch)
    assert (trial.state, trial.values) == (TrialState.PRUNED, [0.2])
    assert trial.intermediate_values == {1: 0.2}
    assert list(trial.constraints) == KEYS and max(trial.constraints.values()) <= 0
    assert trial.user_attrs["outcome"] == "stopped"
    has_no_best(launch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_diverged(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler)
    launch.begin("a")
    launch.manager.row("a", told(1, 0.9))
    launch.manager.end("a", diverged("no longer finite"), lost=False)
    trial = first(launch)
    assert trial.intermediate_values == {1: 0.9}
    assert list(trial.constraints) == KEYS and trial.constraints["trained"] == 1.0
    if sampler in SEES_STOPPED:
        assert (trial.state, trial.values) == (TrialState.PRUNED, [0.9])
    else:
        assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.0])
    assert trial.user_attrs["error"] == "no longer finite"
    has_no_best(launch)


@pytest.mark.parametrize("sampler", ["gp", "nsga2"])
def test_a_diverged_trial_has_the_worst_value_where_its_state_is_complete(
    tmp_path: Path, sampler: str
) -> None:
    launch = launch_of(tmp_path, sampler)
    for name, value in zip("abc", (0.5, 0.3, 0.4), strict=True):
        launch.manager.enqueue({"optimizer.lr": 0.1, "algorithm.step_size": 0.25})
        launch.complete(name, value)
    launch.manager.enqueue({"optimizer.lr": 0.1, "algorithm.step_size": 0.25})
    launch.begin("d")
    launch.manager.end("d", diverged("diverged"), lost=False)
    assert launch.trials()[3].values == [0.3]
    assert launch.manager.study.best_trial.number == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_infeasible(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler)
    launch.begin("a")
    launch.manager.end("a", told(1, 0.9, final=True, **DROP), lost=False)
    trial = first(launch)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.9])
    assert trial.constraints["valid/robust_drop"] == 0.25
    assert trial.user_attrs["outcome"] == "infeasible"
    has_no_best(launch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rejected(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler, rate=0.28)
    launch.begin("a")
    trial = first(launch)
    expected = TrialState.PRUNED if sampler in SEES_STOPPED else TrialState.COMPLETE
    assert (trial.state, trial.intermediate_values) == (expected, {})
    assert trial.constraints[RULE] == pytest.approx(0.08) and list(trial.constraints) == KEYS
    assert launch.manager.progress().finished == 0
    assert launch.manager.progress().outcomes == {"rejected": 1}
    assert set(launch.store.status) == {"t0001"}
    has_no_best(launch)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_lost_for_good(tmp_path: Path, sampler: str) -> None:
    launch = launch_of(tmp_path, sampler)
    launch.begin("a")
    launch.manager.row("a", told(1, 0.2))
    launch.manager.note_loss("a", "Traceback\n\nthe node died\n")
    launch.manager.end("a", None, lost=True)
    trial = first(launch)
    assert (trial.state, trial.values, trial.constraints) == (TrialState.FAIL, None, {})
    assert trial.intermediate_values == {1: 0.2}
    assert trial.user_attrs["outcome"] == "failed"
    assert launch.store.tags["t0000"]["error"] == "the node died"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("final", [True, False])
def test_an_objective_that_is_no_number_or_missing(
    tmp_path: Path, sampler: str, final: bool
) -> None:
    for value in (float("nan"), float("inf"), None):
        launch = launch_of(tmp_path / str(value), sampler)
        launch.begin("a")
        assert not launch.manager.row("a", told(1, value))
        launch.manager.end("a", told(2, value, final=final), lost=False)
        trial = first(launch)
        assert trial.user_attrs["outcome"] == ("diverged" if final else "stopped")
        assert trial.constraints["trained"] == (1.0 if final else -1.0)
        assert trial.state.is_finished() and trial.state != TrialState.FAIL
        assert launch.manager.best() is None
        again = launch.again()
        again.manager.recover()
        assert again.manager.progress().finished == 1


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_of_two_objectives_what_went_wrong_is_never_on_the_front(
    tmp_path: Path, sampler: str
) -> None:
    launch = launch_of(tmp_path, sampler, two=True)
    for _ in range(4):
        launch.manager.enqueue({"optimizer.lr": 0.1, "algorithm.step_size": 0.25})
    for name, one, other in (("a", 0.2, 0.8), ("b", 0.4, 0.6)):
        launch.begin(name)
        launch.manager.end(name, told(1, one, True, **{CLEAN: other}), lost=False)
    launch.begin("c")
    launch.manager.end("c", diverged("diverged"), lost=False)
    launch.begin("d")
    launch.manager.end("d", told(1, 0.9, True, **{CLEAN: 0.9}, **DROP), lost=False)
    launch.begin("e")
    launch.manager.end("e", told(1, 0.95, True), lost=False)  # one of them was not measured
    trials = launch.trials()
    assert [t.values for t in trials[:2]] == [[0.2, 0.8], [0.4, 0.6]]
    assert (trials[2].state, trials[2].values) == (TrialState.COMPLETE, [0.2, 0.6])
    assert (trials[3].values, trials[3].user_attrs["outcome"]) == ([0.9, 0.9], "infeasible")
    assert trials[4].user_attrs["outcome"] == "diverged"
    assert sorted(t.number for t in launch.manager.study.best_trials) == [0, 1]
    assert [r.number for r in launch.manager.history.front()] == [0, 1]
    assert all(t.intermediate_values == {} for t in trials)
    assert launch.manager.history.rows()[4].values == ()


def test_a_minimised_objective_is_given_its_largest_value(tmp_path: Path) -> None:
    space = space_of(
        search={"sampler": "gp", "pruner": "none"},
        objective={"metric": "train/loss", "mode": "min"},
    )
    launch = Launch(tmp_path / "s", space=space)
    for name, value in zip("ab", (0.5, 2.5), strict=True):
        launch.begin(name)
        launch.manager.end(name, told(1, None, True, **{"train/loss": value}), lost=False)
    launch.begin("c")
    launch.manager.end("c", diverged("diverged"), lost=False)
    assert launch.trials()[2].values == [2.5]
    assert launch.manager.study.best_trial.number == 0
