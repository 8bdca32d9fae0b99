"""The status of sweeps and trainings, read beside their driver, after it, and on another machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from sweep_helpers import METRIC, SPACE, Launch, diverged, row, space_of
from typer.testing import CliRunner

from raytrain import status
from raytrain.cli.app import app
from raytrain.commands import observed
from raytrain.commands.sweep_status import SweepStatus
from raytrain.commands.training_status import TrainingStatus
from raytrain.config.request import as_run
from raytrain.core import storage
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.storage import local_root, push
from raytrain.tracking import run_names, stores
from raytrain.tracking.outbox import Outbox
from raytrain.training.run_folder import LAST, ROWS, write_run_file
from raytrain.tuning import launch as launches
from raytrain.tuning.launch import launched
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.sweep_storage import OUTBOX

ONE = "ab" * 16  # the id of a run
TUNED: dict[str, Any] = {
    "sampler": "pbt",
    "population": {"size": 2, "interval": 1},
    "pruner": None,
}


def sweep_in(folder: Path, space: SearchSpace | None = None) -> Launch:
    """A driver of a sweep in `folder`, with the file that names it; it has trained nothing yet."""
    space = space_of() if space is None else space
    driver = Launch(folder, space=space)
    shown = space.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(shown))
    return driver


@contextmanager
def at_work(driver: Launch, ends: bool = True) -> Iterator[Outbox]:
    """The driver's outbox and its record in the study; killed at the end of the block if not `ends`."""
    outbox = Outbox(driver.folder / OUTBOX, "sqlite:////store.db", "raytrain")
    record = launched(driver.manager.study, 0.0)
    record.__enter__()
    try:
        yield outbox
    except BaseException as error:
        with suppress(type(error)):
            record.__exit__(type(error), error, None)
        outbox.close()
        raise
    begun = driver.manager.study.user_attrs["launch"]
    record.__exit__(None, None, None)
    if not ends:
        driver.manager.study.set_user_attr("launch", begun)
    outbox.close()


def seen(name: str = "last", **where: Any) -> SweepStatus:
    found = status(name, **where)
    assert isinstance(found, SweepStatus)
    return found


def later(patch: pytest.MonkeyPatch, seconds: float) -> None:
    patch.setattr(observed, "time", SimpleNamespace(time=lambda: time.time() + seconds))


def files_in(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.fixture
def folder(here: Path) -> Path:
    return here / "runs" / "raytrain" / "mine"


def test_a_running_sweep_is_what_its_driver_displays_and_nothing_is_written(folder: Path) -> None:
    driver = sweep_in(folder)
    with at_work(driver) as outbox:
        driver.complete("a", 0.1, 0.5)
        driver.begin("b")
        driver.manager.end("b", diverged("nan"), lost=False)
        driver.begin("c")
        driver.manager.row("c", {**row(1, 0.3), "progress": 0.25})
        driver.begin("lost")
        driver.manager.row("lost", row(1, 0.2))
        driver.manager.end("lost", None, lost=True)  # queued again
        outbox.append({"do": "open", "run": "sweep", "parent": None})
        before = files_in(folder)
        found, progress = seen("mine"), driver.manager.progress()
        assert files_in(folder) == before
    assert replace(found.progress, seconds=0.0, seconds_left=None) == replace(
        progress, seconds=0.0, seconds_left=None
    )
    assert found.trials == driver.manager.history.rows() and found.best == driver.manager.best()
    assert progress.running and progress.retries == 1 and progress.fe_per_image > 0
    assert found.progress.seconds_left is not None and found.objectives == [METRIC]
    assert (found.state, found.here, found.waiting) == ("running", True, 1)
    assert found.tracking_uri == "sqlite:////store.db"
    assert found.next["watch"] == "watch -n 10 raytrain status mine"
    assert found.row is not None and found.row < 100 and set(found.next) == {"watch", "ui"}


def test_members_of_a_population_have_the_values_they_are_trained_with(folder: Path) -> None:
    space = space_of(search=TUNED, budget={"trials": 2})
    driver = sweep_in(folder, space)
    for tune_id, value in (("a", 0.1), ("b", 0.9)):
        driver.begin(tune_id)
        paused = {**row(1, value), "progress": 0.25, "done": True}
        driver.manager.end(tune_id, paused, lost=False)
    for name in (LAST, ROWS):
        for handle in ("t0000", "t0001"):
            (folder / "trials" / handle / f"at1-{name}").write_text("x")
    driver.begin("c")
    found = seen("mine")
    assert found.progress.running == driver.manager.progress().running
    assert (folder / "population.jsonl").is_file()  # one goes on from the other


def test_a_killed_driver_of_this_machine_is_seen_at_once(folder: Path) -> None:
    driver = sweep_in(folder)
    with at_work(driver, ends=False):
        driver.begin("a")
        driver.manager.row("a", row(1, 0.3))
        assert seen("mine").state == "running"
    found = seen("mine")
    assert (found.state, found.here) == ("interrupted", False)
    assert found.next["continue"] == "raytrain tune --resume mine"
    assert found.progress.seconds_left is None and len(found.progress.running) == 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_driver_that_ends_says_how(folder: Path, error: type[BaseException] | None) -> None:
    driver = sweep_in(folder)
    with suppress(ValueError, KeyboardInterrupt), at_work(driver):
        driver.complete("a", 0.1, 0.5)
        if error is not None:
            raise error
    found = seen("mine")
    assert found.state == ("finished" if error is None else "interrupted")
    more = {"more_trials": "raytrain tune --resume mine --trials 21", "ui": found.next["ui"]}
    assert error is not None or found.next == more


def test_a_driver_of_another_machine_counts_as_dead_after_its_last_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = sweep_in(folder)
    monkeypatch.setattr(launches.socket, "gethostname", lambda: "far")
    with at_work(driver, ends=False):
        driver.begin("a")
        slow = row(1, 0.3)
        slow["metrics"] = json.dumps({**json.loads(slow["metrics"]), "cost/seconds": 200.0})
        driver.manager.row("a", slow)
    monkeypatch.undo()
    monkeypatch.chdir(folder.parents[2])
    assert (seen("mine").state, seen("mine").host, seen("mine").here) == ("running", "far", False)
    later(monkeypatch, 900)
    assert seen("mine").state == "running"  # within five epochs of this length
    later(monkeypatch, 1100)
    assert seen("mine").state == "interrupted"


def test_a_sweep_before_its_study_has_no_trials(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    outbox = Outbox(folder / OUTBOX, "sqlite:////store.db", "raytrain")
    found = seen("mine")
    outbox.close()
    assert (found.state, found.trials, found.row) == ("running", [], None)
    assert seen("mine").state == "interrupted" and not (folder / "study.log").exists()


def test_a_study_in_a_database_is_read_and_never_made(here: Path) -> None:
    url = f"sqlite:///{here / 'studies.db'}"
    folder = here / "runs" / "raytrain" / "s"
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(yaml.safe_dump({**SPACE, "study": url}))
    assert seen("s").trials == [] and not (here / "studies.db").exists()
    from raytrain.tuning.study import open_study

    space = space_of(study=url)
    study = open_study("s", folder, space, space.hash(), False, 4.0, url)
    trial = study.ask()
    trial.set_user_attr("origin", 0)
    before = files_in(here)
    assert [one.state for one in seen("s").trials] == ["running"]
    assert files_in(here) == before


def test_through_a_url_another_machine_sees_the_study_and_leaves_the_outbox_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (here / "store").as_uri()
    study = str(here / "study.log")
    monkeypatch.setenv(storage.CACHE, str(here / "first"))
    folder = local_root(url) / "raytrain" / "mine"
    driver = sweep_in(folder)
    with at_work(driver, ends=False):
        driver.complete("a", 0.1, 0.5)
        shutil.copy(folder / "study.log", study)
        stored = {**SPACE, "study": study}
        (folder / "space.yaml").write_text(yaml.safe_dump(stored))
        (folder.parent / "old").mkdir()
        (folder.parent / "old" / "space.yaml").write_text(yaml.safe_dump(stored))
        push(folder.parent / "old")
        os.utime(here / "store" / "raytrain" / "old" / "space.yaml", (1e9, 1e9))
        # The name of a study in a file of its own is that of experiment and sweep.
        text = Path(study).read_text()
        Path(study).write_text(text.replace('"study_name":"mine"', '"study_name":"raytrain/mine"'))
        push(folder)
        assert seen("mine", storage=url).here
        monkeypatch.setenv(storage.CACHE, str(here / "second"))
        found = seen("last", storage=url)
    assert (found.name, found.here, found.waiting) == ("mine", False, None)
    assert [one.state for one in found.trials] == ["complete"] and found.best is not None
    assert found.next["watch"].endswith(f"raytrain status mine storage={url}")
    second = local_root(url) / "raytrain" / "mine"
    assert [file.name for file in second.iterdir()] == ["space.yaml"]
    # Its own outbox, of an earlier launch, says nothing about the one of now.
    Outbox(second / OUTBOX, "sqlite:////other.db", "raytrain").close()
    found = seen("mine", storage=url)
    assert (found.waiting, found.state) == (None, "interrupted")
    assert found.tracking_uri != "sqlite:////other.db"


# --- names ------------------------------------------------------------------------------------


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, ["status", *words])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stdout == ""
    return line.removeprefix("raytrain: ")


def test_names_that_mean_nothing_or_several_are_refused_in_one_line(folder: Path) -> None:
    assert refused() == "last: there is no sweep or training below runs"
    sweep_in(folder)
    assert refused("mien").startswith("mien: no sweep or training below runs; the nearest is mine")
    assert refused("mine", "exp=x").startswith("exp: expected storage=, experiment=")
    assert "expected one of them" in refused("storage=a", "--storage", "b")
    sweep_in(folder.parents[1] / "other" / "mine")
    assert "other/mine and raytrain/mine; expected experiment= as well" in refused("mine")
    found = seen("mine", experiment="other")
    assert found.folder == folder.parents[1] / "other" / "mine"


def test_last_is_what_was_begun_last_and_a_trial_stands_for_its_sweep(folder: Path) -> None:
    sweep_in(folder)
    sweep_in(folder.with_name("newer"))
    os.utime(folder / "space.yaml", (1e9, 1e9))
    assert seen().name == "newer"
    os.utime(folder.with_name("newer") / "space.yaml", (1e8, 1e8))
    assert seen().name == "mine"
    trial = folder / "trials" / "t0000"
    write_run_file(as_run(None), trial)
    assert seen(str(trial)).folder == folder == seen(str(folder)).folder


# --- trainings --------------------------------------------------------------------------------


def epoch(number: int, final: bool = False) -> dict[str, Any]:
    report = EpochMetrics(number, 1.5, 2.0, 0.1, 0.1, 0.1, 0.05, 40, 20, 3.0)
    return asdict(replace(report, progress=number / 4, robust=0.5, final=final))


@pytest.fixture
def training(here: Path) -> Path:
    folder = here / "runs" / "raytrain" / ONE
    write_run_file(as_run(None, ["epochs=4"]), folder, ONE)
    return folder


def observed_training(name: str = "last") -> TrainingStatus:
    found = status(name)
    assert isinstance(found, TrainingStatus)
    return found


def test_a_training_is_as_far_as_its_last_row(training: Path) -> None:
    (training.parent / ".mlflow").mkdir()
    outbox = Outbox(training.parent / ".mlflow" / "1.jsonl", "http://store", "raytrain")
    outbox.append({"do": "open", "run": "run", "parent": None})
    outbox.named("run", ONE)
    assert (observed_training().state, observed_training().epoch) == ("running", 0)
    (training / ROWS).write_text(json.dumps([epoch(1), epoch(2)]))
    (training / LAST).touch()
    found = observed_training(ONE[:6])
    assert (found.epoch, found.epochs, found.share, found.waiting) == (2, 4, 0.5, 1)
    assert found.metrics["valid/robust"] == 0.5 and found.checkpoint is not None
    assert found.next["ui"] == f"raytrain ui {ONE[:8]} --uri http://store"
    outbox.close()
    assert observed_training().state == "interrupted"
    assert observed_training().next["continue"] == f"raytrain train --resume {ONE[:8]}"
    (training / ROWS).write_text(json.dumps([epoch(3), epoch(4, final=True)]))
    assert observed_training().state == "finished"


def test_a_training_behind_a_url_is_judged_by_its_last_change(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (here / "store").as_uri()
    monkeypatch.setenv(storage.CACHE, str(here / "first"))
    folder = local_root(url) / "raytrain" / ONE
    write_run_file(as_run(None, ["epochs=4"]), folder, ONE)
    (folder / ROWS).write_text(json.dumps([epoch(2)]))
    (folder / LAST).write_text("weights")
    push(folder)
    monkeypatch.setenv(storage.CACHE, str(here / "second"))
    for seconds, state in ((0, "running"), (179, "running"), (200, "interrupted")):
        later(monkeypatch, seconds)
        found = status(ONE[:8], storage=url)
        assert isinstance(found, TrainingStatus) and found.state == state
    assert found.epoch == 2 and found.checkpoint is not None and found.waiting is None
    assert not (found.folder / LAST).exists()
    assert found.next["continue"] == f"raytrain train --resume {ONE[:8]} storage={url}"


def test_a_name_that_only_mlflow_has_is_looked_up_there(
    here: Path, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no sweep or training" in refused("pgd-digits")  # there is no store
    (here / "mlflow.db").touch()
    run = SimpleNamespace(data=SimpleNamespace(tags={}), info=SimpleNamespace(run_id=ONE))
    monkeypatch.setattr(stores, "reader", lambda uri: uri)
    found = {"pgd-digits": [run], "two": [run, run]}
    monkeypatch.setattr(run_names, "matching", lambda client, word: found.get(word, []))
    assert observed_training("pgd-digits").folder == training
    assert "2 runs have this name" in refused("two")
    assert "no sweep or training" in refused("three")
    shutil.rmtree(training)
    assert "has no folder below storage" in refused("pgd-digits")


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_what_json_has(folder: Path, training: Path) -> None:
    driver = sweep_in(folder)
    with at_work(driver):
        driver.complete("a", 0.1, 0.5)
        driver.begin("b")
        text = CliRunner().invoke(app, ["status", "mine"])
        found = CliRunner().invoke(app, ["status", "mine", "--json"])
    assert text.exit_code == 0 and "1/4 trials" in text.stdout and "t0000 *" in text.stdout
    assert (
        "t0001" in text.stdout
        and "epoch 1" in text.stdout
        and "state       running" in text.stdout
    )
    values = json.loads(found.stdout)
    assert (values["kind"], values["state"], values["best"]["number"]) == ("sweep", "running", 0)
    assert values["progress"]["budget"]["trials"] == 4 and len(values["trials"]) == 2
    (training / ROWS).write_text(json.dumps([epoch(2)]))
    text = CliRunner().invoke(app, ["status", ONE])
    assert "2/4 epochs, 50% of training" in text.stdout and "valid/robust" in text.stdout


def test_neither_torch_nor_mlflow_is_imported() -> None:
    code = (
        "import sys, raytrain.cli.app, raytrain.cli.status, raytrain.commands.status\n"
        "print([name for name in ('torch', 'mlflow', 'ray', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
