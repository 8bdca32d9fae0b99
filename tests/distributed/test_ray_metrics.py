"""The metrics of a driver, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from raytrain.commands.train import _publishing
from raytrain.config.request import as_run
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.distributed.ray_metrics import GAUGES, DriverMetrics
from raytrain.tuning.budget import Budget, Running, SweepProgress, TrialRow
from raytrain.tuning.published import publishing

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
OF_RAY = {
    "ray_node_cpu_utilization",
    "ray_node_disk_free",
    "ray_node_disk_usage",
    "ray_node_gpus_utilization",
    "ray_node_gram_available",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_object_store_memory",
}


class FakeGauge:
    """A gauge of Ray that keeps what it was set to, by name and tags."""

    values: dict[str, float] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self._tags = tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        tags = {**self._tags, **(tags or {})}
        assert set(tags) == set(self._keys)
        self.values[f"{self._name} {' '.join(tags.values())}"] = value


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(ray_metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(FakeGauge, "values", {})
    return FakeGauge.values


def progress(finished: int) -> SweepProgress:
    running = (Running(7, 1, 0.5, None, {}, 100.0), Running(8, 1, 0.5, None, {}, None))
    best = TrialRow(1, "complete", (0.5,), {}, {}, 4, "t0001")
    outcomes = {"complete": finished, "stopped": 2}
    budget = Budget(trials=9)
    return SweepProgress(finished + 2, budget, outcomes, 0, 11.0, 1.0, None, best, running)


def test_the_progress_of_a_sweep_is_set_by_sweep_and_experiment(gauges: dict[str, float]) -> None:
    seen: list[SweepProgress] = []
    tracker: Any = SimpleNamespace(waiting=3)
    publish = publishing(DriverMetrics("s", "e"), tracker, seen.append)
    publish(progress(4))
    first = dict(gauges)
    publish(progress(5))
    assert first == gauges  # a moment later: not set again
    assert first == {
        "raytrain_trials s e complete": 4,
        "raytrain_trials s e stopped": 2,
        "raytrain_running_trials s e": 2,
        "raytrain_best_objective s e": 0.5,
        "raytrain_images_per_second s e": 100.0,
        "raytrain_fe_per_image s e": 11.0,
        "raytrain_outbox_records s e": 3,
    }
    assert [one.outcomes["complete"] for one in seen] == [4, 5]
    assert {name.partition(" ")[0] for name in first} == set(GAUGES)


def test_a_training_on_ray_sets_its_own_and_one_without_ray_none(gauges: dict[str, float]) -> None:
    run, report = as_run(None), EpochMetrics(1, 1.5, 2.0, 0.1, 0.1, 0.1, 0.05, 40, 20, 3.0)
    tracker: Any = SimpleNamespace(waiting=3)
    splits: Any = SimpleNamespace(train=SimpleNamespace(num_images=10))
    _publishing(run, "n", False, splits, tracker)(report)
    assert gauges == {}
    _publishing(run, "n", True, splits, tracker)(replace(report, best=0.5))
    assert gauges == {
        "raytrain_best_objective n raytrain": 0.5,
        "raytrain_fe_per_image n raytrain": 4.0,
        "raytrain_outbox_records n raytrain": 3,
    }


def test_the_dashboard_shows_every_metric_there_is_and_no_other() -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    variables = [one["query"]["query"] for one in board["templating"]["list"][1:]]
    names = {name for query in [*queries, *variables] for name in re.findall(r"\bray_\w+", query)}
    assert names == OF_RAY | {f"ray_{name}" for name in GAUGES}
    source = {"type": "prometheus", "uid": "${datasource}"}
    drawn = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert all(target["datasource"] == source for one in drawn for target in one["targets"])
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_what_the_dashboard_takes_from_ray_is_what_ray_shows_itself() -> None:
    from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels as panels
    from ray.dashboard.modules.metrics.dashboards import train_dashboard_panels as train

    text = Path(panels.__file__).read_text() + Path(train.__file__).read_text()
    assert {name for name in OF_RAY if name not in text} == set()
