"""MLflow holds what the tracker was told: every row, in order, every run ended."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from git_helpers import repository
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.utils.validation import _validate_experiment_tag
from sqlalchemy.exc import OperationalError
from test_address import UGLY

from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.data.catalogue import SOURCES
from raytrain.tracking import (
    Entry,
    Status,
    Tracker,
    View,
    fetch,
    link,
    provenance,
    sqlite_file,
    tracked,
    tracking_uri,
    ui_server,
)
from raytrain.tracking import reader as read_only
from raytrain.tracking import tracker as trackers
from raytrain.tracking import writer as writers
from raytrain.tracking.lock import alone
from raytrain.tracking.lookup import look_up
from raytrain.tracking.network import tracking_at
from raytrain.tracking.outbox import Outbox, mark_as_tried, state_of
from raytrain.tracking.registry import ALIAS, ROBUST, register
from raytrain.tracking.stores import Store, patiently
from raytrain.tracking.views import key_of
from raytrain.training.setup import build_model

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of the file, since making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def outbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "mlflow.jsonl"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "FIRST_RETRY", 0.05)
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)


@pytest.fixture
def tracker(store: str, outbox: Path, impatient: None) -> Iterator[Tracker]:
    made = Tracker(store, "tests", outbox)
    yield made
    made.shut("KILLED")


def begun(tracker: Tracker, handle: str, **params: Any) -> str:
    """A run that is in the store; returns its id."""
    tracker.open(handle, handle, params, {})
    run_id = tracker.run_id(handle)
    assert run_id is not None
    return run_id


def status(tracker: Tracker, handle: str) -> str:
    run_id = tracker.run_id(handle)
    assert run_id is not None
    return str(reader(tracker).get_run(run_id).info.status)


def reader(tracker: Tracker) -> MlflowClient:
    """A client of its own, so that only what is in the store is seen."""
    return MlflowClient(tracker.uri)


def history(tracker: Tracker, handle: str, metric: str) -> list[tuple[int, float]]:
    run_id = tracker.run_id(handle)
    assert run_id is not None
    return [(p.step, p.value) for p in reader(tracker).get_metric_history(run_id, metric)]


class Refusing:
    """A client that fails `times` times while `away`, and which notes what it does."""

    def __init__(self, client: Any, times: int = 0) -> None:
        self._client, self.times = client, times
        self.done: list[tuple[str, str, Any]] = []
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_run(self, *what: Any, **more: Any) -> Any:
        self._answer()
        return self._client.create_run(*what, **more)

    def log_batch(self, run_id: str, **what: Any) -> None:
        self._answer()
        self._client.log_batch(run_id, **what)
        steps = [metric.step for metric in what.get("metrics", ())]
        self.done.append(("rows", run_id, steps))

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._answer()
        self._client.set_terminated(run_id, status, end_time)
        self.done.append(("end", run_id, status))

    def _answer(self) -> None:
        with self.lock:
            if self.times > 0:
                self.times -= 1
                raise ConnectionError("the store is away\nand will be back")


def refusing(tracker: Tracker, times: int = 0) -> Refusing:
    client = Refusing(tracker._store.client, times)
    tracker._store.client = client
    return client


# --- what is written --------------------------------------------------------------------------


def test_parameters_and_tags_are_those_given(tracker: Tracker) -> None:
    tracker.open("one", "its name", {"a.b": 1, "c": "x", "long": "y" * 9000}, {"t": "u"})
    run_id = tracker.run_id("one")
    assert run_id is not None and tracker.flush()
    run = reader(tracker).get_run(run_id)
    assert (run.data.params["a.b"], run.data.params["c"], run.data.tags["t"]) == ("1", "x", "u")
    assert run.data.params["long"] == "y" * 6000
    assert run.info.run_name == "its name"


def test_more_parameters_than_a_batch_holds_are_all_written(tracker: Tracker) -> None:
    run_id = begun(tracker, "many", **{f"p{i}": i for i in range(230)})
    assert tracker.flush()
    assert len(reader(tracker).get_run(run_id).data.params) == 230


def test_a_trial_is_a_child_of_its_sweep_in_the_same_experiment(tracker: Tracker) -> None:
    tracker.open("sweep", "sweep", {}, {})
    tracker.open("trial", "trial", {}, {}, parent="sweep")
    parent, child = tracker.run_id("sweep"), tracker.run_id("trial")
    assert parent is not None
    found = reader(tracker).search_runs(
        [tracker.experiment_id], f"tags.mlflow.parentRunId = '{parent}'"
    )
    assert [run.info.run_id for run in found] == [child]
    assert "mlflow.parentRunId" not in reader(tracker).get_run(parent).data.tags


def test_every_row_is_in_the_store_with_its_step_after_a_flush(tracker: Tracker) -> None:
    tracker.open("rows", "rows", {}, {})
    for step in range(1, 21):
        tracker.log("rows", {"loss": 1 / step, "cost/fe": step * 10.0}, step)
    assert tracker.flush()
    assert history(tracker, "rows", "loss") == [(step, 1 / step) for step in range(1, 21)]
    assert history(tracker, "rows", "cost/fe")[-1] == (20, 200.0)


def test_more_metrics_than_a_batch_holds_are_all_written(tracker: Tracker) -> None:
    run_id = begun(tracker, "wide")
    for step in range(3):
        tracker.log("wide", {f"m{i}": float(i) for i in range(500)}, step)
    assert tracker.flush()
    assert len(reader(tracker).get_run(run_id).data.metrics) == 500
    assert [step for step, _ in history(tracker, "wide", "m499")] == [0, 1, 2]


@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf"), -float("inf")])
def test_the_same_row_delivered_twice_is_there_once(tracker: Tracker, value: float) -> None:
    run_id = begun(tracker, "twice", a=1)
    tracker.log("twice", {"loss": value, "acc": 1.0}, 1)
    lines = tracker._outbox.read()[0]
    assert tracker.flush()
    for record in lines:
        tracker._outbox.append(record)
    assert tracker.flush()
    points = reader(tracker).get_metric_history(run_id, "loss")
    assert len(lines) == 1 and len(points) == 1
    assert len(reader(tracker).get_metric_history(run_id, "acc")) == 1


def test_no_call_waits_for_the_store(tracker: Tracker, tmp_path: Path) -> None:
    client, gate = refusing(tracker), threading.Event()
    created = client.create_run

    def slow(*what: Any, **more: Any) -> Any:
        assert gate.wait(30)
        return created(*what, **more)

    client.create_run = slow  # type: ignore[method-assign]
    (tmp_path / "a.txt").write_text("a")
    tracker.open("slow", "slow", {"a": 1}, {})
    for step in range(5):
        tracker.log("slow", {"loss": 0.0}, step)
    tracker.text("slow", "b", "b.txt")
    tracker.artifact("slow", tmp_path / "a.txt")
    tracker.close("slow", "FINISHED")
    tracker.reopen("slow")
    tracker.tag("slow", {"t": "u"})
    tracker.close("slow", "FAILED")
    assert client.done == [] and tracker.last_step("slow") == 4
    assert tracker.run_id("slow", 0.0) is None and tracker.known("slow")
    gate.set()
    assert tracker.flush()
    assert history(tracker, "slow", "loss") == [(step, 0.0) for step in range(5)]
    assert status(tracker, "slow") == "FAILED"


def test_tags_set_later_and_text_and_files_are_in_the_store(
    tracker: Tracker, tmp_path: Path
) -> None:
    run_id = begun(tracker, "artifacts")
    tracker.tag("artifacts", {"outcome": "complete"})
    tracker.text("artifacts", "epochs: 3\n", "run.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.artifact("artifacts", tmp_path / "folder", "more")
    tracker.artifact("artifacts", tmp_path / "folder" / "a.txt")
    assert tracker.flush()
    assert reader(tracker).get_run(run_id).data.tags["outcome"] == "complete"
    assert fetch(tracker.uri, run_id, "run.yaml", tmp_path / "got").read_text() == "epochs: 3\n"
    assert {f.path for f in reader(tracker).list_artifacts(run_id, "more")} == {"more/a.txt"}


def test_artifacts_lie_beside_the_database(tracker: Tracker) -> None:
    run_id = begun(tracker, "where")
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent / "mlruns"
    uri = reader(tracker).get_run(run_id).info.artifact_uri
    assert str(uri).startswith(folder.as_uri())


def test_a_run_keeps_the_times_of_its_records(tracker: Tracker) -> None:
    client = refusing(tracker, 3)
    tracker.open("late", "late", {}, {})
    tracker.close("late", "FINISHED")
    ends = [r["ms"] for r in tracker._outbox.read()[0]]
    assert tracker.flush() and client.times == 0
    run_id = tracker.run_id("late")
    assert run_id is not None
    info = reader(tracker).get_run(run_id).info
    assert [info.start_time, info.end_time] == ends


def test_a_handle_that_was_never_opened_is_the_callers_mistake(tracker: Tracker) -> None:
    with pytest.raises(KeyError, match="nobody: no run of"):
        tracker.log("nobody", {"loss": 1.0})
    with pytest.raises(ValueError, match="expected a word"):
        tracker.open("o'clock", "x", {}, {})


# --- how runs end -----------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_the_status_it_is_closed_with(tracker: Tracker, ended: Status) -> None:
    run_id = begun(tracker, "ends")
    assert status(tracker, "ends") == "RUNNING"
    tracker.close("ends", ended)
    assert tracker.flush()
    assert status(tracker, "ends") == ended
    assert reader(tracker).get_run(run_id).info.end_time is not None


@pytest.mark.parametrize("ended", ["FAILED", "KILLED"])
def test_shutting_ends_what_is_open_and_leaves_what_was_closed(
    store: str, outbox: Path, ended: Status
) -> None:
    tracker = Tracker(store, "tests", outbox)
    for handle in ("closed", "one", "two"):
        tracker.open(handle, handle, {}, {})
    tracker.close("closed", "FINISHED")
    tracker.log("one", {"loss": 1.0}, 3)
    tracker.shut(ended)
    found = [status(tracker, handle) for handle in ("closed", "one", "two")]
    assert found == ["FINISHED", ended, ended]
    assert history(tracker, "one", "loss") == [(3, 1.0)]
    assert not any(thread is tracker._writer._thread for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("error", "ended"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")],
    ids=["fine", "error", "interrupted"],
)
def test_a_command_ends_its_runs_as_it_ends_and_leaves_no_spool(
    store: str, tmp_path: Path, error: type[BaseException] | None, ended: Status
) -> None:
    folder = tmp_path / ".mlflow"
    found: list[str] = []
    try:
        with tracked(store, "tests", folder / "a.jsonl", folder) as tracker:
            found.append(begun(tracker, "run"))
            assert (folder / "a.jsonl").exists()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert MlflowClient(store).get_run(found[0]).info.status == ended
    assert os.listdir(tmp_path) == []


def test_the_end_of_a_run_comes_after_its_rows(tracker: Tracker) -> None:
    runs = {f"r{i}": begun(tracker, f"r{i}") for i in range(3)}
    client = refusing(tracker)
    for step in range(4):
        for handle in runs:
            tracker.log(handle, {"loss": 0.0}, step)
    for handle in runs:
        tracker.close(handle, "FINISHED")
    assert tracker.flush()
    for run_id in runs.values():
        mine = [(kind, what) for kind, of, what in client.done if of == run_id]
        assert mine[-1] == ("end", "FINISHED")
        assert sum((what for kind, what in mine if kind == "rows"), []) == [0, 1, 2, 3]


def test_a_run_of_an_earlier_launch_is_adopted_at_the_last_epoch_it_has(
    tracker: Tracker, store: str, tmp_path: Path
) -> None:
    run_id = begun(tracker, "again")
    for step in (1, 2, 3):
        tracker.log("again", {"cost/fe": 10.0 * step}, step)
    tracker.close("again", "KILLED")
    assert tracker.flush()
    other = Tracker(store, "tests", tmp_path / "other.jsonl")
    assert other.has_run(run_id) and not other.has_run("0" * 32)
    other.adopt("x", run_id)
    assert (other.run_id("x", 0.0), other.last_step("x")) == (run_id, 3)
    assert other.flush() and status(other, "x") == "KILLED"
    other.reopen("x")
    assert other.flush() and status(other, "x") == "RUNNING"
    other.log("x", {"cost/fe": 40.0}, 4)
    assert other.last_step("x") == 4
    other.shut("FINISHED")
    assert status(other, "x") == "FINISHED"
    assert [step for step, _ in history(other, "x", "cost/fe")] == [1, 2, 3, 4]


def test_a_run_that_is_reopened_at_once_keeps_running_and_knows_its_rows(tracker: Tracker) -> None:
    tracker.open("at once", "at once", {}, {})
    tracker.log("at once", {"cost/fe": 10.0}, 1)
    tracker.close("at once", "FAILED")  # only queued: a lost trial is begun again right away
    tracker.open("at once", "again", {}, {})
    assert tracker.last_step("at once") == 1
    assert tracker.flush()
    assert status(tracker, "at once") == "RUNNING"


# --- a sweep that is continued ----------------------------------------------------------------


def test_a_sweep_goes_on_with_the_runs_of_its_spool(
    store: str, outbox: Path, impatient: None
) -> None:
    first = Tracker(store, "tests", outbox)
    first.open("sweep", "sweep", {}, {})
    first.open("t0", "t0", {}, {}, parent="sweep")
    first.log("t0", {"loss": 1.0}, 1)
    ids = [first.run_id(handle) for handle in ("sweep", "t0")]
    refusing(first, 10**9)
    first.log("t0", {"loss": 2.0}, 2)
    first.open("t1", "t1", {}, {}, parent="sweep")
    first._writer.stop()  # killed
    second = Tracker(store, "tests", outbox)
    assert [second.known(handle) for handle in ("sweep", "t0", "t1", "t2")] == [True] * 3 + [False]
    assert second.last_step("t0") == 2 and second.unfinished("sweep") == ["t0", "t1"]
    assert [second.run_id(handle) for handle in ("sweep", "t0")] == ids
    second.close("t1", "KILLED")
    second.log("t0", {"loss": 3.0}, 3)
    second.shut("FINISHED")
    assert history(second, "t0", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [status(second, h) for h in ("sweep", "t0", "t1")] == ["FINISHED", "FINISHED", "KILLED"]
    third = Tracker(store, "tests", outbox)
    assert third.unfinished("sweep") == [] and third.last_step("t0") == 3
    assert len(outbox.read_bytes().splitlines()) == 1
    third.shut("FINISHED")


def test_children_that_only_the_store_knows_are_found_too(tracker: Tracker) -> None:
    parent = begun(tracker, "sweep")
    tags = {"mlflow.parentRunId": parent}
    stray = reader(tracker).create_run(tracker.experiment_id, tags=tags).info.run_id
    tracker.open("t0", "t0", {}, {}, parent="sweep")
    tracker.open("t1", "t1", {}, {}, parent="sweep")
    tracker.close("t1", "FINISHED")
    assert tracker.run_id("t0") is not None
    assert tracker.unfinished("sweep") == ["t0", stray]
    tracker.close(stray, "KILLED")
    assert tracker.flush() and status(tracker, stray) == "KILLED"
    assert tracker.unfinished("sweep") == ["t0"]


def test_a_child_that_only_the_store_knows_goes_on_under_the_handle_of_its_trial(
    tracker: Tracker,
) -> None:
    tags = {"mlflow.parentRunId": begun(tracker, "sweep"), "trial": "t0"}
    client = reader(tracker)
    stray = client.create_run(tracker.experiment_id, tags=tags).info.run_id
    client.log_metric(stray, "cost/fe", 1.0, step=2)
    assert tracker.unfinished("sweep") == ["t0"]
    assert tracker.run_id("t0") == stray and tracker.last_step("t0") == 2
    tracker.close("t0", "KILLED")
    tracker.reopen("t0")
    other = client.create_run(tracker.experiment_id, tags=tags).info.run_id
    assert tracker.unfinished("sweep") == ["t0", other]


def test_an_older_copy_of_an_outbox_does_not_repeat_what_the_store_has(
    store: str, outbox: Path, tmp_path: Path
) -> None:
    first = Tracker(store, "tests", outbox)
    begun(first, "t0")
    first.log("t0", {"cost/fe": 1.0}, 1)
    assert first.flush()
    files, copies = (outbox, state_of(outbox)), tmp_path / "elsewhere"
    copies.mkdir()
    for file in files:
        shutil.copy(file, copies)
    first.log("t0", {"cost/fe": 2.0}, 2)
    assert first.flush()
    first._writer.stop()  # its machine is lost
    mark_as_tried(copies / outbox.name)
    second = Tracker(store, "tests", copies / outbox.name)
    assert second.last_step("t0") == 2
    second.log("t0", {"cost/fe": 3.0}, 3)
    assert second.last_step("t0") == 3
    second.shut("FINISHED")
    assert history(second, "t0", "cost/fe") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_two_commands_on_one_spool_are_refused(tracker: Tracker, store: str, outbox: Path) -> None:
    with pytest.raises(RequestError, match=r"mlflow\.jsonl: another process is writing here"):
        Tracker(store, "tests", outbox)


def test_a_folder_that_cannot_be_written_is_refused(store: str, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder is wanted")
    with pytest.raises(RequestError, match=r"^storage: .*runs/s.jsonl could not be opened"):
        Tracker(store, "tests", tmp_path / "runs" / "s.jsonl")


def test_a_spool_goes_on_in_a_store_under_a_new_name_and_not_in_another(
    store: str, outbox: Path, tmp_path: Path
) -> None:
    first = Tracker(store, "tests", outbox)
    begun(first, "sweep")
    first.shut("FINISHED")
    file = Path(store.removeprefix("sqlite:///"))
    (tmp_path / "link").symlink_to(file.parent)
    second = Tracker(f"sqlite:///{tmp_path / 'link' / 'mlflow.db'}", "tests", outbox)
    second.log("sweep", {"loss": 1.0})
    second.shut("FINISHED")
    assert history(second, "sweep", "loss") == [(0, 1.0)]
    with pytest.raises(RequestError, match=r"^tracking_uri: the runs of .* are in MLflow at "):
        Tracker(f"sqlite:///{tmp_path / 'other.db'}", "tests", outbox)


# --- a store that is away ---------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_store_that_is_away_for_a_while_loses_nothing_and_keeps_the_order(
    tracker: Tracker, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [begun(tracker, f"away{i}") for i in range(2)]
    client = refusing(tracker, times)
    for step in range(1, 7):
        for i in range(2):
            tracker.log(f"away{i}", {"loss": float(step)}, step)
        if step == 3:
            tracker.flush(0.2)
    for i in range(2):
        tracker.close(f"away{i}", "FINISHED")
    assert tracker.flush()
    for i, run_id in enumerate(runs):
        found = history(tracker, f"away{i}", "loss")
        assert found == [(step, float(step)) for step in range(1, 7)]
        assert status(tracker, f"away{i}") == "FINISHED"
        mine = [kind for kind, of, _ in client.done if of == run_id]
        assert mine.index("end") == len(mine) - 1
    assert "the store is away" in capsys.readouterr().err


def test_a_run_that_is_refused_does_not_hold_up_the_others(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = begun(tracker, "gone")
    begun(tracker, "fine")
    reader(tracker).delete_run(gone)
    tracker.log("gone", {"loss": 1.0}, 1)
    tracker.log("fine", {"loss": 2.0}, 1)
    tracker.close("fine", "FINISHED")
    assert tracker.flush()
    assert status(tracker, "fine") == "FINISHED"
    assert history(tracker, "fine", "loss") == [(1, 2.0)]
    assert capsys.readouterr().err.count("gone: row refused") == 1


def test_one_bad_name_costs_one_metric(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.open("mixed", "mixed", {"a": 1, "b?": 2}, {})
    tracker.log("mixed", {"loss": 1.0, "lo?ss": 2.0, "acc": 3.0}, 1)
    assert tracker.flush()
    assert history(tracker, "mixed", "loss") == [(1, 1.0)]
    assert history(tracker, "mixed", "acc") == [(1, 3.0)]
    run_id = tracker.run_id("mixed")
    assert run_id is not None
    assert reader(tracker).get_run(run_id).data.params == {"a": "1"}
    said = capsys.readouterr().err
    assert said.count("refused") == 1 and "mixed: b?, lo?ss refused: " in said


def test_what_a_dead_store_did_not_take_is_said_in_one_line_and_delivered_by_the_next_command(
    store: str, tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".mlflow"
    first = Tracker(store, "tests", folder / "a.jsonl", folder)
    client = refusing(first, 10**9)
    first.open("run", "left behind", {"a": 1}, {})
    first.log("run", {"loss": 1.0}, 1)
    assert first.run_id("run", 0.1) is None
    assert not first.flush(0.1)
    capsys.readouterr()
    first.shut("FAILED")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "3 records wait in" in said and "a.jsonl" in said
    first._writer._thread.join()
    client.times = 0
    with tracked(store, "tests", folder / "b.jsonl", folder):
        pass
    found = MlflowClient(store).search_runs(
        [first.experiment_id], "attributes.run_name = 'left behind'"
    )
    assert [run.info.status for run in found] == ["FAILED"]
    assert (found[0].data.params, found[0].data.metrics) == ({"a": "1"}, {"loss": 1.0})
    assert os.listdir(tmp_path) == []


def test_a_network_for_a_store_that_is_away_does_not_end_the_training(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    client = refusing(tracker, 10**9)
    tracker.open("dead", "dead", {}, {})
    tracker.model("dead", torch.nn.Identity(), np.zeros((2, 1, 8, 8), np.float32))
    assert "the network of dead was not stored (no answer)" in capsys.readouterr().err
    client.times = 0


def test_a_complaint_that_nobody_reads_any_more_does_not_end_the_writing(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

    tracker.open("unread", "unread", {}, {})
    refusing(tracker, 2)
    monkeypatch.setattr(sys, "stderr", Gone())
    tracker.log("unread", {"loss": 1.0}, 1)
    assert tracker.flush(10.0)
    assert history(tracker, "unread", "loss") == [(1, 1.0)]


def test_killed_between_any_two_records_the_real_store_has_each_run_once(
    store: str, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    outbox = Outbox(whole, store, "tests")
    opening = {"params": {"a": "1"}, "tags": {"t": "u"}, "ms": 1000}
    outbox.append({"do": "open", "run": "p", "name": "p", "parent": None, **opening})
    outbox.append({"do": "open", "run": "c", "name": "c", "parent": "p", **opening})
    for step in (1, 2):
        outbox.append({"do": "row", "run": "c", "what": {"m": step / 2}, "step": step, "ms": step})
    outbox.append({"do": "end", "run": "c", "status": "FINISHED", "ms": 2000})
    outbox.close()
    lines = whole.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        (folder / "dead.jsonl").write_bytes(b"".join(lines[:count]).replace(b"tests", b"kills"))
        with tracked(store, "kills", folder / "own.jsonl", folder) as tracker:
            pass
        assert not folder.exists()
        client, experiment = MlflowClient(store), tracker.experiment_id
        found = {run.info.run_name: run for run in client.search_runs([experiment])}
        wanted = ["KILLED", "KILLED"] if count < len(lines) else ["KILLED", "FINISHED"]
        runs = [run for name in ("p", "c") if (run := found.get(name)) is not None]
        assert [run.info.status for run in runs] == wanted[: max(count - 1, 0)][:2]
        points = client.get_metric_history(found["c"].info.run_id, "m") if "c" in found else []
        assert [(p.step, p.value) for p in points] == [(1, 0.5), (2, 1.0)][: max(count - 3, 0)]
        for run in client.search_runs([experiment]):
            client.delete_run(run.info.run_id)


# --- a store that cannot be used --------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///{file}/mlflow.db", "http://127.0.0.1:9", "ftp://host/store"],
)
def test_a_store_that_does_not_answer_is_refused_in_one_sentence(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").touch()
    uri = uri.format(file=tmp_path / "file")
    with pytest.raises(RequestError) as caught:
        Tracker(uri, "tests", tmp_path / "spool.jsonl")
    said = str(caught.value)
    assert said.startswith("tracking_uri: ") and uri in said and "\n" not in said
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(RequestError, match=r"^tracking_uri: "):
        Tracker(f"sqlite:///{file}", "tests", tmp_path / "spool.jsonl")


def test_tables_that_cannot_be_completed_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as half:  # as if killed, or another program's
        half.execute("create table _alembic_tmp_experiments (x)")
        half.execute("create table runs (y)")
    before = file.read_bytes()
    with pytest.raises(RequestError, match=r"^tracking_uri: .* cannot be used \(.*; expected a d"):
        Tracker(f"sqlite:///{file}", "tests", tmp_path / "spool.jsonl")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["mlflow.db"]


def test_a_store_whose_driver_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(RequestError, match=r"^tracking_uri: postgresql://.* is not installed"):
        Tracker("postgresql://me@host/name", "tests", tmp_path / "spool.jsonl")


def test_an_experiment_that_another_process_makes_meanwhile_is_used(
    tracker: Tracker, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([None])  # and what there is from then on
    look = MlflowClient.get_experiment_by_name

    def late(client: MlflowClient, name: str) -> Any:
        return next(found, look(client, name))

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert Store(store, "tests").experiment_id == tracker.experiment_id
    assert next(found, "looked") == "looked"


def test_an_experiment_that_mlflow_refuses_is_refused_in_its_words(store: str) -> None:
    with pytest.raises(
        RequestError, match=r"^experiment: .* does not make 'x+' \(.*500 char"
    ) as no:
        Store(store, "x" * 600)
    assert "\n" not in str(no.value)


def locked(code: int) -> MlflowException:
    """What MLflow raises when SQLite answers with this code."""
    driver = sqlite3.OperationalError("database is locked")
    driver.sqlite_errorcode = code
    error = MlflowException("database is locked", TEMPORARILY_UNAVAILABLE)
    error.__cause__ = OperationalError("INSERT", (), driver)
    return error


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_SNAPSHOT])
def test_a_database_that_others_write_to_is_asked_again(code: int) -> None:
    answers = [locked(code), locked(code), "answer", "never asked for"]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(call) == "answer" and answers == ["never asked for"]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL])
def test_a_database_that_cannot_be_written_is_not_asked_again(code: int) -> None:
    asked = []

    def call() -> None:
        asked.append(1)
        raise locked(code)

    with pytest.raises(MlflowException):
        patiently(call)
    assert len(asked) == 1


def test_a_deleted_experiment_is_refused(tracker: Tracker, store: str, tmp_path: Path) -> None:
    client = reader(tracker)
    client.delete_experiment(client.create_experiment("buried"))
    with pytest.raises(RequestError, match=r"^experiment: 'buried' was deleted"):
        Tracker(store, "buried", tmp_path / "spool.jsonl")


def test_an_artifact_that_is_not_there_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    run_id = begun(tracker, "bare")
    for wanted in (run_id, "0" * 32):
        with pytest.raises(RequestError, match=rf"^{wanted}: MLflow at .* has no best.pt"):
            fetch(tracker.uri, wanted, "best.pt", tmp_path / "got")


def test_an_artifact_that_cannot_be_copied_is_not_said_to_be_missing(
    tracker: Tracker, tmp_path: Path
) -> None:
    run_id = begun(tracker, "there")
    tracker.text("there", "x", "x.txt")
    assert tracker.flush()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=rf"^{run_id}: x.txt could not be copied from MLflow"):
        fetch(tracker.uri, run_id, "x.txt", tmp_path / "file" / "got")


def test_nothing_is_made_where_an_artifact_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no best.pt of this run \(there is no such data"):
        fetch(f"sqlite:///{tmp_path / 'x' / 'no.db'}", "0" * 32, "best.pt", tmp_path / "got")
    assert os.listdir(tmp_path) == []


def test_a_run_whose_store_is_none_any_more_is_gone_on_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert look_up("mlruns", "0" * 32, "evaluation", "evaluation.json") is None
    assert "tracking_uri: 'mlruns' is a path" in capsys.readouterr().err


# --- the registry -----------------------------------------------------------------------------


def registered(client: Any, tracker: Tracker, robust: float) -> str:
    """The number of a version with this robustness."""
    run_id = tracker.run_id("registry")
    logged = tracker._store.client.create_logged_model(tracker.experiment_id)
    entry = Entry("raced", "of it", "this", "j", f"{robust}", robust)
    with tracking_at(tracker.uri):
        return register(client, entry, str(run_id), logged.model_id)


class Overtaken:
    """A client whose answer about the alias is old when it arrives: `meanwhile` has been done."""

    def __init__(self, client: Any, meanwhile: list[Callable[[], str]]) -> None:
        self._client, self._meanwhile = client, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def get_model_version_by_alias(self, *what: str) -> Any:
        try:
            return self._client.get_model_version_by_alias(*what)
        finally:
            if self._meanwhile:
                self._meanwhile.pop()()


@pytest.mark.parametrize(("mine", "others"), [(0.5, [0.6]), (0.6, [0.5]), (0.5, [0.5, 0.7, 0.6])])
def test_of_runs_that_end_at_once_the_most_robust_is_the_best(
    tracker: Tracker, mine: float, others: list[float]
) -> None:
    client = tracker._store.client
    begun(tracker, "registry")
    others = list(others)

    def overtaking() -> str:
        return registered(
            Overtaken(client, [overtaking] if others[1:] else []), tracker, others.pop()
        )

    try:
        registered(Overtaken(client, [overtaking]), tracker, mine)
        best = client.get_model_version_by_alias("raced", ALIAS)
        versions = client.search_model_versions("name = 'raced'")
        assert float(best.tags[ROBUST]) == max(float(v.tags[ROBUST]) for v in versions)
    finally:
        client.delete_registered_model("raced")


def test_one_process_at_a_time_changes_the_alias(tracker: Tracker) -> None:
    file = sqlite_file(tracker.uri)
    assert file is not None
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with alone(tracker.uri), pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


def test_a_store_without_a_folder_needs_no_lock(tmp_path: Path) -> None:
    for uri in ("http://host:5000", f"sqlite:///{tmp_path}/no/such/folder.db"):
        with alone(uri):
            pass


# --- folders of any name ----------------------------------------------------------------------


def test_everything_lies_in_a_folder_whose_name_means_something_in_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / UGLY
    (folder / UGLY).mkdir(parents=True)
    (folder / UGLY / "one.txt").write_text("one")
    monkeypatch.chdir(folder)
    with tracked(None, "a/b", Path(UGLY) / "s.jsonl") as tracker:
        run_id = begun(tracker, "run")
        tracker.text("run", "two", "two.txt")
        tracker.artifact("run", Path(UGLY) / "one.txt", "files")
        tracker.view("run", UGLY, View(["tags.kind"], [], []))
        uri = tracker.uri
    with tracked(uri, "Default", Path(UGLY) / "default.jsonl") as tracker:
        other = begun(tracker, "other")
        tracker.text("other", "three", "three.txt")
    monkeypatch.chdir(tmp_path)
    got = folder / "got"
    assert fetch(uri, run_id, "files/one.txt", got).read_text() == "one"
    assert fetch(uri, run_id, "two.txt", got).read_text() == "two"
    assert fetch(uri, other, "three.txt", got).read_text() == "three"
    artifacts = folder / "mlruns"
    assert (artifacts / run_id / "artifacts" / "two.txt").read_text() == "two"
    assert (artifacts / "0" / other / "artifacts" / "three.txt").read_text() == "three"
    client = read_only(f"sqlite:///{folder}/mlflow.db")
    assert client.get_run(run_id).info.status == "FINISHED"
    tags = client.get_experiment_by_name("a/b").tags
    assert f"mlflow.sharedViewState.{key_of(UGLY)}" in tags
    words, _ = ui_server(uri, 5000)
    assert words[words.index("--backend-store-uri") + 1] == uri
    assert words[words.index("--default-artifact-root") + 1] == artifacts.as_uri()
    assert os.listdir(tmp_path) == [UGLY]
    assert sorted(os.listdir(folder)) == sorted(["got", "mlflow.db", "mlruns", UGLY])


def test_a_view_has_a_key_that_mlflow_and_an_address_take() -> None:
    assert key_of("sweep-20261121.x_1") == "sweep-20261121.x_1"
    names = (UGLY, "a b", "a+b", "a&b", "x" * 250, "x" * 251)
    assert len({key_of(name) for name in names}) == len(names)
    for name in names:
        _validate_experiment_tag(f"mlflow.sharedViewState.{key_of(name)}", "")
        address = urlsplit(link("1", name)).fragment
        path, _, query = address.partition("?")
        assert path == "/experiments/1/runs"
        assert parse_qs(query)["viewStateShareKey"] == [key_of(name)]
        assert key_of(key_of(name)) == key_of(name)


# --- which store ------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_the_store_is_the_configured_one_then_the_environments_then_a_file_here(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"sqlite:///{in_folder / 'mlflow.db'}"
    assert tracking_uri(None) == here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(None) == here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(None) == "http://host:5000"
    assert tracking_uri("http://other:5000") == "http://other:5000"


@pytest.mark.parametrize("uri", ["sqlite:///a.db", "sqlite:///sub/a.db"])
def test_a_relative_file_is_made_absolute_and_stays_so_elsewhere(
    uri: str, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = tracking_uri(uri)
    assert absolute == f"sqlite:///{in_folder / uri.removeprefix('sqlite:///')}"
    (in_folder / "elsewhere").mkdir()
    monkeypatch.chdir(in_folder / "elsewhere")
    assert tracking_uri(absolute) == absolute


def test_an_absolute_file_is_left_as_it_is() -> None:
    assert tracking_uri("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


def test_a_tracker_writes_to_the_same_store_after_the_folder_has_changed(
    store: str, tmp_path: Path, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(store.removeprefix("sqlite:///")).parent
    monkeypatch.chdir(folder)
    tracker = Tracker("sqlite:///mlflow.db", "moved", outbox)
    run_id = begun(tracker, "moved")
    monkeypatch.chdir(tmp_path)
    tracker.log("moved", {"loss": 1.0}, 1)
    tracker.text("moved", "x", "x.txt")
    tracker.shut("FINISHED")
    assert tracker.uri == store
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"
    assert os.listdir(tmp_path) == []


# --- the network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_network() -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(as_run(None), SOURCES["digits"]).eval()

    return make


@pytest.mark.parametrize("active", [False, True], ids=["alone", "inside a run of the user"])
def test_the_network_loads_with_mlflows_own_flavour_and_gives_the_same_logits(
    tracker: Tracker, digits_network: Callable[[], torch.nn.Module], active: bool
) -> None:
    import mlflow
    from mlflow import pytorch

    network = digits_network()
    run_id = begun(tracker, "network")
    before = mlflow.get_tracking_uri()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    if active:
        mlflow.set_tracking_uri(tracker.uri)
        mlflow.start_run(experiment_id=tracker.experiment_id)
    try:
        tracker.model("network", network, images[:2].numpy())
        assert mlflow.get_tracking_uri() == (tracker.uri if active else before)
    finally:
        if active:
            mlflow.end_run()
        mlflow.set_tracking_uri(tracker.uri)
    try:
        loaded = pytorch.load_model(f"runs:/{run_id}/model")
    finally:
        mlflow.set_tracking_uri(before)
    for number in (1, 2, 5):
        with torch.no_grad():
            found, wanted = loaded(images[:number]), network(images[:number])
        # float32, and the exported graph may add up in another order.
        assert np.allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)


class Branching(torch.nn.Module):
    """Its path depends on the pixels, which no graph holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if float(x.sum()) > 1 else 2 * x.flatten(1)


def test_a_network_that_is_no_graph_is_left_out_and_said_so(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tracker, "branching")
    tracker.model("branching", Branching(), np.zeros((2, 1, 8, 8), dtype=np.float32))
    assert "the network of branching was not stored (" in capsys.readouterr().err


# --- where a run comes from -------------------------------------------------------------------


def test_parameters_are_flat_and_step_sizes_are_numbers() -> None:
    run = as_run(None, ["algorithm=dynamic", "threat.eps=0.2", "algorithm.step_size=eps/4"])
    flat = provenance.parameters(run)
    assert flat["algorithm.step_size"] == pytest.approx(0.05)
    assert flat["evaluation.step_size"] == pytest.approx(0.05)
    assert (flat["algorithm.decay.kind"], flat["threat.eps"]) == ("power", 0.2)
    assert not any(isinstance(value, dict) or value is None for value in flat.values())
    assert not {"workers", "storage", "device", "tracking_uri"} & set(flat)


def test_the_step_size_of_a_combination_is_a_number_too() -> None:
    attack = {"steps": 3, "step_size": "1.5*eps", "bn": "eval"}
    run = as_run({"algorithm": {"name": "nested", "attack": attack}, "threat": {"eps": 0.2}})
    assert provenance.parameters(run)["algorithm.attack.step_size"] == pytest.approx(0.3)


def test_tags_say_what_runs_are_searched_by() -> None:
    run = as_run(None, ["algorithm=dynamic", "threat.norm=l2", "threat.eps=0.5", "seed=3"])
    tags = provenance.tags(run)
    assert {name: tags[name] for name in ("algorithm", "data", "threat", "seed")} == {
        "algorithm": "dynamic",
        "data": "digits",
        "threat": "l2 0.5",
        "seed": "3",
    }
    assert tags["signature"] == run.signature()
    assert tags["hardware"] and tags["python"] and tags["torch_version"] and tags["ray_version"]
    assert all(isinstance(value, str) for value in tags.values())


def test_the_commit_of_an_image_is_that_of_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_COMMIT", "c0ffee")
    inside = tmp_path / "inside"
    commit = repository(inside)
    for folder, expected in ((tmp_path, "c0ffee"), (inside, commit)):
        monkeypatch.chdir(folder)
        assert provenance.tags(as_run(None))["git_commit"] == expected


def test_the_commit_is_a_tag_inside_a_repository_and_absent_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    commit = repository(inside)
    found = {}
    for folder in (outside, inside):
        monkeypatch.chdir(folder)
        found[folder] = provenance.tags(as_run(None))
    assert "git_commit" not in found[outside]
    assert found[inside]["git_commit"] == found[inside]["mlflow.source.git.commit"] == commit
    assert "git_dirty" not in found[inside]
