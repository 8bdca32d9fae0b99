"""Whatever dies at whatever moment, a sweep loses nothing, repeats nothing and leaves nothing open."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sweep_helpers import FakeTracker, Store

from raytrain.config.request import as_run
from raytrain.distributed.jobs import Job
from raytrain.tracking import stores
from raytrain.tuning.mlflow_runs import MlflowRuns
from raytrain.tuning.trainable import SingleTrainable
from raytrain.tuning.trial_rows import RowLog

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
faults: Any = importlib.import_module("faults")  # scripts, no package
faults_audit: Any = importlib.import_module("faults_audit")
ended = faults_audit.ended

pytestmark = [
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

# --- a row that is told twice is there once ---------------------------------------------------


def slot_of(folder: Path, resume: bool) -> SingleTrainable:
    run = as_run(
        {"data": {"name": "digits", "train_size": 64}, "epochs": 3, "batch_size": 32},
        ["algorithm.steps=1", "evaluation.steps=1", "device=cpu"],
    )
    return SingleTrainable({"job": Job.of(run, folder, resume)})


def test_a_resumed_trial_begins_with_the_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    slot = slot_of(tmp_path, resume=False)
    first, second = slot.train(), slot.train()
    again = slot_of(tmp_path, resume=True)
    told = [again.train(), again.train()]
    assert [row["metrics"] for row in told] == [first["metrics"], second["metrics"]]
    assert [row["epoch"] for row in told] == [1, 2] and not told[1]["done"]
    assert [again.train()["epoch"], slot.train()["epoch"]] == [3, 3]
    ended = slot_of(tmp_path, resume=True)
    told = [ended.train() for _ in range(3)]
    assert [(row["epoch"], row["done"]) for row in told] == [(1, False), (2, False), (3, True)]
    assert told[-1]["final"]


def test_a_row_is_kept_before_the_checkpoint_of_its_epoch(tmp_path: Path) -> None:
    slot = slot_of(tmp_path, resume=False)
    slot.train()
    first = (tmp_path / "last.pt").read_bytes()
    second = slot.train()
    (tmp_path / "last.pt").write_bytes(first)  # killed in between
    again = slot_of(tmp_path, resume=True)
    told = [again.train() for _ in range(4)]
    assert [row["epoch"] for row in told] == [1, 2, 2, 3]
    assert told[1]["metrics"] == second["metrics"]


def test_a_new_trial_is_told_nothing_of_an_earlier_one_in_its_folder(tmp_path: Path) -> None:
    slot_of(tmp_path, resume=False).train()
    assert slot_of(tmp_path, resume=False).train()["epoch"] == 1


def test_a_row_that_mlflow_has_is_not_logged_again_but_may_be_added_to(tmp_path: Path) -> None:
    store = Store()
    mirror = MlflowRuns(FakeTracker(store), "sweep", tmp_path)
    mirror.begin("t0000", as_run(None), {})
    for epoch in (1, 2, 2, 1, 3):
        mirror.row("t0000", {"valid/robust": 0.5}, epoch)
    mirror.note("t0000", {"population/from": 1.0}, 3)
    assert store.rows["t0000"] == [1, 2, 3, 3]


# --- a run that was made twice is there once --------------------------------------------------


class Repeated:
    """A client whose requests are repeated on the way, as MLflow's own does after a late answer."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def create_run(self, *what: Any, **more: Any) -> Any:
        self._client.create_run(*what, **more)
        return self._client.create_run(*what, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_of_a_run_whose_making_was_repeated_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores.Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "tests")
    real = store.client
    store.client = Repeated(real)
    monkeypatch.setattr(stores, "LATE", -1.0)  # every answer is
    made = [store.create(f"s/{n}", {"ms": 1, "name": n, "tags": {}}, None) for n in ("t0", "t1")]
    left = [run.info.run_id for run in real.search_runs([store.experiment_id])]
    assert sorted(left) == sorted(made)
    assert [store.find(key) for key in ("s/t0", "s/t1", "s/t2")] == [*made, None]


# --- the audit sees what it is there to see ---------------------------------------------------

NAME = faults.NAME


@dataclass
class Left:
    """What a sweep of two trials of two epochs leaves, all in order."""

    folder: Path
    client: MlflowClient
    uri: str

    @property
    def study(self) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(self.folder / "study.log")))
        return optuna.create_study(study_name=NAME, storage=storage, load_if_exists=True)

    def ask(self, origin: int, lr: float) -> optuna.Trial:
        study = self.study
        study.enqueue_trial({"lr": lr}, user_attrs={"origin": origin})
        trial = study.ask()
        trial.suggest_float("lr", 0.0, 1.0)
        return trial

    def end(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("last", {"epoch": 2})
        trial.set_user_attr("outcome", "complete")
        self.study.tell(trial.number, 0.5)

    def rows(self, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        file = self.folder / "rows.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        change(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, trial: int) -> str:
        (found,) = (run for run in self.runs() if run.data.tags.get("trial") == f"t{trial:04d}")
        return found.info.run_id

    def runs(self) -> list[Run]:
        (experiment,) = self.client.search_experiments(filter_string="name = 'raytrain'")
        return list(self.client.search_runs([experiment.experiment_id]))

    def again(self, trial: int) -> None:
        run = self.client.get_run(self.run(trial))
        copy = self.client.create_run(run.info.experiment_id, tags=run.data.tags)
        self.client.set_terminated(copy.info.run_id)


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left") / "raytrain" / NAME
    folder.mkdir(parents=True)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    left = Left(folder, MlflowClient(uri), uri)
    journal = RowLog(folder / "rows.jsonl")
    experiment = left.client.create_experiment("raytrain", (folder / "mlruns").as_uri())
    parent = left.client.create_run(experiment)
    left.client.set_terminated(parent.info.run_id)
    for number in range(2):
        trial = left.ask(number, 0.1 * (number + 1))
        tags = {"mlflow.parentRunId": parent.info.run_id, "trial": f"t{number:04d}"}
        run = left.client.create_run(experiment, tags={**tags, "outcome": "complete"})
        for epoch in (1, 2):
            journal.add(number, trial.number, epoch, epoch / 2, {}, {"valid/robust": 0.5})
            left.client.log_metric(run.info.run_id, "valid/robust", 0.5, 1, epoch)
        left.client.set_terminated(run.info.run_id)
        left.end(trial)
    journal.write_parquet(folder / "trials.parquet")
    return folder


@pytest.fixture
def left(in_order: Path, tmp_path: Path) -> Left:
    folder = Path(shutil.copytree(in_order, tmp_path / "raytrain" / NAME))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return Left(folder, MlflowClient(uri), uri)


def violations(left: Left, seen: dict[int, Any]) -> set[str]:
    outcomes, found = faults_audit.audit(
        left.folder, left.folder / "study.log", NAME, left.uri, 2, seen
    )
    assert sum(outcomes.values()) == len(ended(left.folder / "study.log", NAME))
    return {name for name, count in found.items() if count}


def late(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[-1], "time": rows[-1]["time"] + 60_000})


SPOILT: dict[str, Callable[[Left], Any]] = {
    "finished trials lost or changed": lambda left: left.end(left.ask(0, 0.3)),
    "trials that ended twice or went on after their end": lambda left: left.end(left.ask(0, 0.3)),
    "configurations tried twice": lambda left: left.end(left.ask(2, 0.1)),
    "trials beside the budget": lambda left: left.end(left.ask(2, 0.3)),
    "attempts left open in the study": lambda left: left.ask(2, 0.3),
    "epochs recorded after the end of their trial": lambda left: left.rows(late),
    "epochs missing in the rows": lambda left: left.rows(lambda rows: rows.pop(0)),
    "rows missing or doubled in the table": lambda left: left.rows(lambda rows: rows.pop(0)),
    "rows missing in MLflow": lambda left: left.rows(
        lambda rows: rows.insert(1, {**rows[1], "epoch": 3})
    ),
    "metric points of another value": lambda left: left.rows(
        lambda rows: rows[0].update({"valid/robust": 0.25})
    ),
    "metric points doubled": lambda left: left.client.log_metric(
        left.run(0), "valid/robust", 0.5, 2, 1
    ),
    "MLflow runs missing": lambda left: left.client.delete_run(left.run(1)),
    "MLflow runs doubled": lambda left: left.again(1),
    "MLflow runs of no trial": lambda left: left.client.set_tag(left.run(1), "trial", "t0007"),
    "MLflow runs left RUNNING": lambda left: left.client.update_run(left.run(1), "RUNNING"),
    "MLflow runs that ended otherwise than their trial": lambda left: left.client.set_tag(
        left.run(0), "outcome", "stopped"
    ),
    "parent runs beside the one": lambda left: left.client.create_run(
        left.runs()[0].info.experiment_id
    ),
}


def test_the_audit_finds_nothing_where_all_is_in_order(left: Left) -> None:
    assert violations(left, ended(left.folder / "study.log", NAME)) == set()


@pytest.mark.parametrize("violation", SPOILT)
def test_the_audit_finds_each_violation(left: Left, violation: str) -> None:
    seen = ended(left.folder / "study.log", NAME)
    SPOILT[violation](left)
    assert violation in violations(left, seen)


# --- the whole of it --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 8, 20, 21])
def test_every_kind_of_fault_comes_as_often_as_any_other(count: int) -> None:
    kinds = faults.order(count, random.Random(1))
    assert len(kinds) == count
    assert {kinds.count(kind) - count // 4 for kind in faults.KINDS} <= {0, 1}


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_survives_the_death_of_each_of_its_parts() -> None:
    story, outcomes, found = faults.sweep(faults=4, trials=8, seed=0)
    assert sorted(story.faults) == sorted(faults.KINDS)
    assert sum(outcomes.values()) == 8 == story.result["progress"]["finished"]
    assert {name: count for name, count in found.items() if count} == {}
