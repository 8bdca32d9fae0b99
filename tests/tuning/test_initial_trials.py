"""What a sweep begins with is planned once, whenever the driver dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from sweep_helpers import METRIC, Launch, Store, diverged, row, space_of

from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.tracking import Tracker, provenance
from raytrain.tuning import initial_trials as beginning
from raytrain.tuning.initial_trials import plan_first
from raytrain.tuning.mlflow_runs import PARENT, MlflowRuns
from raytrain.tuning.space.search_space import SearchSpace

BASE = {"epochs": 4, "threat": {"norm": "linf", "eps": 0.2}, "optimizer": {"lr": 0.1}}
RATES = {"space": {"optimizer.lr": {"float": [0.01, 0.3], "log": True}}, "base": BASE}
GRID = {
    "space": {"optimizer.lr": {"choice": [0.02, 0.1, 0.3]}, "threat.eps": {"choice": [0.1, 0.2]}},
    "search": {"sampler": "grid"},
    "budget": {},
}


class Killed(BaseException):
    pass


def queue(launch: Launch) -> list[dict[str, Any]]:
    return [t.system_attrs["fixed_params"] for t in launch.trials(TrialState.WAITING)]


def test_a_grid_is_planned_once_wherever_drivers_die(tmp_path: Path) -> None:
    space, calls, limit = space_of(**GRID), 0, 0

    def die(name: str) -> None:
        nonlocal calls
        if name == "create_new_trial" or name == "set_study_user_attr":
            calls += 1
            if limit and calls == limit:
                raise Killed

    before = None
    for at in (4, 3, 2, 0):
        limit = at
        store = Store() if before is None else before.store
        launch = Launch(tmp_path / "s", store, space, deaths=die)
        launch.manager.recover()
        calls, before = 0, launch
        try:
            plan_first(launch.manager, space, "")
        except Killed:
            continue
    assert queue(launch) == list(space.grid()) and len(queue(launch)) == 6
    plan_first(launch.manager, space, "")
    assert len(launch.trials()) == 6
    for number in range(6):
        launch.complete(f"t{number}", 0.1)
    with pytest.raises(StopIteration):
        launch.manager.begin("more")


def test_defaults_come_first_unless_they_are_not_wanted(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "s", space=space_of(**RATES))
    plan_first(launch.manager, launch.space, "")
    assert queue(launch) == [{"optimizer.lr": 0.1}]
    launch.complete("a", 0.2)
    assert launch.trials()[0].params == {"optimizer.lr": 0.1}
    search = {"sampler": "random", "pruner": "none", "defaults": False}
    other = Launch(tmp_path / "o", space=space_of(**RATES, search=search))
    plan_first(other.manager, other.space, "")
    assert queue(other) == []


def run_of(robust: float, **changes: Any) -> tuple[dict[str, str], dict[str, float]]:
    """A finished run of MLflow: parameters as text, metrics."""
    run = as_run(BASE, {path.replace("__", "."): value for path, value in changes.items()})
    return {k: str(v) for k, v in provenance.parameters(run).items()}, {METRIC: robust}


def with_earlier(
    monkeypatch: pytest.MonkeyPatch, runs: list[tuple[dict[str, str], dict[str, float]]]
) -> SearchSpace:
    monkeypatch.setattr(beginning, "finished_runs", lambda uri, name: runs)
    search = {"sampler": "tpe", "pruner": "none", "defaults": False, "earlier": "old"}
    return space_of(**RATES, search={**search, "earlier_best": 2})


def told(launch: Launch) -> list[FrozenTrial]:
    return launch.trials(TrialState.COMPLETE)


def test_comparable_runs_are_told_and_the_best_of_the_others_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = float("nan")
    runs = [
        run_of(0.4, optimizer__lr=0.02),
        run_of(0.9, optimizer__lr=0.02),  # the same configuration once more
        run_of(0.5, optimizer__lr=0.05),
        run_of(nan, optimizer__lr=0.06),
        run_of(0.6, optimizer__lr=0.9),  # outside
        run_of(0.1, optimizer__lr=0.03, epochs=9),
        run_of(0.3, optimizer__lr=0.04, epochs=9),
        run_of(0.2, optimizer__lr=0.07, epochs=9),
        ({"no": "run"}, {METRIC: 1.0}),
    ]
    launch = Launch(tmp_path / "s", space=with_earlier(monkeypatch, runs))
    plan_first(launch.manager, launch.space, "")
    assert [(t.params["optimizer.lr"], t.value) for t in told(launch)] == [
        (0.02, 0.4),
        (0.05, 0.5),
    ]
    assert [list(t.constraints) for t in told(launch)] == [["valid/robust_drop", "trained"]] * 2
    assert queue(launch) == [{"optimizer.lr": 0.04}, {"optimizer.lr": 0.07}]
    assert launch.manager.progress().finished == 0 and launch.manager.best() is None
    assert launch.store.status == {} and launch.manager.history.rows() == []
    later = launch.again()
    later.manager.recover()
    plan_first(later.manager, later.space, "")
    assert later.manager.progress().finished == 0
    assert (len(told(later)), len(queue(later))) == (2, 2)
    later.complete("a", 0.2)
    assert later.trials(TrialState.COMPLETE)[-1].params == {"optimizer.lr": 0.04}


@pytest.mark.parametrize("text", ["/d/a #1/x.parquet", "x: y.parquet", "{a}", "007", "no", "~"])
def test_earlier_runs_are_known_again_by_their_text(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"data__name": text, "data__root": text, "model__name": text}
    runs = [run_of(0.4, **values, optimizer__lr=0.02)]
    base = {**BASE, "data": {"name": text, "root": text}, "model": {"name": text}}
    space = with_earlier(monkeypatch, runs).model_copy(update={"base": base})
    launch = Launch(tmp_path / "s", space=space)
    plan_first(launch.manager, space, "")
    assert [(t.params["optimizer.lr"], t.value) for t in told(launch)] == [(0.02, 0.4)]


@pytest.mark.parametrize("dies_at", range(1, 6))
def test_earlier_runs_are_told_once_wherever_the_driver_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    runs = [run_of(0.1, optimizer__lr=lr) for lr in (0.02, 0.05)]
    runs += [run_of(0.1, optimizer__lr=lr, epochs=9) for lr in (0.03, 0.06)]
    space, calls = with_earlier(monkeypatch, runs), 0

    def die(name: str) -> None:
        nonlocal calls
        calls += name in ("create_new_trial", "set_study_user_attr") and armed
        if calls == dies_at:
            calls += 1
            raise Killed

    armed = False
    launch = Launch(tmp_path / "s", space=space, deaths=die)
    armed = True
    with pytest.raises(Killed):
        plan_first(launch.manager, space, "")
    later = launch.again()
    later.manager.recover()
    plan_first(later.manager, space, "")
    assert sorted(t.params["optimizer.lr"] for t in told(later)) == [0.02, 0.05]
    assert sorted(q["optimizer.lr"] for q in queue(later)) == [0.03, 0.06]


# --- equally many of each algorithm ---------------------------------------------------------------

SEVERAL: dict[str, Any] = {
    "space": {
        "algorithm.name": {
            "branch": {
                "pgd": {"algorithm.steps": {"int": [2, 10]}},
                "trades": {"algorithm.beta": {"float": [0.5, 15], "log": True}},
                "natural": {},
            }
        },
        "optimizer.lr": {"float": [0.01, 0.3], "log": True},
    },
    "base": {**BASE, "algorithm": "pgd"},
    "search": {"sampler": "tpe", "pruner": "none", "startup": 7, "seed": 3},
}


def named(launch: Launch) -> list[str]:
    return [params["algorithm.name"] for params in queue(launch)]


def started(folder: Path, **changes: Any) -> Launch:
    launch = Launch(folder, space=space_of(**{**SEVERAL, **changes}))
    plan_first(launch.manager, launch.space, "")
    return launch


def test_the_first_trials_are_spread_over_all_algorithms_alike(tmp_path: Path) -> None:
    names = named(started(tmp_path / "s"))
    assert len(names) == 9  # startup over three algorithms, rounded up
    for round_ in range(3):  # a budget that ends early has tried all alike too
        assert sorted(names[3 * round_ : 3 * round_ + 3]) == ["natural", "pgd", "trades"]


def test_they_depend_on_the_seed_alone_and_are_no_copies(tmp_path: Path) -> None:
    one, same = (queue(started(tmp_path / name)) for name in ("one", "same"))
    search = {**SEVERAL["search"], "seed": 4}
    other = queue(started(tmp_path / "other", search=search))
    assert one == same and len({repr(params) for params in one}) == len(one)
    assert one[:3] == other[:3] and one[3:] != other[3:]  # the defaults have no seed


def test_they_are_no_defaults_where_those_are_not_wanted(tmp_path: Path) -> None:
    search = {**SEVERAL["search"], "defaults": False}
    names = named(started(tmp_path / "s", search=search))
    assert sorted(names) == ["natural"] * 3 + ["pgd"] * 3 + ["trades"] * 3


def test_they_keep_the_constraints(tmp_path: Path) -> None:
    rule = "optimizer.lr < 0.02 or algorithm.name != 'pgd'"
    launch = started(tmp_path / "s", constraints=[rule])
    names = named(launch)
    assert names.count("pgd") == names.count("trades") == 3
    rates = [q["optimizer.lr"] for q in queue(launch) if q["algorithm.name"] == "pgd"]
    assert max(rates) < 0.02


def test_a_sweep_that_is_resumed_goes_on_with_the_rest_of_them(tmp_path: Path) -> None:
    launch = started(tmp_path / "s", budget={"trials": 9})
    planned = queue(launch)
    launch.complete("a", 0.1)
    launch.begin("b")  # under way when the driver dies
    later = launch.again()
    later.manager.recover()
    plan_first(later.manager, later.space, "")
    assert queue(later) == [*planned[2:], planned[1]]
    for number in range(8):
        later.complete(f"t{number}", 0.1)
    done = [t.params for t in later.trials(TrialState.COMPLETE)]
    assert sorted(map(repr, done)) == sorted(map(repr, planned))


@pytest.mark.parametrize("dies_at", [2, 5, 9, 10])
def test_they_are_planned_once_wherever_the_driver_dies(tmp_path: Path, dies_at: int) -> None:
    calls = 0

    def die(name: str) -> None:
        nonlocal calls
        calls += name in ("create_new_trial", "set_study_user_attr") and armed
        if calls == dies_at:
            calls += 1
            raise Killed

    armed = False
    launch = Launch(tmp_path / "s", space=space_of(**SEVERAL), deaths=die)
    armed = True
    with pytest.raises(Killed):
        plan_first(launch.manager, launch.space, "")
    later = launch.again()
    later.manager.recover()
    plan_first(later.manager, later.space, "")
    assert queue(later) == queue(started(tmp_path / "whole"))


@pytest.mark.parametrize(
    "algorithm",
    [{}, {"algorithm.name": {"choice": ["pgd"]}}, {"algorithm.steps": {"int": [2, 10]}}],
)
def test_a_sweep_with_one_algorithm_begins_as_ever(
    tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    space = {**algorithm, "optimizer.lr": {"float": [0.01, 0.3], "log": True}}
    launch = started(tmp_path / "s", space=space)
    assert launch.space.algorithms is None and len(queue(launch)) == 1


# --- what a real sweep left in a real store ----------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType")
def test_a_sweep_learns_from_the_runs_that_another_one_left_in_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = Launch(tmp_path / "first", space=space_of(**RATES, budget={"trials": 5}))
    tracker = Tracker(uri, "first", tmp_path / "first.jsonl")
    base = first.space.base_run
    tracker.open(PARENT, "first", provenance.parameters(base), {"sweep": "first"})
    first.manager._mlflow_runs = MlflowRuns(tracker, "first", first.folder)
    for number, value in enumerate((0.3, 0.5, 0.4)):
        first.complete(f"t{number}", 0.1, 0.2, 0.25, value)
    first.begin("failing")
    first.manager.end("failing", diverged("it diverged"), lost=False)
    first.begin("stopped")
    first.manager.end("stopped", row(1, 0.9), lost=False)
    done = first.trials(TrialState.COMPLETE)[:3]
    made = {t.params["optimizer.lr"]: t.values[0] for t in done}
    assert sorted(made.values()) == [0.3, 0.4, 0.5]
    best = sorted(made, key=lambda rate: -made[rate])
    tracker.log(PARENT, {METRIC: 0.5})  # as a sweep says of its best
    final = as_run(BASE, {"optimizer.lr": best[0], "seed": 1})
    first.manager._mlflow_runs.begin("final", final, {})
    first.manager._mlflow_runs.row("final", {METRIC: 0.45}, 4)
    first.manager._mlflow_runs.end("final", "complete")
    tracker.shut("FINISHED")

    search = {"sampler": "tpe", "pruner": "none", "defaults": False, "earlier": "first"}
    same = Launch(tmp_path / "same", space=space_of(**RATES, search=search))
    plan_first(same.manager, same.space, uri)
    assert {t.params["optimizer.lr"]: t.value for t in told(same)} == made
    assert queue(same) == [] and same.manager.progress().finished == 0

    longer = {**RATES, "base": {**BASE, "epochs": 8}}
    other = Launch(tmp_path / "other", space=space_of(**longer, search=search))
    plan_first(other.manager, other.space, uri)
    assert [q["optimizer.lr"] for q in queue(other)] == best and told(other) == []

    nowhere = space_of(**RATES, search={**search, "earlier": "none"})
    with pytest.raises(RequestError, match=r"^search.earlier: .* has no experiment 'none'"):
        plan_first(Launch(tmp_path / "nowhere", space=nowhere).manager, nowhere, uri)
