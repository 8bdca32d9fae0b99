"""Sweeps end to end: the command in folders of its own, left alone, or killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState
from ray_helpers import ended, runs_of, space_in, started, trials_of, wait_for_line, wait_for_trial

from raytrain.config.request import as_run, read_yaml
from raytrain.tracking import provenance

pytestmark = [
    pytest.mark.ray,
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
]


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


def test_the_run_of_a_sweep_has_what_its_best_trial_has_and_its_base_apart(
    sweep: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = sweep
    (parent,), children = runs_of(folder)
    best_id = told["run_ids"][told["best"]["handle"]]
    (best,) = [run for run in children if run.info.run_id == best_id]
    params, tags = parent.data.params, parent.data.tags
    assert {k: v for k, v in params.items() if not k.startswith("base.")} == best.data.params
    assert told["best"]["metrics"].items() <= parent.data.metrics.items()
    base = as_run(yaml.safe_load((folder / "runs/raytrain/s/space.yaml").read_text())["base"])
    flat = {f"base.{key}": str(value) for key, value in provenance.parameters(base).items()}
    assert {k: v for k, v in params.items() if k.startswith("base.")} == flat
    assert tags["signature"] == best.data.tags["signature"] and tags["kind"] == "sweep"
    assert told["again"] == "raytrain tune --resume s"
    assert f"experiments/{parent.info.experiment_id}/runs" in told["page"]


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


def test_a_sweep_whose_driver_was_killed_resumes_without_repeating_a_trial(
    tmp_path: Path, ray_folder: str
) -> None:
    space = space_in(tmp_path, 5)
    with started(tmp_path, ray_folder, "tune", space, "--name", "s") as process:
        wait_for_trial(2, process.stderr)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    before = {t.number: t for t in trials_of(tmp_path, "s") if t.state.is_finished()}
    assert 2 <= len(before) < 5

    again = ended(tmp_path, ray_folder, "tune", "--resume", "s", "--json")
    assert again.returncode == 0, again.stderr
    trials = trials_of(tmp_path, "s")
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == 5
    assert {t.number: (t.params, t.value) for t in trials if t.number in before} == {
        number: (t.params, t.value) for number, t in before.items()
    }
    assert len({trial.params["optimizer.lr"] for trial in complete}) == 5

    (parent,), children = runs_of(tmp_path)
    assert parent.info.status == "FINISHED"
    finished = {run.data.tags["trial"]: run for run in children}
    assert {run.info.status for run in children} == {"FINISHED"} and len(children) == 5
    for trial in complete:
        metrics = finished[f"t{trial.user_attrs['origin']:04d}"].data.metrics
        assert metrics["valid/robust"] == trial.value
    assert json.loads(again.stdout.splitlines()[-1])["run_id"] == parent.info.run_id


MINE = """
import time
from pathlib import Path

from torch import nn

from raytrain.algorithms import Nested
from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.core.card import Card


class Net(nn.Module):
    # Three passes a step; the fourth waits for a file.

    def __init__(self, classes):
        super().__init__()
        self.linear, self.calls = nn.Linear(64, classes), 0

    def forward(self, x):
        self.calls += len(x) == 64
        while self.calls > 3 and not Path(__file__).with_name("go").exists():
            time.sleep(0.01)
        return self.linear(x.flatten(1))


def net(num_classes):
    return Net(num_classes)


class Twice(Smoothed, Iterated):
    card = Card(paper="none", rule="PGD", cost="4 steps + 3 FE")

    def assemble(self, ball, outer):
        attack = self.attack().model_copy(update={"steps": 2 * self.steps})
        return Nested(ball, attack, outer, self.cross_entropy())
"""


ALL_LINES = """
import raytrain.cli.tune
raytrain.cli.tune._SECONDS_BETWEEN_LINES = 0.0
"""


def test_an_algorithm_of_the_user_is_swept_and_shown_within_its_first_epoch(
    tmp_path: Path, ray_folder: str
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    space = space_in(tmp_path, 2)
    words = ["algorithm=mine:Twice", "algorithm.steps=1", "model=mine:net", "--name", "s"]
    with started(tmp_path, ray_folder, "tune", space, *words, before=ALL_LINES) as process:
        # The middle of the first of two steps in three epochs.
        wait_for_line("1 running (epoch 1, 8.3% of training)", process.stderr)
        (tmp_path / "go").touch()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    _, children = runs_of(tmp_path)
    assert {run.data.params["algorithm.name"] for run in children} == {"mine:Twice"}
    # Two steps where one is given.
    assert {run.data.metrics["cost/fe_per_sample"] for run in children} == {2 * 2 + 3.0}
