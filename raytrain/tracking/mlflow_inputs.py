"""Data sets as inputs of runs, in MLflow's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

FIELDS = ("name", "digest", "source_type", "source", "schema", "profile")


def log_inputs(client: Any, run_id: str, inputs: Iterable[Mapping[str, str]]) -> None:
    """Log data sets, each with its `context`; one that the run has stays there once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    made = [
        DatasetInput(
            Dataset(**{field: given[field] for field in FIELDS}),
            [InputTag("mlflow.data.context", given["context"])],
        )
        for given in inputs
    ]
    client.log_inputs(run_id, datasets=made)
