"""Runs and evaluations that are made up, and evaluations written by hand beside real runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from PIL import Image

from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import wilson
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.runs import Curve, Trained

IMAGES = 100.0
CONTRACT = "linf eps 0.1 in [0, 1], normaliser inside, BatchNorm eval"


def flags_of(columns: Mapping[str, Sequence[bool] | np.ndarray], first: int = 0) -> pa.Table:
    """A table of flags; labels are the image's number modulo 10."""
    count = len(next(iter(columns.values())))
    index = np.arange(first, first + count)
    made = {name: np.asarray(values, dtype=bool) for name, values in columns.items()}
    return pa.table({"index": index, "label": index % 10, **made})


def contract_of(hash: str = "c1", text: str = CONTRACT) -> dict[str, Any]:
    """As in a record."""
    return {"norm": "linf", "eps": 0.1, "hash": hash, "text": text}


def finding(passed: bool, check: str = "range") -> Finding:
    """The result of a check."""
    return Finding(check, passed, "why")


def evaluated(
    flags: pa.Table | None = None,
    shares: Mapping[str, tuple[int, int]] | None = None,
    **changes: Any,
) -> EvaluatedRun:
    """An evaluation under the run's own threat model; `shares` are counts and images."""
    if flags is not None:
        names = [name for name in flags.column_names if name not in ("index", "label")]
        shares = {n: (int(np.sum(flags[n].to_numpy(False))), len(flags)) for n in names}
    told = {name: wilson(*pair) for name, pair in (shares or {}).items()}
    values: dict[str, Any] = {
        "scope": "test",
        "checkpoint": "best",
        "contract": contract_of(),
        "accuracies": told,
        "images": next(iter(told.values())).images,
        "flags": flags,
    }
    return EvaluatedRun(**{**values, **changes})


def trained(
    name: str = "pgd",
    seed: int = 0,
    cost: float = 230.0,
    robust: Sequence[float] = (0.3, 0.5),
    evaluations: Sequence[EvaluatedRun] = (),
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    **changes: Any,
) -> Trained:
    """A run of one row per value of `robust`, `cost` FE per training image in all."""
    epochs = range(1, len(robust) + 1)
    share = {epoch: epoch / len(robust) for epoch in epochs}
    fe: Curve = {epoch: cost * IMAGES * share[epoch] for epoch in epochs}
    curves = {
        "valid/robust": dict(zip(epochs, map(float, robust), strict=True)),
        "cost/fe": fe,
        "cost/samples": {epoch: IMAGES * epoch for epoch in epochs},
    }
    curves = {metric: curve for metric, curve in curves.items() if curve}
    flat = {"algorithm.name": name, "data.name": "digits", "threat.norm": "linf"}
    flat |= {"threat.eps": "0.1", "batch_size": "10", "seed": str(seed)}
    flat |= {key: str(value) for key, value in (params or {}).items()}
    values: dict[str, Any] = {
        "id": f"{name}-{seed}-{sorted((params or {}).items())}",
        "name": f"{name} of seed {seed}",
        "began": seed,
        "status": "FINISHED",
        "params": flat,
        "tags": {"contract": "c1", "contract_text": CONTRACT, **(tags or {})},
        "metrics": {metric: curve[max(curve)] for metric, curve in curves.items()},
        "curves": curves,
        "evaluations": tuple(evaluations),
    }
    return Trained(**{**values, **changes})


def write_evaluation(
    client: MlflowClient,
    run_id: str,
    folder: Path,
    flags: pa.Table,
    scope: str = "test",
    failed: str = "",
    contract: tuple[str, str] = ("c1", CONTRACT),
    same: bool = True,
) -> None:
    """What `raytrain evaluate` leaves on a run."""
    names = [name for name in flags.column_names if name not in ("index", "label")]
    counts = {name: int(np.sum(flags[name].to_numpy(False))) for name in names}
    told = {
        "scope": scope,
        "checkpoint": "last" if scope.startswith("test_last") else "best",
        "epoch": 1,
        "contract": contract_of(*contract),
        "same_contract": same,
        "images": len(flags),
        "accuracies": {n: asdict(wilson(k, len(flags))) for n, k in counts.items()},
        "findings": [{"check": failed or "range", "passed": not failed, "sentence": "why"}],
        "trusted": not failed,
    }
    target = folder / run_id / scope
    target.mkdir(parents=True)
    pq.write_table(flags, target / "flags.parquet")
    (target / "evaluation.json").write_text(json.dumps(told))
    pq.write_table(pa.Table.from_pylist(_examples()), target / "examples.parquet")
    client.log_artifacts(run_id, str(target), f"evaluation/{scope}")
    for name, count in counts.items():
        client.log_metric(run_id, f"{scope}/{name}", count / len(flags))
    client.log_metric(run_id, f"{scope}/images", float(len(flags)))
    if same:
        client.set_tag(run_id, "contract", contract[0])
        client.set_tag(run_id, "contract_text", contract[1])
        client.set_tag(run_id, "checks", f"FAILED: {failed}" if failed else "passed")


def _examples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pictures = ("image", "adversarial", "perturbation")
    return [
        {
            "index": k,
            "label": k,
            "predicted": k,
            "attacked": (k + k % 2) % 10,
            "attack": "pgd20",
            **{name: _png(rng.random((8, 8))) for name in pictures},
            "distance": 0.1,
        }
        for k in range(4)
    ]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).astype("uint8")).save(buffer, "PNG")
    return buffer.getvalue()
