"""The documented names of metrics and tags are those that commands record."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from raytrain.commands import evaluate as evaluating
from raytrain.commands import sweep_results
from raytrain.commands.final import FinalRow, leave_finals
from raytrain.config.request import as_run
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share
from raytrain.tracking import provenance
from raytrain.tracking.vocabulary import README, SWEEP_METRICS, TAGS, TEST_METRICS, with_tables
from raytrain.tuning.budget import ENDED, SweepProgress, TrialRow
from raytrain.tuning.descriptions import sweep_tags
from raytrain.tuning.mlflow_runs import MlflowRuns
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import Budget


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

    def known(self, handle: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **more: True


@pytest.fixture
def in_a_changed_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_machine", provenance._machine.__wrapped__)
    monkeypatch.setattr(provenance, "_git", lambda *words: "abc")


def record_sweep(recorder: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of one trial and its final."""
    trial = TrialRow(0, "complete", (0.5,), {}, {"valid/robust": 0.5}, 1, "t0000")
    outcomes: dict[str, int] = dict.fromkeys(ENDED, 1)
    progress = SweepProgress(1, Budget(), outcomes, 0, 1.0, 1.0, None, trial, ())
    manager: Any = SimpleNamespace(
        folder=folder,
        journal=SimpleNamespace(write_parquet=lambda table: 0),
        progress=lambda: progress,
        best=lambda: trial,
        space=SimpleNamespace(run=lambda values: as_run(None)),
    )
    splits: Any = SimpleNamespace(valid=None)
    monkeypatch.setattr(sweep_results, "_drawn", lambda *args: [])
    monkeypatch.setattr(sweep_results, "leave_network", lambda *args: None)
    sweep_results.leave(recorder, manager, splits, [])
    leave_finals(recorder, folder, [FinalRow(1, 0, 3, 0.9, 0.01, 0.5, 0.01, "aa", 23.0)])


def record_evaluation(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(0.5, 0.4, 0.6, 1, 2)
    result = evaluating.EvalResult(
        scope="test",
        accuracies={"clean": share, "ATTACK": share},
        findings=(Finding("range", True, "", 0.0),),
        images=2,
        file=Path(),
        folder=Path(),
        run_id="id",
    )
    monkeypatch.setattr(evaluating, "own_tracker", lambda *args: nullcontext(recorder))
    anything: Any = None
    evaluating._log(result, as_run(None), "id", Path(), anything)


def test_the_tables_in_the_readme_are_those_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert text.count("\n| `") > len(TAGS)
    assert with_tables(text.replace("| `kind` |", "| `sort` |")) == text


def test_every_tag_that_is_written_is_documented_and_the_other_way_round(
    in_a_changed_repository: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder: Any = Recorder()
    runs = MlflowRuns(recorder, "s", tmp_path)
    runs.begin("t0000", as_run(None), {})
    runs.stopped("t0000", "early_stop: 3 validations without a gain")
    runs.end("t0000", "failed", "why")
    record_sweep(recorder, tmp_path, monkeypatch)
    record_evaluation(recorder, monkeypatch)
    recorder.tag("sweep", sweep_tags(SearchSpace(name="s"), "s"))
    others = {"mlflow.source.git.commit", "torch_version", "ray_version"}
    assert recorder.tags - others == TAGS.keys()


def test_the_metrics_of_sweeps_and_evaluations_are_the_documented_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder: Any = Recorder()
    record_sweep(recorder, tmp_path, monkeypatch)
    by_outcome = {f"sweep/{outcome}" for outcome in ENDED}
    assert by_outcome < recorder.metrics
    own = recorder.metrics - by_outcome - {"valid/robust"}
    assert own == SWEEP_METRICS.keys() - {"sweep/OUTCOME"}
    recorder.metrics.clear()
    record_evaluation(recorder, monkeypatch)
    assert recorder.metrics == TEST_METRICS.keys()


@pytest.mark.parametrize(
    ("tag", "values"), [("outcome", ENDED), ("kind", get_args(provenance.Kind))]
)
def test_the_values_of_a_tag_are_the_documented_ones(tag: str, values: tuple[str, ...]) -> None:
    assert set(re.findall(r"`(\w+)`", TAGS[tag])) == set(values)
