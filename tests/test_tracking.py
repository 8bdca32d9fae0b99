"""MLflow holds what the tracker was told: every row, in order, every run ended."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from raytrain import provenance, tracking
from raytrain.config import RunConfig
from raytrain.data.catalogue import SOURCES
from raytrain.loop import build_model
from raytrain.request import as_run
from raytrain.tracking import Status, Tracker, fetch, tracking_uri
from raytrain.types import RequestError

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
def tracker(store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.05)
    made = Tracker(store, "tests")
    yield made
    made.shut("KILLED")


def status(tracker: Tracker, run_id: str) -> str:
    return str(reader(tracker).get_run(run_id).info.status)


def reader(tracker: Tracker) -> MlflowClient:
    """A client of its own, so that only what is in the store is seen."""
    return MlflowClient(tracker.uri)


def history(tracker: Tracker, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in reader(tracker).get_metric_history(run_id, metric)]


class Refusing:
    """A client whose `log_batch` and `set_terminated` fail while `away`, and which notes what it does."""

    def __init__(self, client: Any, times: int = 0) -> None:
        self._client, self.times = client, times
        self.done: list[tuple[str, str, Any]] = []
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, run_id: str, **what: Any) -> None:
        self._answer()
        self._client.log_batch(run_id, **what)
        steps = [metric.step for metric in what.get("metrics", ())]
        self.done.append(("rows", run_id, steps))

    def set_terminated(self, run_id: str, status: str) -> None:
        self._answer()
        self._client.set_terminated(run_id, status)
        self.done.append(("end", run_id, status))

    def _answer(self) -> None:
        with self.lock:
            if self.times > 0:
                self.times -= 1
                raise ConnectionError("the store is away\nand will be back")


def refusing(tracker: Tracker, times: int = 0) -> Refusing:
    client = Refusing(tracker._client, times)
    tracker._client = client
    return client


# --- what is written --------------------------------------------------------------------------


def test_parameters_and_tags_are_those_given(tracker: Tracker) -> None:
    run_id = tracker.open("one", {"a.b": 1, "c": "x", "long": "y" * 9000}, {"t": "u"})
    data = reader(tracker).get_run(run_id).data
    assert (data.params["a.b"], data.params["c"], data.tags["t"]) == ("1", "x", "u")
    assert data.params["long"] == "y" * 6000
    assert reader(tracker).get_run(run_id).info.run_name == "one"


def test_more_parameters_than_a_batch_holds_are_all_written(tracker: Tracker) -> None:
    run_id = tracker.open("many", {f"p{i}": i for i in range(230)}, {})
    assert len(reader(tracker).get_run(run_id).data.params) == 230


def test_a_trial_is_a_child_of_its_sweep_in_the_same_experiment(tracker: Tracker) -> None:
    parent = tracker.open("sweep", {}, {})
    child = tracker.open("trial", {}, {}, parent=parent)
    found = reader(tracker).search_runs(
        [tracker.experiment_id], f"tags.mlflow.parentRunId = '{parent}'"
    )
    assert [run.info.run_id for run in found] == [child]
    assert "mlflow.parentRunId" not in reader(tracker).get_run(parent).data.tags


def test_every_row_is_in_the_store_with_its_step_after_a_flush(tracker: Tracker) -> None:
    run_id = tracker.open("rows", {}, {})
    for step in range(1, 21):
        tracker.log(run_id, {"loss": 1 / step, "cost/fe": step * 10.0}, step)
    assert tracker.flush()
    assert history(tracker, run_id, "loss") == [(step, 1 / step) for step in range(1, 21)]
    assert history(tracker, run_id, "cost/fe")[-1] == (20, 200.0)


def test_more_metrics_than_a_batch_holds_are_all_written(tracker: Tracker) -> None:
    run_id = tracker.open("wide", {}, {})
    for step in range(3):
        tracker.log(run_id, {f"m{i}": float(i) for i in range(500)}, step)
    assert tracker.flush()
    assert len(reader(tracker).get_run(run_id).data.metrics) == 500
    assert [step for step, _ in history(tracker, run_id, "m499")] == [0, 1, 2]


def test_logging_does_not_wait_for_the_store(tracker: Tracker) -> None:
    run_id = tracker.open("slow", {}, {})
    client, gate = refusing(tracker), threading.Event()
    written = client.log_batch

    def slow(run_id: str, **what: Any) -> None:
        assert gate.wait(30)
        written(run_id, **what)

    client.log_batch = slow  # type: ignore[method-assign]
    for step in range(5):
        tracker.log(run_id, {"loss": 0.0}, step)
    tracker.close(run_id, "FINISHED")
    assert client.done == []
    gate.set()
    assert tracker.flush()
    assert history(tracker, run_id, "loss") == [(step, 0.0) for step in range(5)]


def test_tags_set_later_and_text_and_files_are_in_the_store(
    tracker: Tracker, tmp_path: Path
) -> None:
    run_id = tracker.open("artifacts", {}, {})
    tracker.tag(run_id, {"outcome": "complete"})
    tracker.text(run_id, "epochs: 3\n", "run.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    tracker.artifact(run_id, tmp_path / "folder", "more")
    tracker.artifact(run_id, tmp_path / "folder" / "a.txt")
    assert tracker.flush()
    assert reader(tracker).get_run(run_id).data.tags["outcome"] == "complete"
    assert fetch(tracker.uri, run_id, "run.yaml", tmp_path / "got").read_text() == "epochs: 3\n"
    assert {f.path for f in reader(tracker).list_artifacts(run_id, "more")} == {"more/a.txt"}


def test_artifacts_lie_beside_the_database(tracker: Tracker) -> None:
    run_id = tracker.open("where", {}, {})
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent / "mlruns"
    uri = reader(tracker).get_run(run_id).info.artifact_uri
    assert str(uri).startswith(folder.as_uri())


# --- how runs end -----------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_the_status_it_is_closed_with(tracker: Tracker, ended: Status) -> None:
    run_id = tracker.open("ends", {}, {})
    assert status(tracker, run_id) == "RUNNING"
    tracker.close(run_id, ended)
    assert tracker.flush()
    assert status(tracker, run_id) == ended
    assert reader(tracker).get_run(run_id).info.end_time is not None


@pytest.mark.parametrize("ended", ["FAILED", "KILLED"])
def test_shutting_ends_what_is_open_and_leaves_what_was_closed(store: str, ended: Status) -> None:
    tracker = Tracker(store, "tests")
    closed, one, two = (tracker.open(name, {}, {}) for name in ("closed", "one", "two"))
    tracker.close(closed, "FINISHED")
    tracker.log(one, {"loss": 1.0}, 3)
    tracker.shut(ended)
    assert [status(tracker, run_id) for run_id in (closed, one, two)] == ["FINISHED", ended, ended]
    assert history(tracker, one, "loss") == [(3, 1.0)]
    assert not any(thread is tracker._thread for thread in threading.enumerate())


def test_the_end_of_a_run_comes_after_its_rows(tracker: Tracker) -> None:
    client = refusing(tracker)
    runs = [tracker.open(f"r{i}", {}, {}) for i in range(3)]
    client.done.clear()
    for step in range(4):
        for run_id in runs:
            tracker.log(run_id, {"loss": 0.0}, step)
    for run_id in runs:
        tracker.close(run_id, "FINISHED")
    assert tracker.flush()
    for run_id in runs:
        mine = [(kind, what) for kind, of, what in client.done if of == run_id]
        assert mine[-1] == ("end", "FINISHED")
        assert sum((what for kind, what in mine if kind == "rows"), []) == [0, 1, 2, 3]


def test_a_run_is_reopened_at_the_last_epoch_it_has(tracker: Tracker) -> None:
    run_id = tracker.open("again", {}, {})
    assert tracker.reopen(run_id) == 0
    for step in (1, 2, 3):
        tracker.log(run_id, {"cost/fe": 10.0 * step}, step)
    tracker.close(run_id, "KILLED")
    assert tracker.flush()
    assert tracker.reopen(run_id) == 3
    assert status(tracker, run_id) == "RUNNING"


def test_a_run_that_is_reopened_at_once_keeps_running_and_knows_its_rows(tracker: Tracker) -> None:
    run_id = tracker.open("at once", {}, {})
    tracker.log(run_id, {"cost/fe": 10.0}, 1)
    tracker.close(run_id, "FAILED")  # only queued: a lost trial is begun again right away
    assert tracker.reopen(run_id) == 1
    assert tracker.flush()
    assert status(tracker, run_id) == "RUNNING"


# --- a store that is away ---------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_store_that_is_away_for_a_while_loses_nothing_and_keeps_the_order(
    tracker: Tracker, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tracker.open(f"away{i}", {}, {}) for i in range(2)]
    client = refusing(tracker, times)
    for step in range(1, 7):
        for run_id in runs:
            tracker.log(run_id, {"loss": float(step)}, step)
        if step == 3:
            tracker.flush(0.2)
    for run_id in runs:
        tracker.close(run_id, "FINISHED")
    assert tracker.flush()
    for run_id in runs:
        assert history(tracker, run_id, "loss") == [(step, float(step)) for step in range(1, 7)]
        assert status(tracker, run_id) == "FINISHED"
        mine = [kind for kind, of, _ in client.done if of == run_id]
        assert mine.index("end") == len(mine) - 1
    assert "the store is away" in capsys.readouterr().err


def test_a_tag_for_a_store_that_is_away_does_not_end_the_sweep(tracker: Tracker) -> None:
    run_id = tracker.open("tagged", {}, {})
    refusing(tracker, 2)
    tracker.tag(run_id, {"outcome": "stopped"})
    tracker.close(run_id, "FINISHED")
    assert tracker.flush()
    assert reader(tracker).get_run(run_id).data.tags["outcome"] == "stopped"
    assert status(tracker, run_id) == "FINISHED"


def test_a_run_that_is_refused_does_not_hold_up_the_others(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, fine = tracker.open("gone", {}, {}), tracker.open("fine", {}, {})
    reader(tracker).delete_run(gone)
    tracker.log(gone, {"loss": 1.0}, 1)
    tracker.log(fine, {"loss": 2.0}, 1)
    tracker.close(fine, "FINISHED")
    tracker.flush(1.0)
    assert status(tracker, fine) == "FINISHED"
    assert history(tracker, fine, "loss") == [(1, 2.0)]
    reader(tracker).restore_run(gone)
    assert tracker.flush()
    assert history(tracker, gone, "loss") == [(1, 1.0)]
    assert "MLflow at" in capsys.readouterr().err


def test_what_could_not_be_written_is_said_in_one_line(
    tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = tracker.open("never", {}, {})
    client = refusing(tracker, 10**9)
    tracker.log(run_id, {"loss": 1.0}, 1)
    assert not tracker.flush(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("raytrain: MLflow at ") for line in lines)
    assert "could not be written" in lines[-1]
    client.times = 0


def test_a_complaint_that_nobody_reads_any_more_does_not_end_the_writing(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

    run_id = tracker.open("unread", {}, {})
    refusing(tracker, 2)
    monkeypatch.setattr(sys, "stderr", Gone())
    tracker.log(run_id, {"loss": 1.0}, 1)
    assert tracker.flush(10.0)
    assert history(tracker, run_id, "loss") == [(1, 1.0)]


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
        Tracker(uri, "tests")
    said = str(caught.value)
    assert said.startswith("tracking_uri: ") and uri in said and "\n" not in said


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(RequestError, match=r"^tracking_uri: "):
        Tracker(f"sqlite:///{file}", "tests")


def test_a_deleted_experiment_is_refused(tracker: Tracker, store: str) -> None:
    client = reader(tracker)
    client.delete_experiment(client.create_experiment("buried"))
    with pytest.raises(RequestError, match=r"^experiment: 'buried' was deleted"):
        Tracker(store, "buried")


def test_an_artifact_that_is_not_there_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.open("bare", {}, {})
    for wanted in (run_id, "0" * 32):
        with pytest.raises(RequestError, match=rf"^{wanted}: MLflow at .* has no best.pt"):
            fetch(tracker.uri, wanted, "best.pt", tmp_path / "got")


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
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(store.removeprefix("sqlite:///")).parent
    monkeypatch.chdir(folder)
    tracker = Tracker("sqlite:///mlflow.db", "moved")
    run_id = tracker.open("moved", {}, {})
    monkeypatch.chdir(tmp_path)
    tracker.log(run_id, {"loss": 1.0}, 1)
    tracker.text(run_id, "x", "x.txt")
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
    run_id = tracker.open("network", {}, {})
    before = mlflow.get_tracking_uri()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    if active:
        mlflow.set_tracking_uri(tracker.uri)
        mlflow.start_run(experiment_id=tracker.experiment_id)
    try:
        tracker.model(run_id, network, images[:2].numpy())
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


def test_the_commit_is_a_tag_inside_a_repository_and_absent_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provenance._machine.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    try:
        assert "git_commit" not in provenance.tags(as_run(None))
    finally:
        provenance._machine.cache_clear()


def test_the_name_of_a_run_tells_algorithm_data_and_configuration() -> None:
    run = as_run(None, ["data=images/faces.parquet", "algorithm=n_fgsm"])
    assert provenance.describe(run) == f"n_fgsm-faces-{run.signature()[:6]}"
    assert isinstance(run, RunConfig)
