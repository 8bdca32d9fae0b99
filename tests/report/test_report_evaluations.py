"""What a comparison makes of evaluations that are damaged, odd or out of reach."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.evaluation.confidence import wilson
from raytrain.evaluation.previous import Earlier
from raytrain.evaluation.record import RECORD
from raytrain.report.evaluations import read_evaluations

RECORDED: dict[str, Any] = {
    "scope": "test",
    "images": 400,
    "checkpoint": "best",
    "same_contract": True,
    "contract": {"norm": "linf", "eps": 0.1, "hash": "c1", "text": "linf"},
    "accuracies": {"clean": asdict(wilson(390, 400)), "pgd20": asdict(wilson(300, 400))},
    "findings": [{"check": "range", "passed": True, "sentence": "Fine.", "value": 0.0}],
    "trusted": True,
    "key": {"images": "digest"},
}


class Store:
    """MLflow with one evaluation."""

    def __init__(self, folder: Path, record: Any, away: bool = False) -> None:
        self.folder, self.away = folder / "evaluation" / "test", away
        self.folder.mkdir(parents=True)
        text = record if isinstance(record, str) else json.dumps(record)
        (self.folder / RECORD).write_text(text)

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        if self.away:
            raise ConnectionError("no route")
        return [SimpleNamespace(path=f"{path}/test", is_dir=True)]

    def download_artifacts(self, run_id: str, path: str, to: str) -> str:
        return str(self.folder)


def read(
    tmp_path: Path, record: Any, away: bool = False, **metrics: float
) -> tuple[Any, list[str]]:
    """The evaluations of a run with these metrics of the scope `test`, and what was complained of."""
    told = {"images": 400.0, "clean": 0.9, "pgd20": 0.5, **metrics}
    data = SimpleNamespace(metrics={f"test/{name}": value for name, value in told.items()})
    run = SimpleNamespace(data=data, info=SimpleNamespace(run_id="r", run_name="mine"))
    complaints: list[str] = []
    store = Store(tmp_path, record, away)
    found = read_evaluations(store, run, tmp_path / "fetched", complaints.append)
    return found, complaints


def test_files_are_of_one_evaluation_and_metrics_may_be_of_several(tmp_path: Path) -> None:
    (found,), complaints = read(tmp_path, RECORDED, aa=0.7)
    assert {name: share.value for name, share in found.accuracies.items()} == {
        "clean": 0.975,
        "pgd20": 0.75,
    }
    assert found.findings and found.test_set == "digest" and complaints == []


@pytest.mark.parametrize(
    "change",
    [
        {"contract": "linf"},
        {"findings": None},
        {"findings": [{"check": "range"}]},
        {"accuracies": {"clean": {"count": 0, "images": 0}}},
        {"accuracies": [1]},
        {"key": None},
    ],
)
def test_a_record_that_is_not_as_it_should_be_is_told_and_left_out(
    change: dict[str, Any], tmp_path: Path
) -> None:
    found, complaints = read(tmp_path, {**RECORDED, **change})
    assert found == () and len(complaints) == 1 and "mine: test is not as" in complaints[0]


def test_metrics_stand_in_where_no_file_can_be_read_and_are_not_checked(tmp_path: Path) -> None:
    odd: Any = {"loss": 2.3, "aa": float("nan")}
    (found,), complaints = read(tmp_path / "cut", json.dumps(RECORDED)[:50], **odd)
    assert (
        set(found.accuracies) == {"clean", "pgd20"} and not found.findings and len(complaints) == 1
    )
    (found,), complaints = read(tmp_path / "away", RECORDED, away=True, **odd)
    assert set(found.accuracies) == {"clean", "pgd20"} and not found.findings
    assert "cannot be fetched" in complaints[0]


# --- what a new evaluation takes over from an earlier one ------------------------------------------


KEY = {"weights": "w", "images": "i", "contract": "c", "batch_size": 250, "seed": 0}
BROKEN = {"check": "black_box", "passed": False, "sentence": "No.", "value": 0.1}


def earlier(folder: Path, key: dict[str, Any], **changes: Any) -> None:
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(
        json.dumps(
            {**RECORDED, "key": key, "findings": [*RECORDED["findings"], BROKEN], **changes}
        )
    )


@pytest.mark.parametrize("part", KEY)
def test_a_failed_check_is_remembered_of_the_same_network_only(part: str, tmp_path: Path) -> None:
    earlier(tmp_path / "test", {**KEY, part: "another"})
    found = Earlier.of(tmp_path / "test", KEY)
    kept = [] if part in ("weights", "images", "contract") else ["black_box"]
    assert [finding.check for finding in found.findings] == kept
    assert found.flags is None and found.shares is None


def test_checks_that_failed_on_other_images_are_told_with_where(tmp_path: Path) -> None:
    earlier(tmp_path / "test_1000", KEY)
    earlier(tmp_path / "test_linf-0.4", KEY, same_contract=False)
    (tmp_path / "test_2").mkdir()
    (tmp_path / "test_2" / RECORD).write_text("{")
    assert Earlier.failed_beside(tmp_path / "test") == ["black_box (test_1000)"]
    assert Earlier.failed_beside(tmp_path / "test_1000") == []
