"""Signals to a sweep and to a training of several workers."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState
from ray_helpers import ended, ended_here, runs_of, space_in, started, trials_of, wait_for_trial

pytestmark = [
    pytest.mark.ray,
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

ENDED = {"FINISHED", "FAILED", "KILLED"}


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
    assert out == "" and "Traceback" not in err
    assert "interrupted" in err.splitlines()[-2]
    assert err.splitlines()[-1] == "raytrain tune --resume s"
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
    assert "interrupted" in err and err.splitlines()[1:] == ["raytrain tune --resume s"]
    again = ended(tmp_path, ray_folder, "tune", "--resume", "s")
    assert again.returncode == 0, again.stderr
    assert [trial.state for trial in trials_of(tmp_path, "s")] == [TrialState.COMPLETE]


def test_a_signal_ends_a_training_of_two_workers_that_can_be_resumed(
    tmp_path: Path, ray_folder: str
) -> None:
    words = ("data.train_size=128", "evaluation.steps=1", "device=cpu")
    with started(tmp_path, ray_folder, "train", *words, "workers=2", "epochs=200") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("training: ")
        while "of training" in (line := process.stderr.readline()):
            pass  # within the epoch, on a slow machine
        assert line.startswith("epoch 1/200")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err and "interrupted" in err.splitlines()[-2]
    (run,), _ = runs_of(tmp_path)
    assert run.info.status == "KILLED"
    assert err.splitlines()[-1] == f"raytrain train --resume {run.info.run_id[:8]}"
    store = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    reached = [p.step for p in store.get_metric_history(run.info.run_id, "cost/fe")]
    more = (f"epochs={max(reached) + 3}", "workers=1")
    again = ended_here(tmp_path, "train", "--resume", run.info.run_id, *words, *more)
    assert again.exit_code == 0, again.output
    (run,), _ = runs_of(tmp_path)
    steps = [p.step for p in store.get_metric_history(run.info.run_id, "cost/fe")]
    assert (run.info.status, steps) == ("FINISHED", list(range(1, max(reached) + 4)))
