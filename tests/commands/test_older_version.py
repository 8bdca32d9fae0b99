"""Runs, a sweep and an MLflow database of an earlier version: resumed, evaluated and compared."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray_helpers import runs_of, trials_of

import raytrain
from raytrain.commands.compare import compare
from raytrain.commands.sweep_status import SweepStatus

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "older_version.tar.xz"
MADE_IN = "/tmp/raytrain-fixture"
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "tags": "value",
    "logged_models": "artifact_location",
}
NAMES = ("pgd-digits-21537a", "ssds-digits-93ab41")


@pytest.fixture
def older(here: Path) -> Path:
    """The folder of the earlier version, moved here; the working folder of the test."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(here, filter="data")
    folder = here / "runs" / "raytrain"
    for file in (*folder.glob("*/run.yaml"), *folder.glob("s/mlflow.*")):
        file.write_text(file.read_text().replace(MADE_IN, str(here)))
    database = sqlite3.connect(here / "mlflow.db")
    for table, column in LOCATIONS.items():
        change = f"update {table} set {column} = replace({column}, ?, ?)"
        database.execute(change, (MADE_IN, str(here)))
    database.commit()
    database.close()
    return here


def run_id(folder: Path, name: str) -> str:
    (found,) = (run.info.run_id for run in runs_of(folder)[0] if run.info.run_name == name)
    return found


def test_the_status_of_a_sweep_has_its_cost_from_its_rows_and_no_time(older: Path) -> None:
    found = raytrain.status("s")
    assert isinstance(found, SweepStatus)
    assert found.progress.fe_per_image == 10.0 and found.progress.seconds is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_evaluated_and_goes_on_as_its_own_version_would(older: Path, name: str) -> None:
    expected = json.loads((older / "expected.json").read_text())[name]
    run = run_id(older, name)
    evaluated = raytrain.evaluate(run, {"attacks": "pgd", "steps": 2})
    found = {key: share.value for key, share in evaluated.accuracies.items()}
    resumed = raytrain.train(resume=run, overrides={"epochs": 2})
    assert (resumed.run_id, evaluated.run_id) == (run, run)
    for key, value in expected.items():
        assert {**resumed.metrics, **found}[key] == pytest.approx(value, rel=1e-4), key
    history = MlflowClient(resumed.tracking_uri).get_metric_history(run, "cost/fe")
    assert [point.step for point in history] == [1, 2]


def test_the_runs_are_compared(older: Path) -> None:
    comparison = compare(NAMES)
    (comparable,) = comparison.comparables
    assert comparison.runs == 2
    assert len(comparable.rows) == 2
    assert comparison.report.is_file()


@pytest.mark.ray
def test_a_sweep_goes_on_without_repeating_a_trial(
    older: Path, ray_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    before = {trial.number: trial for trial in trials_of(older, "s")}
    result = raytrain.tune(resume="s", trials=3)
    after = {trial.number: trial for trial in trials_of(older, "s")}
    assert sorted(before) == [0, 1] and sorted(after) == [0, 1, 2]
    assert {number: after[number] for number in before} == before
    assert result.progress.finished == 3
    _, children = runs_of(older)
    assert [run.info.status for run in children] == ["FINISHED"] * 3

    frame = result.frame()
    assert frame.index.tolist() == [0, 1, 2]
    values = [after[number].value for number in frame.index]
    assert frame[result.objectives[0]].tolist() == values
    assert [result.run_ids[f"t{number:04d}"] for number in frame.index] == list(frame["run_id"])
    assert min(frame["cost/fe_per_sample"]) > 0
    assert result.best is not None and f"best    {result.best.handle}: " in repr(result)
    evaluated = raytrain.evaluate(result, attacks=["fgsm"], images=20, checks=False)
    assert evaluated.run_id == result.run_ids[result.best.handle]
    assert compare(result).runs == 3
