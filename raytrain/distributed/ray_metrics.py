"""Metrics of a driver through Ray, which exports them to Prometheus with its own.

Ray writes `ray_` before each name. What it measures itself (GPUs, memory, object store) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain.training.progress import RateLimit

TAGS = ("sweep", "experiment")  # a training on Ray has its name as `sweep`
OUTCOME = "outcome"
GAUGES = {
    "raytrain_trials": "trials that ended, by outcome",
    "raytrain_running_trials": "trials under way",
    "raytrain_best_objective": "the first objective of the best trial",
    "raytrain_images_per_second": "images trained on per second, over all trials under way",
    "raytrain_fe_per_image": "forward-equivalents per training image that were spent",
    "raytrain_outbox_records": "records that MLflow has not received",
}
"""Every metric, without Ray's prefix, and what it means."""

_SECONDS = 5.0  # at least, between two settings; Ray reports as often


class DriverMetrics:
    """The metrics of one sweep, or of one training, for the time of a Ray session."""

    def __init__(self, sweep: str, experiment: str) -> None:
        from ray.util.metrics import Gauge

        tags = dict(zip(TAGS, (sweep, experiment), strict=True))
        self._due, self._gauges = RateLimit(_SECONDS), dict[str, Any]()
        for name, about in GAUGES.items():
            keys = (*TAGS, OUTCOME) if name == "raytrain_trials" else TAGS
            self._gauges[name] = Gauge(name, description=about, tag_keys=keys)
            self._gauges[name].set_default_tags(tags)

    def set(
        self,
        values: Mapping[str, float | None],
        outcomes: Mapping[str, int] | None = None,
    ) -> None:
        """Set the gauges with these names (`raytrain_` left out), except those that are None.

        Does nothing if that was done a moment ago.
        """
        if not self._due():
            return
        for name, value in values.items():
            if value is not None:
                self._gauges[f"raytrain_{name}"].set(value)
        for outcome, count in (outcomes or {}).items():
            self._gauges["raytrain_trials"].set(count, {OUTCOME: outcome})
