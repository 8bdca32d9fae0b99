"""The study is the trial manager: the budget is met exactly, nothing is repeated, nothing is left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import metrics_of
from optuna.trial import TrialState
from sweep_helpers import METRIC, SPACE, Launch, diverged, opened, row, space_of

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.distributed.jobs import RecentRows
from raytrain.training import progress


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path / "study")


# --- how trials end ---------------------------------------------------------------------------


def test_a_trial_trained_to_the_end_is_complete_with_its_last_value(launch: Launch) -> None:
    launch.complete("a", 0.1, 0.3, 0.2)
    (trial,) = launch.trials()
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.2)
    assert trial.intermediate_values == {1: 0.1, 2: 0.3, 3: 0.2}
    assert launch.store.status == {"t0000": "FINISHED"}
    assert launch.store.rows == {"t0000": [1, 2, 3]}
    assert launch.store.tags["t0000"]["outcome"] == "complete"


def test_a_job_is_the_run_that_the_trial_chose_in_a_folder_of_its_own(launch: Launch) -> None:
    jobs = [launch.begin("a"), launch.begin("b")]
    runs = [RunConfig.model_validate_json(job.run) for job in jobs]
    for trial, run in zip(launch.trials(), runs, strict=True):
        assert run.optimizer.lr == trial.params["optimizer.lr"]
        multiple = trial.params["algorithm.step_size"]
        assert run.algorithm.model_dump()["step_size"] == multiple * 0.2
    assert len({job.folder for job in jobs}) == 2
    assert not any(job.resume for job in jobs)


def test_a_run_in_mlflow_tells_its_trial_and_what_varies(launch: Launch) -> None:
    launch.begin("a")
    (trial,) = launch.trials()
    name, tags = launch.store.names["t0000"], launch.store.tags["t0000"]
    assert name.startswith("t000") and f"lr={trial.params['optimizer.lr']:.3g}" in name
    assert (tags["sweep"], tags["trial"]) == ("study", "t0000")


def test_a_stopped_trial_is_pruned_with_its_last_intermediate_value(launch: Launch) -> None:
    launch.manager.study.pruner = optuna.pruners.ThresholdPruner(lower=0.5)
    launch.begin("a")
    assert not launch.manager.row("a", row(1, 0.6))
    assert launch.manager.row("a", row(2, 0.4))
    launch.manager.end("a", row(2, 0.4), lost=False)
    (trial,) = launch.trials()
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.4)
    assert launch.store.status == {"t0000": "FINISHED"}
    assert launch.store.tags["t0000"]["outcome"] == "stopped"
    assert [r.state for r in launch.manager.history.rows()] == ["stopped"]


def test_a_diverged_trial_is_pruned_and_failed_in_mlflow_with_the_reason(launch: Launch) -> None:
    launch.begin("a")
    launch.manager.row("a", row(1, 0.2))
    launch.manager.end("a", diverged("training diverged in epoch 2"), lost=False)
    (trial,) = launch.trials()
    assert trial.state == TrialState.PRUNED
    assert launch.store.status == {"t0000": "FAILED"}
    assert launch.store.tags["t0000"]["outcome"] == "diverged"
    assert "epoch 2" in launch.store.tags["t0000"]["error"]
    assert launch.manager.progress().finished == 1
    assert launch.manager.best() is None


def test_a_row_is_recorded_once_however_often_it_comes(launch: Launch) -> None:
    launch.begin("a")
    for epoch in (1, 2, 2, 1, 3):
        launch.manager.row("a", row(epoch, 0.1 * epoch))
    assert launch.store.rows["t0000"] == [1, 2, 3]


def test_an_epoch_without_validation_is_recorded_and_stops_nothing(launch: Launch) -> None:
    launch.manager.study.pruner = optuna.pruners.ThresholdPruner(lower=0.5)
    launch.begin("a")
    assert not launch.manager.row("a", row(1, 0.9))
    assert not launch.manager.row("a", row(2, None))
    assert launch.store.rows["t0000"] == [1, 2]
    assert launch.trials()[0].intermediate_values == {1: 0.9}


def test_rows_of_a_trial_that_has_ended_are_refused(launch: Launch) -> None:
    launch.complete("a", 0.1)
    assert launch.manager.row("a", row(2, 0.5))
    launch.manager.end("a", row(2, 0.5), lost=False)
    launch.manager.end("unknown", None, lost=True)
    assert launch.store.rows["t0000"] == [1]
    assert len(launch.trials()) == 1


def test_asha_stops_the_worst_at_the_first_rung(tmp_path: Path) -> None:
    search = {"sampler": "random", "pruner": "asha", "first_rung": 2, "reduction": 2}
    launch = Launch(tmp_path / "s", space=space_of(search=search, budget={"trials": 9}))
    for name, value in zip("abcd", (0.5, 0.6, 0.7, 0.8), strict=True):
        launch.begin(name)
        assert not launch.manager.row(name, row(1, value))
        launch.manager.row(name, row(2, value))
    launch.begin("e")
    assert not launch.manager.row("e", row(1, 0.1)), "no rung before first_rung"
    assert launch.manager.row("e", row(2, 0.1))


# --- the budget -------------------------------------------------------------------------------


def test_the_budget_is_met_exactly_whatever_becomes_of_the_trials(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "s", space=space_of(budget={"trials": 9}))
    launch.manager.study.pruner = optuna.pruners.ThresholdPruner(lower=0.1)
    running: list[str] = []
    began = 0
    while True:
        try:
            while len(running) < 3 and launch.manager.begin(f"t{began}") is not None:
                running.append(f"t{began}")
                began += 1
        except StopIteration:
            if not running:
                break
        assert launch.manager.progress().finished + len(running) <= 9
        tune_id = running.pop(0)
        match int(tune_id[1:]) % 4:
            case 0:
                launch.finish(tune_id, 0.2, 0.3)
            case 1:
                launch.manager.row(tune_id, row(1, 0.0))
                launch.manager.end(tune_id, row(1, 0.0), lost=False)
            case 2:
                launch.manager.end(tune_id, diverged("diverged"), lost=False)
            case _:
                launch.manager.end(tune_id, None, lost=True)
    ended = launch.trials(TrialState.COMPLETE, TrialState.PRUNED)
    assert launch.manager.progress().finished == len(ended) == 9
    assert launch.trials(TrialState.RUNNING, TrialState.WAITING) == []
    assert set(launch.store.status.values()) <= {"FINISHED", "FAILED"}
    assert len(launch.store.status) == 9, "a lost trial goes on in its own run"
    assert began == 9 + len(launch.trials(TrialState.FAIL))


def test_no_more_trials_begin_than_the_budget_has_room_for(launch: Launch) -> None:
    for name in "abcd":
        launch.begin(name)
    assert launch.manager.begin("e") is None, "a live trial may still be lost"
    for name in "abcd":
        launch.finish(name, 0.1)
    with pytest.raises(StopIteration):
        launch.manager.begin("e")


# --- lost trials ------------------------------------------------------------------------------


def test_a_lost_trial_goes_on_with_its_parameters_its_run_and_its_folder(launch: Launch) -> None:
    first = launch.begin("a")
    launch.manager.row("a", row(1, 0.1))
    launch.manager.end("a", None, lost=True)
    (trial,) = launch.trials(TrialState.FAIL)
    second = launch.begin("b")
    assert (second.run, second.folder, second.resume) == (first.run, first.folder, True)
    (retry,) = launch.trials(TrialState.RUNNING)
    assert retry.params == trial.params
    assert retry.intermediate_values == {1: 0.1}, "pruners look at them"
    assert launch.store.status == {"t0000": "RUNNING"}
    launch.finish("b", 0.2, 0.3, first=2)
    assert launch.store.rows == {"t0000": [1, 2, 3]}
    assert launch.manager.progress().finished == 1
    assert [(r.state, r.value, r.handle) for r in launch.manager.history.rows()] == [
        ("complete", 0.3, "t0000")
    ]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_trial_is_tried_again_as_often_as_allowed_then_given_up_and_counted(
    failures: int, tmp_path: Path
) -> None:
    base = {**SPACE["base"], "max_failures": failures}
    launch = Launch(tmp_path / "s", space=space_of(base=base, budget={"trials": 2}))
    jobs = []
    for attempt in range(failures + 1):
        assert launch.manager.progress().finished == 0
        jobs.append(launch.begin(f"a{attempt}"))
        launch.manager.end(f"a{attempt}", None, lost=True)
    assert {(job.run, job.folder) for job in jobs} == {(jobs[0].run, jobs[0].folder)}
    assert launch.manager.progress().finished == 1
    assert launch.store.status == {"t0000": "FAILED"}
    assert launch.store.tags["t0000"]["outcome"] == "failed"
    assert [r.state for r in launch.manager.history.rows()] == ["failed"]
    assert launch.manager.progress().outcomes["failed"] == 1
    other = launch.begin("b")
    assert other.run != jobs[0].run
    launch.finish("b", 0.1)
    with pytest.raises(StopIteration):
        launch.manager.begin("c")


def test_a_trial_lost_after_its_last_epoch_is_complete_with_the_value_it_reported(
    launch: Launch,
) -> None:
    launch.begin("a")
    for epoch, value in enumerate((0.1, 0.2, 0.4, 0.3), start=1):
        launch.manager.row("a", row(epoch, value))
    launch.manager.end("a", None, lost=True)
    launch.begin("b")
    # Its checkpoint is of the last epoch, so there is nothing left to train and no row to report.
    launch.manager.end("b", {"metrics": "{}", "epoch": 0, "final": True, "done": True}, lost=False)
    (trial,) = launch.trials(TrialState.COMPLETE)
    assert trial.value == 0.3
    best = launch.manager.best()
    assert best is not None and (best.value, best.epochs, best.handle) == (0.3, 4, "t0000")
    assert launch.store.tags["t0000"]["outcome"] == "complete"


# --- dead drivers -----------------------------------------------------------------------------


def test_what_was_in_flight_when_the_driver_died_goes_on_where_it_stopped(launch: Launch) -> None:
    launch.complete("done", 0.1, 0.2)
    jobs = [launch.begin("a"), launch.begin("b")]
    launch.manager.row("a", row(1, 0.3))
    launch.manager.row("a", row(2, 0.4))
    before = {t.user_attrs["origin"]: t for t in launch.trials(TrialState.RUNNING)}

    later = launch.again()
    assert later.manager.recover() == 2
    assert later.trials(TrialState.RUNNING) == []
    resumed = [later.begin("c"), later.begin("d")]
    assert all(job.resume for job in resumed)
    assert {(j.run, j.folder) for j in resumed} == {(j.run, j.folder) for j in jobs}
    for trial in later.trials(TrialState.RUNNING):
        old = before[trial.user_attrs["origin"]]
        assert trial.params == old.params
        assert trial.intermediate_values == old.intermediate_values
    assert len(later.store.status) == 3


def test_nothing_that_finished_is_repeated_after_a_dead_driver(launch: Launch) -> None:
    launch.complete("a", 0.1)
    launch.begin("b")
    launch.manager.end("b", diverged("diverged"), lost=False)
    launch.begin("c")
    finished = [t.params for t in launch.trials(TrialState.COMPLETE, TrialState.PRUNED)]

    later = launch.again()
    later.manager.recover()
    number = 0
    while True:
        try:
            later.complete(f"n{number}", 0.5)
        except StopIteration:
            break
        number += 1
    assert number == 2, "the one in flight and the last of four"
    assert later.manager.progress().finished == 4
    everything = [t.params for t in later.trials(TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(everything) == 4 and all(everything.count(params) == 1 for params in finished)
    assert len(later.store.status) == 4
    assert sorted(later.store.status.values()) == ["FAILED", *["FINISHED"] * 3]


def test_rows_before_the_death_are_not_recorded_twice(launch: Launch) -> None:
    launch.begin("a")
    launch.manager.row("a", row(1, 0.1))
    launch.manager.row("a", row(2, 0.2))
    later = launch.again()
    later.manager.recover()
    later.begin("b")
    later.finish("b", 0.2, 0.3, first=2)  # the checkpoint was of epoch 1
    assert later.store.rows == {"t0000": [1, 2, 3]}
    assert later.trials()[-1].value == 0.3


def test_a_driver_may_die_many_times_in_the_middle_of_the_same_trial(launch: Launch) -> None:
    job = launch.begin("a")
    for attempt in range(5):
        launch = launch.again()
        assert launch.manager.recover() == 1
        again = launch.begin(f"a{attempt}")
        assert (again.run, again.folder) == (job.run, job.folder)
    launch.finish("a4", 0.1)
    assert launch.store.status == {"t0000": "FINISHED"}
    assert [r.handle for r in launch.manager.history.rows()] == ["t0000"]


def test_a_trial_that_was_queued_again_is_still_queued_after_a_dead_driver(launch: Launch) -> None:
    job = launch.begin("a")
    launch.manager.end("a", None, lost=True)
    later = launch.again()
    later.manager.recover()
    assert later.begin("b").run == job.run


def test_no_run_is_left_running_when_the_new_budget_is_spent_already(launch: Launch) -> None:
    launch.complete("a", 0.1)
    launch.begin("b")
    later = launch.again(space_of(budget={"trials": 1}))
    later.manager.recover()
    with pytest.raises(StopIteration):
        later.manager.begin("c")
    assert set(later.store.status.values()) <= {"FINISHED", "FAILED", "KILLED"}


def test_a_resumed_sampler_proposes_what_it_has_not_proposed_before(tmp_path: Path) -> None:
    for sampler in ("random", "tpe"):
        search = {"sampler": sampler, "pruner": "none", "startup": 2}
        space = space_of(search=search, budget={"trials": 12})
        launch = Launch(tmp_path / sampler, space=space)
        for start in range(3):
            for number in range(4):
                launch.complete(f"t{start}{number}", 0.1 * number)
            launch = launch.again()
        rates = [trial.params["optimizer.lr"] for trial in launch.trials()]
        assert len(rates) == len(set(rates)) == 12


def test_the_same_seed_proposes_the_same_trials_in_two_sweeps(tmp_path: Path) -> None:
    rates = []
    for name in ("one", "two"):
        launch = Launch(tmp_path / name)
        for number in range(3):
            launch.complete(f"t{number}", 0.1)
        rates.append([trial.params["optimizer.lr"] for trial in launch.trials()])
    assert rates[0] == rates[1]


# --- what is read -----------------------------------------------------------------------------


def test_the_best_is_the_best_of_those_trained_to_the_end(launch: Launch) -> None:
    launch.complete("a", 0.2, 0.3)
    launch.complete("b", 0.9, 0.5)
    launch.begin("stopped")
    launch.manager.row("stopped", row(1, 0.95))
    launch.manager.end("stopped", row(1, 0.95), lost=False)
    launch.begin("running")
    launch.manager.row("running", row(1, 0.99))
    best = launch.manager.best()
    assert best is not None and (best.number, best.value, best.handle) == (1, 0.5, "t0001")
    progress = launch.manager.progress()
    assert (progress.finished, progress.budget.trials) == (3, 4)
    assert progress.outcomes == {"complete": 2, "stopped": 1}
    assert progress.best == best
    assert [one.value for one in progress.running] == [0.99]


def test_the_best_of_what_is_minimised_is_the_smallest(tmp_path: Path) -> None:
    objective = {"metric": METRIC, "mode": "min"}
    launch = Launch(tmp_path / "s", space=space_of(objective=objective))
    launch.complete("a", 0.2)
    launch.complete("b", 0.0)
    launch.complete("c", 0.1)
    best = launch.manager.best()
    assert best is not None and (best.number, best.value) == (1, 0.0)


def test_rows_tell_parameters_in_the_units_of_the_run(launch: Launch) -> None:
    job = launch.begin("a")
    launch.finish("a", 0.2)
    run = RunConfig.model_validate_json(job.run)
    (told,) = launch.manager.history.rows()
    assert told.params["algorithm.step_size"] == run.algorithm.model_dump()["step_size"]
    assert told.params["optimizer.lr"] == run.optimizer.lr
    assert (told.metrics["cost/fe"], told.epochs, told.value) == (10.0, 1, 0.2)
    assert (
        launch.manager.space.run(told.params).signature()
        == as_run(SPACE["base"], told.params).signature()
    )


def test_whoever_watches_is_told_after_every_row_and_every_end(launch: Launch) -> None:
    launch.complete("a", 0.2, 0.3)
    assert [progress.finished for progress in launch.seen][-1] == 1
    assert launch.seen[-1].best is not None and launch.seen[-1].best.value == 0.3
    assert len(launch.seen) >= 2


# --- opening a study --------------------------------------------------------------------------


def test_a_sweep_that_exists_is_not_begun_again(launch: Launch) -> None:
    with pytest.raises(RequestError, match=r"^--name: a sweep study exists.*--resume study"):
        opened(launch.folder, launch.space, resume=False)


def test_a_sweep_that_does_not_exist_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^--resume: there is no sweep nope"):
        opened(tmp_path / "nope", space_of(), resume=True)
    assert not (tmp_path / "nope").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"space": {"optimizer.lr": {"float": [0.01, 0.2]}}},
        {"base": {"epochs": 5}},
        {"objective": {"mode": "min"}},
        {"objective": {"metric": "valid/clean"}},
    ],
)
def test_a_changed_space_is_not_resumed(launch: Launch, change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^--resume: the search space of study has changed"):
        opened(launch.folder, space_of(**change), resume=True)


def test_a_larger_budget_may_be_resumed(launch: Launch) -> None:
    launch.complete("a", 0.1)
    study = opened(launch.folder, space_of(budget={"trials": 50}), resume=True)
    assert len(study.get_trials()) == 1


# --- within epochs ----------------------------------------------------------------------------


def test_a_trial_within_its_epoch_is_shown_there_and_nothing_is_decided_by_it(
    launch: Launch,
) -> None:
    launch.begin("a")
    launch.manager.within_epochs({"a": (0.1, None), "unknown": (0.9, 1.0)})
    (running,) = launch.seen[-1].running
    assert (running.epoch, running.progress) == (1, 0.1)
    assert launch.seen[-1].seconds_left is not None
    launch.manager.row("a", {**row(1, 0.3), "progress": 0.25})
    (running,) = launch.seen[-1].running
    assert (running.epoch, running.progress) == (2, 0.25)
    assert launch.trials()[0].user_attrs["last"]["progress"] == 0.25
    calls = len(launch.seen)
    launch.manager.within_epochs({})
    assert len(launch.seen) == calls + 1


def test_metrics_within_an_epoch_lose_no_row_that_is_still_to_come(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.begin("a")
    launch.manager.row("a", row(1, 0.3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1e12)
    launch.manager.within_epochs({"a": (0.7, 1.5)})  # in its third epoch; the second row is behind
    launch.manager.row("a", row(2, 0.3))
    assert launch.store.rows["t0000"] == [1, 1, 2]


def test_rows_that_a_lost_machine_had_are_taken_from_beside_the_checkpoints(
    launch: Launch,
) -> None:
    """The storage has an older copy of the journal; a trial under way has one row that the study has not."""
    launch.begin("a")
    launch.complete("b", 0.1, 0.2)
    for epoch in (1, 2):
        launch.manager.row("a", row(epoch, 0.1))
    journal = launch.folder / "rows.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:1]))
    for handle, epochs in (("t0000", (1, 2, 3)), ("t0001", (1, 2))):
        kept = RecentRows(launch.folder / "trials" / handle)
        for epoch in epochs:
            kept.add(metrics_of(epoch))
    later = launch.again()
    later.manager.recover()
    rows = [(one["trial"], one["epoch"]) for one in later.manager.journal.rows()]
    assert sorted(rows) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    later.again().manager.recover()
    assert len(list(later.manager.journal.rows())) == 4
