"""The evaluations of a run on the test set, read from MLflow's metrics and the files beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.evaluation.record import (
    EXAMPLES,
    FLAGS,
    FOLDER,
    RECORD,
    EvaluationRecord,
    metrics_by_scope,
)


class EvaluatedRun(EvaluationRecord):
    """One checkpoint on one test set under one threat model, with its tables."""

    flags: pa.Table | None = None
    examples: pa.Table | None = None

    @property
    def contract_hash(self) -> str:
        """Of the threat model; empty: that of the training."""
        return "" if self.contract is None else self.contract.hash

    @property
    def test_set(self) -> str:
        """A digest of the images, or of their labels if that is all there is."""
        digest = self.key.get("images", "")
        if digest or self.flags is None:
            return digest
        table = self.flags.sort_by("index")
        text = json.dumps([table["index"].to_pylist(), table["label"].to_pylist()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_evaluations(
    client: Any, run: Any, folder: Path, complain: Callable[[str], None]
) -> tuple[EvaluatedRun, ...]:
    """All evaluations of a run; damaged ones are left out and named to `complain`.

    Files are fetched into `folder`. Accuracies are those of the file, which is of one evaluation;
    metrics may be of several.
    """
    found = []
    for scope, metrics in metrics_by_scope(run.data.metrics).items():
        try:
            files = _fetched(client, run.info.run_id, scope, folder)
        except Exception as error:  # of any store; the metrics are here all the same
            complain(f"{run.info.run_name}: the files of {scope} cannot be fetched ({error})")
            files = None
        try:
            one = _evaluated(scope, metrics, files, complain, run)
        except ValueError as error:
            complain(
                f"{run.info.run_name}: {scope} is not as raytrain writes it ({error!r}); left out"
            )
            one = None
        if one is not None:
            found.append(one)
    return tuple(found)


def _fetched(client: Any, run_id: str, scope: str, folder: Path) -> Path | None:
    inside = f"{FOLDER}/{scope}"
    if inside not in {one.path for one in client.list_artifacts(run_id, FOLDER)}:
        return None
    target = folder / run_id
    target.mkdir(parents=True, exist_ok=True)
    return Path(client.download_artifacts(run_id, inside, str(target)))


def _evaluated(
    scope: str,
    metrics: Mapping[str, float],
    files: Path | None,
    complain: Callable[[str], None],
    run: Any,
) -> EvaluatedRun | None:
    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        if files is None or not (files / name).is_file():
            return None
        try:
            return reader(files / name)
        except (OSError, ValueError) as error:
            complain(f"{run.info.run_name}: {name} cannot be read ({error}); left out")
            return None

    recorded = read(RECORD, lambda file: json.loads(file.read_text()))
    if recorded is None:
        from_metrics = EvaluationRecord.from_metrics(scope, metrics)
        recorded = None if from_metrics is None else dict(from_metrics)
    if recorded is None:
        return None
    found = EvaluatedRun.model_validate(recorded)
    tables = {"flags": read(FLAGS, pq.read_table), "examples": read(EXAMPLES, pq.read_table)}
    return found.model_copy(update=tables) if found.accuracies else None
