"""The command in a process of its own, and what it leaves in its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import IO

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from typer.testing import CliRunner, Result

from raytrain.cli.app import app

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
# Ctrl-C reaches the command also where the tests themselves run in the background.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from raytrain.__main__ import main
main()
"""


@contextmanager
def started(
    folder: Path, ray_folder: str, *words: str, before: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """The real command at work in `folder`, after `before`; what is left of it in the end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, *words],
        cwd=folder,
        env={**os.environ, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"},
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


def ended_here(folder: Path, *words: str) -> Result:
    """The command in this process, for what needs no Ray."""
    with chdir(folder):
        return CliRunner().invoke(app, words)


def wait_for_trial(number: int, stderr: IO[str] | None) -> None:
    """Return once so many trials have ended."""
    wait_for_line(f"trial {number}/", stderr)


def wait_for_line(part: str, stderr: IO[str] | None) -> None:
    """Return once a line has this part."""
    assert stderr is not None
    said = []
    for line in stderr:
        said.append(line)
        if part in line:
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
