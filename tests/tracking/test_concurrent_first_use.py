"""Several commands begin at once where there is nothing yet, and where another one was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import create_engine, insert

from raytrain.tracking.registry import ALIAS, ROBUST

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
]

COUNT = 3

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sqlalchemy import event
from sqlalchemy.engine import Engine
from mlflow import MlflowClient
from raytrain.tuning.study import check_name
from raytrain.tracking import Entry, tracked
from raytrain.tracking import tracker as trackers

number, folder, statements = int(sys.argv[1]), None, 0

def logged(uri, run_id, model, example):  # without the seconds that an export takes
    client = MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    return client.create_logged_model(experiment, source_run_id=run_id).model_id

trackers.log_network = logged

def record(folder):
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    outbox = folder / ".mlflow" / f"{number}.jsonl"
    with tracked(uri, "together", outbox, outbox.parent) as tracker:
        tracker.open("run", f"run {number}", {"number": number}, {})
        tracker.log("run", {"loss": 0.5}, 1)
        entry = Entry("m", "of it", "this", "j", f"w{number}", (7 * number % 5) / 10)
        tracker.model("run", None, np.zeros(1), entry)
    check_name("s", folder / "s", False, f"sqlite:///{folder / 'studies.db'}")

def die(at):
    @event.listens_for(Engine, "before_cursor_execute")
    def count(*_):
        global statements
        statements += 1
        if statements == at:
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
for line in sys.stdin:
    word, _, path = line.strip().partition(" ")
    if word == "die":
        die(300)
    record(Path(path))
    print("done", flush=True)
"""


class Child:
    """A process that has imported everything and waits for the word to begin."""

    def __init__(self, number: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def begin(self, word: str, folder: Path) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {folder}\n")
        self.process.stdin.flush()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Its status and what it complained of."""
        errors = self.process.communicate()[1]
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def children() -> Iterator[list[Child]]:
    """The last of them is the one that is killed."""
    made = [Child(number) for number in range(COUNT + 1)]
    assert [child.said() for child in made] == ["ready"] * len(made)
    yield made
    for child in made:
        child.process.kill()
        child.end()


def together(children: list[Child], folder: Path) -> None:
    """All but the last record a run each in `folder`, at once."""
    for child in children[:COUNT]:
        child.begin("record", folder)
    for child in children[:COUNT]:
        said = child.said()
        assert said == "done", child.end()


def found(folder: Path) -> dict[str, Any]:
    """What the store has in the end."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = {one.name: one.experiment_id for one in client.search_experiments()}
    runs = client.search_runs([experiments["together"]])
    versions = client.search_model_versions("name = 'm'")
    best = client.get_model_version_by_alias("m", ALIAS)
    return {
        "experiments": sorted(experiments),
        "runs": sorted((run.info.run_name, run.info.status) for run in runs),
        "rows": [run.data.metrics for run in runs],
        "versions": sorted(int(version.version) for version in versions),
        "best": max(float(v.tags[ROBUST]) for v in versions) == float(best.tags[ROBUST]),
        "files": sorted(os.listdir(folder)),
    }


WANTED = {
    "experiments": ["Default", "together"],
    "runs": [(f"run {number}", "FINISHED") for number in range(COUNT)],
    "rows": [{"loss": 0.5}] * COUNT,
    "versions": [*range(1, COUNT + 1)],
    "best": True,
    "files": ["mlflow.db", "studies.db"],
}


def test_commands_that_begin_at_once_in_an_empty_folder_record_a_run_each(
    children: list[Child], tmp_path: Path
) -> None:
    together(children, tmp_path)
    assert found(tmp_path) == WANTED


def test_a_command_that_is_killed_while_it_makes_the_tables_leaves_a_usable_database(
    children: list[Child], tmp_path: Path
) -> None:
    children[COUNT].begin("die", tmp_path)
    assert children[COUNT].end()[0] == -signal.SIGKILL
    assert (tmp_path / "mlflow.db").exists()
    together(children, tmp_path)
    assert found(tmp_path) == WANTED


def test_commands_that_begin_at_once_complete_the_tables_of_an_older_version(
    children: list[Child], tmp_path: Path
) -> None:
    of_an_older_version(f"sqlite:///{tmp_path / 'mlflow.db'}")
    together(children, tmp_path)
    assert found(tmp_path) == {**WANTED, "experiments": ["Default", "kept", "together"]}


def of_an_older_version(uri: str) -> None:
    """A database without the tables that the last versions of MLflow have added, and an experiment."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base, SqlExperiment

    engine = create_engine(uri)
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config(uri)
    older = [*ScriptDirectory.from_config(config).walk_revisions()][20].revision
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    with engine.begin() as connection:
        for number, name in enumerate(("Default", "kept")):
            connection.execute(
                insert(SqlExperiment).values(
                    experiment_id=number, name=name, lifecycle_stage="active"
                )
            )
    assert not utils._all_tables_exist(engine)
    engine.dispose()
