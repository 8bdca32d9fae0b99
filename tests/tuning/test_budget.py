"""Budgets end where they say, the time left has a closed form, and a relaunch counts the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from sweep_helpers import METRIC, Launch, failed, row, space_of

from raytrain.tuning import budget as tally_module
from raytrain.tuning.budget import BudgetState, TrialRow
from raytrain.tuning.space.settings import Budget


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tally_module, "time", clock)
    return clock


def ended(number: int, state: str, *values: float) -> TrialRow:
    return TrialRow(number, state, values, {}, {}, 1, f"t{number:04d}")


def at(epoch: int, value: float, progress: float) -> dict[str, Any]:
    return {**row(epoch, value), "progress": progress}


# --- the tally by itself ----------------------------------------------------------------------


def test_every_outcome_but_cut_and_rejected_is_a_trial() -> None:
    budget_state = BudgetState(Budget(trials=9), 1)
    for number, state in enumerate(
        ("complete", "stopped", "infeasible", "diverged", "failed", "cut", "rejected")
    ):
        budget_state.ended(ended(number, state, 0.1), 2.0)
    assert budget_state.finished == 5
    assert budget_state.room(3) and not budget_state.room(4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_is_the_first_of_the_best_complete_in_whatever_order_they_ended(
    sign: int,
) -> None:
    rows = [
        ended(0, "complete", sign * 0.1),
        ended(1, "complete", sign * 0.3),
        ended(2, "complete", sign * 0.3),
        ended(3, "infeasible", sign * 0.9),
        ended(4, "stopped", sign * 0.9),
        ended(5, "complete"),
    ]
    for order in (rows, rows[::-1]):
        budget_state = BudgetState(Budget(), sign)
        for one in order:
            budget_state.ended(one, 0.0)
        assert budget_state.best == rows[1]


def test_time_left_is_the_time_that_the_rest_takes_at_the_same_rate(clock: Clock) -> None:
    budget_state = BudgetState(Budget(trials=10), 1)
    assert budget_state.progress((), 0.0, 0.0).seconds_left is None, "nothing to go by"
    budget_state.ended(ended(0, "complete", 0.1), 0.0)
    clock.now += 60
    # 1 trial and half of another in 60 s: 8.5 left, 40 s each
    assert budget_state.progress((), 0.0, 0.5).seconds_left == pytest.approx(8.5 * 40)


def test_time_left_follows_whichever_budget_is_further(clock: Clock) -> None:
    budget_state = BudgetState(Budget(trials=10, fe_per_image=100), 1)
    budget_state.ended(ended(0, "complete", 0.1), 30.0)
    clock.now += 40
    # 10 of 100 FE run beside: 40% of the cost, 10% of the trials
    assert budget_state.progress((), 10.0, 0.0).seconds_left == pytest.approx(60)
    hours = BudgetState(Budget(trials=10, hours=0.01), 1)
    hours.ended(ended(0, "complete", 0.1), 0.0)
    clock.now += 20
    assert hours.progress((), 0.0, 0.0).seconds_left == pytest.approx(36 - 20)


def test_a_relaunch_takes_its_own_rate(clock: Clock) -> None:
    budget_state = BudgetState(Budget(trials=10), 1)
    for number in range(4):
        budget_state.ended(ended(number, "complete", 0.1), 0.0)
    budget_state.launched(0.0, 1.0)  # and two that are half done
    clock.now += 30
    assert budget_state.progress((), 0.0, 1.0).seconds_left is None, "nothing done in this launch"
    budget_state.ended(ended(4, "complete", 0.1), 0.0)
    assert budget_state.progress((), 0.0, 0.5).seconds_left == pytest.approx(30 / 0.5 * 4.5)


# --- budgets ----------------------------------------------------------------------------------


def test_cost_ends_a_sweep_at_the_first_row_beyond(tmp_path: Path) -> None:
    # 10 images, a row adds 10 FE: 1 FE per image and epoch, so 5 in all
    launch = Launch(tmp_path / "s", space=space_of(budget={"fe_per_image": 5}))
    launch.begin("a")
    launch.begin("b")
    assert [launch.manager.row("a", row(1, 0.1)), launch.manager.row("b", row(1, 0.1))] == [
        False
    ] * 2
    assert not launch.manager.row("a", row(2, 0.1))
    assert not launch.manager.row("b", row(2, 0.1))
    assert launch.manager.row("a", row(3, 0.1)), "5 FE per image"
    launch.manager.end("a", row(3, 0.1), lost=False)
    with pytest.raises(StopIteration):
        launch.manager.begin("c")
    assert launch.manager.row("b", row(3, 0.1))
    launch.manager.end("b", row(3, 0.1), lost=False)
    with pytest.raises(StopIteration):
        launch.manager.begin("c")
    assert launch.manager.progress().fe_per_image == 6.0
    assert launch.manager.progress().finished == 0
    assert launch.store.status == {"t0000": "KILLED", "t0001": "KILLED"}
    assert [(r.state, r.epochs, r.value) for r in launch.manager.history.rows()] == [
        ("cut", 3, 0.1)
    ] * 2


def test_what_was_cut_goes_on_with_a_larger_budget_and_its_cost_is_counted_once(
    tmp_path: Path,
) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"fe_per_image": 2}))
    first = launch.begin("a")
    assert not launch.manager.row("a", row(1, 0.1))
    assert launch.manager.row("a", row(2, 0.2))
    launch.manager.end("a", row(2, 0.2), lost=False)

    same = launch.again()
    same.manager.recover()
    assert same.manager.progress().fe_per_image == 2.0
    with pytest.raises(StopIteration):
        same.manager.begin("b")

    more = launch.again(space_of(budget={"fe_per_image": 7}))
    more.manager.recover()
    again = more.begin("b")
    assert (again.run, again.folder, again.resume) == (first.run, first.folder, True)
    assert more.manager.progress().fe_per_image == 2.0
    more.finish("b", 0.3, 0.4, first=3)
    assert more.manager.progress().fe_per_image == 4.0
    assert [(t.state, t.value) for t in more.trials()] == [
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, 0.4),
    ]
    assert more.trials()[1].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert more.store.status == {"t0000": "FINISHED"}
    assert more.manager.progress().retries == 0, "nothing was lost"


def test_a_row_that_ends_the_budget_and_the_trial_completes_it(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"fe_per_image": 4}))
    launch.complete("a", 0.1, 0.2, 0.3, 0.4)
    assert launch.trials()[0].state == TrialState.COMPLETE
    with pytest.raises(StopIteration):
        launch.manager.begin("b")


def test_hours_end_a_sweep_and_begin_anew_with_each_launch(tmp_path: Path, clock: Clock) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"hours": 0.5}))
    launch.begin("a")
    clock.now += 1799
    assert not launch.manager.row("a", row(1, 0.1))
    clock.now += 1
    assert launch.manager.row("a", row(2, 0.1))
    launch.manager.end("a", row(2, 0.1), lost=False)
    with pytest.raises(StopIteration):
        launch.manager.begin("b")
    later = launch.again()
    later.manager.recover()
    assert later.begin("b").resume
    clock.now += 1799
    assert not later.manager.row("b", row(3, 0.1))
    assert later.manager.progress().seconds == 1799


def test_a_queued_trial_is_not_counted_as_cost_twice_while_it_waits(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"fe_per_image": 100}))
    launch.begin("a")
    launch.manager.row("a", row(2, 0.1))
    launch.manager.end("a", None, lost=True)
    assert launch.manager.progress().fe_per_image == 2.0, "waiting"
    launch.begin("b")
    assert launch.manager.progress().fe_per_image == 2.0, "running"
    launch.finish("b", 0.3, first=4)
    assert launch.manager.progress().fe_per_image == 4.0, "over"


# --- relaunches -------------------------------------------------------------------------------


def test_the_tally_is_the_same_after_a_relaunch(tmp_path: Path) -> None:
    space = space_of(budget={"trials": 20}, constraints=["optimizer.lr > 0.02"])
    launch = Launch(tmp_path / "s", space=space)
    launch.begin("slow")
    launch.complete("a", 0.1, 0.3)
    launch.complete("b", 0.1, 0.5)
    launch.complete("c", 0.4)
    launch.manager.end("slow", {**row(3, 0.5), "final": True}, lost=False)
    launch.begin("d")
    launch.manager.row("d", row(1, 0.9))
    launch.manager.end("d", failed("diverged"), lost=False)
    launch.begin("e")
    launch.manager.end("e", row(1, 0.2), lost=False)
    launch.begin("f")
    launch.manager.row("f", at(2, 0.2, 0.5))
    launch.manager.end("f", None, lost=True)
    before = launch.manager.progress()
    assert before.best is not None and before.best.number == 0, "the first of equals"
    later = launch.again()
    later.manager.recover()
    after = later.manager.progress()
    assert (after.finished, after.outcomes) == (before.finished, before.outcomes)
    assert after.fe_per_image == before.fe_per_image == 2 + 2 + 1 + 3 + 1 + 1 + 2
    assert (after.best, after.retries) == (before.best, before.retries)
    assert after.retries == 1


def test_what_a_trial_costs_the_driver_does_not_grow_with_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"trials": 40}))
    calls = 0
    listing = type(launch.manager.study).get_trials

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return listing(*args, **kwargs)

    monkeypatch.setattr(type(launch.manager.study), "get_trials", counted)
    seen = []
    for number in range(30):
        before = calls
        launch.complete(f"t{number}", 0.1, 0.2, 0.3)
        seen.append(calls - before)
    assert len(set(seen)) == 1 and seen[0] <= 2
    before = calls
    for _ in range(100):
        launch.manager.progress()
        launch.manager.best()
    assert calls == before


def test_progress_is_told_of_the_live_by_their_last_row(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "s")
    launch.begin("a")
    launch.manager.row("a", at(1, 0.25, 0.25))
    (one,) = launch.manager.progress().running
    assert (one.number, one.progress, one.value) == (0, 0.25, 0.25)
    assert json.loads(row(1, 0.25)["metrics"])[METRIC] == one.value
