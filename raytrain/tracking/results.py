"""A configuration on a run together with the metrics that it led to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytrain.tracking.stores import Store

BASE = "base."
"""Before the parameters of a sweep's base on the sweep's own run, whose plain ones are the best trial's."""


def log_result(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Log `params`, `metrics` and `tags` of a record, or none of them.

    MLflow never changes a parameter, so a run that has other ones keeps these and their metrics.
    """
    from mlflow.entities import Metric, Param, RunTag

    known = store.client.get_run(run_id).data.params
    own = {key: value for key, value in known.items() if not key.startswith(BASE)}
    if not own.items() <= record["params"].items():
        return
    metrics = [Metric(name, value, record["ms"], 0) for name, value in record["metrics"].items()]
    params = [Param(key, value) for key, value in record["params"].items()]
    tags = [RunTag(key, value) for key, value in record["tags"].items()]
    store.batch(run_id, [*params, *metrics, *tags])
