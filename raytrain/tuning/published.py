"""The progress of a sweep as metrics of Ray."""

from __future__ import annotations

from collections.abc import Callable

from raytrain.distributed.ray_metrics import DriverMetrics
from raytrain.tracking import Tracker
from raytrain.tuning.budget import SweepProgress

Watch = Callable[[SweepProgress], None]


def publishing(metrics: DriverMetrics, tracker: Tracker, watch: Watch | None) -> Watch:
    """What sets the metrics and calls `watch`, for every progress."""

    def call(progress: SweepProgress) -> None:
        rates = [one.images_per_second for one in progress.running]
        metrics.set(
            {
                "running_trials": len(progress.running),
                "best_objective": None if progress.best is None else progress.best.value,
                "images_per_second": sum(rate for rate in rates if rate is not None),
                "fe_per_image": progress.fe_per_image,
                "outbox_records": tracker.waiting,
            },
            progress.outcomes,
        )
        if watch is not None:
            watch(progress)

    return call
