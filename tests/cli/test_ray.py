"""Sweeps and workers end to end: the real command in folders of their own, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raytrain.config.request import as_run, read_yaml
from raytrain.core.types import RequestError, TrainingFailed
from raytrain.distributed.ray_session import concurrent_trials, session, socket_folder

pytestmark = [
    pytest.mark.ray,
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
]

SPACE = """
base:
  data: {name: digits, train_size: 128}
  algorithm: {name: pgd, steps: 1}
  epochs: 3
  batch_size: 64
  evaluation: {steps: 1}
space:
  optimizer.lr: {float: [0.01, 0.2], log: true}
search: {sampler: random, pruner: none}
budget: {trials: TRIALS, concurrent: 1}
"""
RAISES_LATER = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear, self.calls = nn.Linear(64, classes), 0

    def forward(self, x):
        self.calls += self.training and len(x) > 2
        if self.calls > 1:
            raise ValueError("tired")
        return self.linear(x.flatten(1))

def net(num_classes):
    return Net(num_classes)
"""
ENDED = {"FINISHED", "FAILED", "KILLED"}

# Ctrl-C reaches the command also where the tests themselves run in the background.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from raytrain.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    """Ray's own files: the path of a socket may have 107 characters, fewer than pytest's folders."""
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(folder: Path, ray_folder: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The real command at work in `folder`; what is left of it in the end is killed."""
    outside = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")
    clean = {name: value for name, value in os.environ.items() if name not in outside}
    if "PYTHONDONTWRITEBYTECODE" in os.environ:  # or every process compiles all of torch anew
        clean["PYTHONPYCACHEPREFIX"] = f"{ray_folder}/compiled"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        cwd=folder,
        env={**clean, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def ended(folder: Path, ray_folder: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The real command, from beginning to end."""
    with started(folder, ray_folder, *words) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def wait_for_trial(number: int, stderr: IO[str] | None) -> None:
    """Return once so many trials have ended."""
    assert stderr is not None
    said = []
    for line in stderr:
        said.append(line)
        if line.startswith(f"trial {number}/"):
            return
    raise AssertionError("the sweep ended early: " + "".join(said))


def space_in(folder: Path, trials: int) -> str:
    file = folder / "tiny.yaml"
    file.write_text(SPACE.replace("TRIALS", str(trials)))
    return str(file)


def trials_of(folder: Path, name: str) -> list[FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / "runs" / "raytrain" / name / "study.log"
    storage = JournalStorage(JournalFileBackend(str(file)))
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def runs_of(folder: Path) -> tuple[list[Run], list[Run]]:
    """Parents and children in the folder's own store."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


# --- a sweep that is left alone ---------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, ray_folder: str
) -> tuple[Path, dict[str, Any]]:
    """A finished sweep of three trials: its folder, and what the command said of it."""
    folder = tmp_path_factory.mktemp("sweep")
    done = ended(folder, ray_folder, "tune", space_in(folder, 3), "--name", "s", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return folder, json.loads(line)


def test_a_sweep_ends_with_one_parent_whose_children_have_all_finished(
    sweep: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = sweep
    (parent,), children = runs_of(folder)
    assert (parent.info.run_id, parent.info.status) == (told["run_id"], "FINISHED")
    assert [run.info.status for run in children] == ["FINISHED"] * 3
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.run_id for run in children} == {
        told["run_ids"][trial["handle"]] for trial in told["trials"]
    }


def test_a_sweep_meets_its_budget_in_the_study(sweep: tuple[Path, dict[str, Any]]) -> None:
    folder, told = sweep
    trials = trials_of(folder, "s")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    values = {t["number"]: t["values"] for t in told["trials"]}
    assert values == {t.number: [t.value] for t in trials}


def test_the_rows_of_a_trial_are_the_same_in_the_study_and_in_mlflow(
    sweep: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = sweep
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for trial in trials_of(folder, "s"):
        run_id = told["run_ids"][f"t{trial.number:04d}"]
        history = client.get_metric_history(run_id, "valid/robust")
        assert {point.step: point.value for point in history} == trial.intermediate_values
        assert sorted(trial.intermediate_values) == [1, 2, 3]


def test_the_best_configuration_of_a_sweep_reads_back_as_a_run(
    sweep: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = sweep
    run = as_run(told["best_file"])
    assert run.optimizer.lr == told["best"]["params"]["optimizer.lr"]
    assert told["best"]["values"] == max(trial["values"] for trial in told["trials"])
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    tags = client.get_run(told["run_ids"][told["best"]["handle"]]).data.tags
    assert tags["signature"] == run.signature()
    assert read_yaml(Path(told["space_file"]))["name"] == "tiny"


def test_the_best_trial_of_a_sweep_can_be_evaluated_by_the_id_of_its_run(
    sweep: tuple[Path, dict[str, Any]],
) -> None:
    import raytrain

    folder, told = sweep
    store = f"sqlite:///{folder / 'mlflow.db'}"
    result = raytrain.evaluate(
        told["run_ids"][told["best"]["handle"]],
        {"attacks": "pgd", "steps": 1, "tracking_uri": store},
        storage=folder / "runs",
    )
    assert result.run_id == told["run_ids"][told["best"]["handle"]]
    run = MlflowClient(store).get_run(told["run_ids"][told["best"]["handle"]])
    assert run.data.metrics["test/pgd1"] == result.accuracies["pgd1"].value
    assert run.info.status == "FINISHED"


def test_a_sweep_leaves_no_name_behind_when_mlflow_does_not_answer(
    tmp_path: Path, ray_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = "tracking_uri=http://127.0.0.1:9"
    done = ended(tmp_path, ray_folder, "tune", space_in(tmp_path, 3), nowhere, "--name", "s")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("raytrain: tracking_uri: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "raytrain" / "s").exists()


# --- sweeps that are not ----------------------------------------------------------------------


def test_a_sweep_whose_driver_was_killed_resumes_without_repeating_a_trial(
    tmp_path: Path, ray_folder: str
) -> None:
    space = space_in(tmp_path, 7)
    with started(tmp_path, ray_folder, "tune", space, "--name", "s") as process:
        wait_for_trial(3, process.stderr)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    before = {t.number: t for t in trials_of(tmp_path, "s") if t.state.is_finished()}
    assert 3 <= len(before) < 7

    again = ended(tmp_path, ray_folder, "tune", "--resume", "s", "--json")
    assert again.returncode == 0, again.stderr
    trials = trials_of(tmp_path, "s")
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == 7
    assert {t.number: (t.params, t.value) for t in trials if t.number in before} == {
        number: (t.params, t.value) for number, t in before.items()
    }
    assert len({trial.params["optimizer.lr"] for trial in complete}) == 7

    (parent,), children = runs_of(tmp_path)
    assert parent.info.status == "FINISHED"
    finished = {run.data.tags["trial"]: run for run in children}
    assert {run.info.status for run in children} == {"FINISHED"} and len(children) == 7
    for trial in complete:
        metrics = finished[f"t{trial.user_attrs['origin']:04d}"].data.metrics
        assert metrics["valid/robust"] == trial.value
    assert json.loads(again.stdout.splitlines()[-1])["run_id"] == parent.info.run_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_sweep_with_status_130_and_no_run_left_running(
    number: signal.Signals, tmp_path: Path, ray_folder: str
) -> None:
    space = space_in(tmp_path, 200)
    with started(tmp_path, ray_folder, "tune", space, "--name", "s") as process:
        wait_for_trial(2, process.stderr)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err and "interrupted" in err.splitlines()[-1]
    (parent,), children = runs_of(tmp_path)
    assert parent.info.status == "KILLED"
    assert len(children) >= 2 and {run.info.status for run in children} <= ENDED
    complete = [t for t in trials_of(tmp_path, "s") if t.state == TrialState.COMPLETE]
    assert 2 <= len(complete) < 200


def test_a_signal_while_ray_starts_ends_a_sweep_that_can_be_resumed(
    tmp_path: Path, ray_folder: str
) -> None:
    sessions = Path(ray_folder, "ray")
    before = set(sessions.glob("session_2*"))
    with started(tmp_path, ray_folder, "tune", space_in(tmp_path, 1), "--name", "s") as process:
        while process.poll() is None and set(sessions.glob("session_2*")) == before:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert len(err.splitlines()) == 1
    again = ended(tmp_path, ray_folder, "tune", "--resume", "s")
    assert again.returncode == 0, again.stderr
    assert [trial.state for trial in trials_of(tmp_path, "s")] == [TrialState.COMPLETE]


# --- several workers --------------------------------------------------------------------------


def test_two_workers_train_what_one_worker_trains(tmp_path: Path, ray_folder: str) -> None:
    words = (
        "data.train_size=128",
        "epochs=2",
        "evaluation.steps=1",
        "batch_size=64",
        "algorithm.steps=2",
        "model=small_cnn_nobn",
        "device=cpu",
    )
    told = []
    for workers in (1, 2):
        done = ended(tmp_path, ray_folder, "train", *words, f"workers={workers}", "--json")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        told.append(json.loads(line))
    one, two = told
    assert one["signature"] == two["signature"]
    for name in set(one["metrics"]) - {"cost/seconds"}:
        # float32: the sum over a batch is taken in another order.
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3, abs=1e-3), (
            name
        )
    runs, _ = runs_of(tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_signal_ends_a_training_of_two_workers_that_can_be_resumed(
    tmp_path: Path, ray_folder: str
) -> None:
    words = ("data.train_size=128", "evaluation.steps=1", "device=cpu")
    with started(tmp_path, ray_folder, "train", *words, "workers=2", "epochs=200") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("epoch 1/200")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err and "interrupted" in err.splitlines()[-1]
    (run,), _ = runs_of(tmp_path)
    assert run.info.status == "KILLED"
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    reached = [p.step for p in store.get_metric_history(run.info.run_id, "cost/fe")]
    more = (f"epochs={max(reached) + 3}", "workers=1")
    again = ended(tmp_path, ray_folder, "train", "--resume", run.info.run_id, *words, *more)
    assert again.returncode == 0, again.stderr
    (run,), _ = runs_of(tmp_path)
    steps = [p.step for p in store.get_metric_history(run.info.run_id, "cost/fe")]
    assert (run.info.status, steps) == ("FINISHED", list(range(1, max(reached) + 4)))


def test_what_the_users_network_raises_in_a_worker_is_on_the_screen_at_once(
    tmp_path: Path, ray_folder: str
) -> None:
    (tmp_path / "mine.py").write_text(RAISES_LATER)
    words = ("data.train_size=128", "evaluation.steps=1", "device=cpu", "model=mine:net")
    told = [
        ended(tmp_path, ray_folder, "train", *words, f"workers={workers}") for workers in (1, 2)
    ]
    assert [done.returncode for done in told] == [1, 1]
    one, two = (re.sub(r"\d+ images", "images", done.stderr.splitlines()[-1]) for done in told)
    assert one == two and "mine.py:" in one and "ValueError" in one and "tired" in one
    runs, _ = runs_of(tmp_path)
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


# --- how Ray starts, without starting it -------------------------------------------------------


def test_a_folder_that_is_too_long_for_sockets_is_replaced_by_a_short_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    assert socket_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long/" * 17)
    folder = socket_folder()
    assert folder is not None and len(folder) < 30 and Path(folder).parent.is_dir()


def test_a_start_that_takes_too_long_is_tried_again_and_then_explained(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def slow(**settings: Any) -> None:
        calls.append(settings)
        if len(calls) < failures + 1:
            raise Exception("The current node timed out during startup. This could happen.")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failures = 2
    with session(as_run(None)):
        assert len(calls) == 3
    assert capsys.readouterr().err.count("trying again") == 2
    calls.clear()
    failures = 3
    with (
        pytest.raises(TrainingFailed, match="^Ray did not start .* 3 tries .*timed out"),
        session(as_run(None)),
    ):
        pass
    assert len(calls) == 3


# --- which cluster, without starting one ------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray would have been started with."""
    import ray

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda *_, **settings: made.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return made


def test_without_an_address_a_cluster_is_started_even_where_another_is_running(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with session(as_run(None, ["workers=2"]), trials=3):
        pass
    (settings,) = calls
    # Without an address Ray joins whatever `ray start` has left on this machine, and then refuses
    # to be told how many cores there are.
    assert settings["address"] == "local"
    assert settings["num_cpus"] >= 6


def test_with_an_address_that_cluster_is_joined(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with session(as_run(None)):
        pass
    assert calls[0]["address"] == "10.0.0.1:6379"
    assert "num_cpus" not in calls[0]


def test_an_address_where_nobody_answers_is_refused(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def nobody(**settings: Any) -> None:
        raise ConnectionError(f"no answer at {settings['address']}\nmore")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with (
        pytest.raises(RequestError, match=r"^RAY_ADDRESS: .*10\.0\.0\.1:6379") as caught,
        session(as_run(None)),
    ):
        pass
    assert "\n" not in str(caught.value) and calls == []


@pytest.mark.parametrize(
    ("words", "have", "wanted", "fit"),
    [
        ("workers=1", {"CPU": 4}, None, 4),
        ("workers=1", {"CPU": 4}, 3, 3),
        ("workers=2", {"CPU": 5}, None, 2),
        ("workers=2 cpus_per_worker=2", {"CPU": 5}, None, 1),
        ("workers=1", {"CPU": 16, "GPU": 2}, None, 2),
        ("workers=1 gpus_per_worker=0.25", {"CPU": 16, "GPU": 2}, None, 8),
        ("workers=1 device=cpu", {"CPU": 16, "GPU": 2}, None, 16),
        ("workers=3 batch_size=96", {"CPU": 2}, None, 0),
        ("workers=1 device=cuda", {"CPU": 2}, None, 0),
    ],
)
def test_trials_are_as_many_as_fit_the_cluster_and_none_is_refused(
    words: str,
    have: dict[str, float],
    wanted: int | None,
    fit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    run = as_run(None, words.split())
    if fit:
        assert concurrent_trials(run, wanted) == fit
        return
    with pytest.raises(RequestError, match=rf"^workers: {run.workers} workers of .* room for"):
        concurrent_trials(run, wanted)
