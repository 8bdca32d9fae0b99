"""The documented names of metrics and tags are those that commands record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from git_helpers import repository
from sweep_helpers import METRIC, Launch, diverged, failed, row, space_of

from raytrain.commands import sweep_results
from raytrain.commands.evaluate import EvalResult, log_evaluation
from raytrain.commands.final import FinalRow, log_finals
from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import METRICS, EpochMetrics
from raytrain.data.loader import open_splits
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share
from raytrain.tracking import provenance
from raytrain.tracking.vocabulary import README, SWEEP_METRICS, TAGS, TEST_METRICS, with_tables
from raytrain.training.checkpoint import LAST, save
from raytrain.training.setup import start
from raytrain.tuning.budget import ENDED
from raytrain.tuning.descriptions import sweep_tags
from raytrain.tuning.mlflow_runs import MlflowRuns
from raytrain.tuning.space.search_space import SearchSpace


class Recorder:
    """In place of a tracker: the names that it is given."""

    def __init__(self) -> None:
        self.tags: set[str] = set()
        self.metrics: set[str] = set()

    def open(self, handle: str, name: str, params: Any, tags: dict[str, str], **more: Any) -> None:
        self.tags |= tags.keys()

    def tag(self, handle: str, tags: dict[str, str]) -> None:
        self.tags |= tags.keys()

    def log(self, handle: str, metrics: dict[str, float], step: int = 0) -> None:
        self.metrics |= metrics.keys()

    def result(
        self, handle: str, params: Any, metrics: dict[str, float], tags: dict[str, str]
    ) -> None:
        self.log(handle, metrics)
        self.tag(handle, tags)

    def known(self, handle: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **more: True


@pytest.fixture
def in_a_changed_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path / "changed", changed=True)
    monkeypatch.chdir(tmp_path / "changed")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A sweep with one trial of each outcome; the complete one has a checkpoint."""
    launch = Launch(tmp_path_factory.mktemp("sweep"), space=space_of(budget={"trials": 9}))
    launch.complete("complete", 0.5)
    broken = {"cost/fe": 10.0, METRIC: 0.3, "valid/robust_drop": 0.9}
    rows = {
        "stopped": row(1, 0.4),
        "infeasible": {**row(1, 0.3, final=True), "metrics": json.dumps(broken)},
        "diverged": diverged("the mean loss is nan"),
        "failed": failed("no network for 10 classes"),
    }
    for outcome, last in rows.items():
        launch.begin(outcome)
        launch.manager.end(outcome, last, lost=False)
    best = launch.manager.best()
    assert best is not None
    run, alone = launch.space.run(best.params), DistributedContext()
    state = start(run, open_splits(run.data, alone), alone)
    save(state, run, launch.folder / "trials" / best.handle / LAST, alone)
    return launch


@pytest.fixture(scope="module")
def of_the_sweep(sweep: Launch) -> Recorder:
    """What is recorded of the sweep on its own run, and of its final."""
    recorder: Any = Recorder()
    splits = open_splits(sweep.space.base_run.data, DistributedContext())
    weights = sweep_results.what_mattered(sweep.manager, "ped-anova")
    sweep_results.log_sweep(recorder, sweep.manager, splits, weights)
    final = FinalRow(1, 0, 3, 0.9, 0.01, 0.5, 0.01, "aa", 23.0)
    log_finals(recorder, sweep.folder, [final])
    return recorder


ROW = EpochMetrics(
    1, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 23, 1, 1.0, stopped_by="early_stop: ...", execution="eager"
)


def record_evaluation(recorder: Any, folder: Path) -> None:
    share = Share(0.5, 0.4, 0.6, 1, 2)
    result = EvalResult(
        scope="test",
        accuracies={"clean": share, "ATTACK": share},
        findings=(Finding("range", True, "", 0.0),),
        images=2,
        file=folder / LAST,
        folder=folder / "evaluation" / "test",
        run_id="id",
    )
    log_evaluation(recorder, result, "id", {})


def test_the_tables_in_the_readme_are_those_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert text.count("\n| `") > len(TAGS)
    assert with_tables(text.replace("| `kind` |", "| `sort` |")) == text


def test_every_tag_that_is_written_is_documented_and_the_other_way_round(
    in_a_changed_repository: None, of_the_sweep: Recorder, tmp_path: Path
) -> None:
    recorder: Any = Recorder()
    runs = MlflowRuns(recorder, "s", tmp_path)
    runs.begin("t0000", as_run(None, ["storage=elsewhere"]), {})
    runs.tag("t0000", ROW.tags())
    runs.end("t0000", "failed", "why")
    record_evaluation(recorder, tmp_path)
    recorder.tag("sweep", sweep_tags(SearchSpace(name="s"), "s"))
    others = {"mlflow.source.git.commit", "torch_version", "ray_version"}
    assert (recorder.tags | of_the_sweep.tags) - others == TAGS.keys()


def test_the_metrics_of_sweeps_and_evaluations_are_the_documented_ones(
    of_the_sweep: Recorder, tmp_path: Path
) -> None:
    by_outcome = {f"sweep/{outcome}" for outcome in ENDED}
    assert by_outcome < of_the_sweep.metrics
    own = of_the_sweep.metrics - by_outcome - METRICS.keys()
    assert own == SWEEP_METRICS.keys() - {"sweep/OUTCOME"}
    assert METRIC in of_the_sweep.metrics
    recorder: Any = Recorder()
    record_evaluation(recorder, tmp_path)
    assert recorder.metrics == TEST_METRICS.keys()


@pytest.mark.parametrize(
    ("tag", "values"), [("outcome", ENDED), ("kind", get_args(provenance.Kind))]
)
def test_the_values_of_a_tag_are_the_documented_ones(tag: str, values: tuple[str, ...]) -> None:
    assert set(re.findall(r"`(\w+)`", TAGS[tag])) == set(values)
