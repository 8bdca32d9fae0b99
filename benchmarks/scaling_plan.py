"""What 100, 1,000 and 10,000 trials need: GPU-hours, a bucket, and MLflow, by what raytrain really writes.

The size of a checkpoint is that of a file, MLflow's rows and requests are counted while a trial is recorded,
and the driver's time per trial is that of scale.parquet. The time of a step is the model's, with its
assumptions.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scaling_model import FE, PEAK, UTILISATION, size_of

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.training.checkpoint import LAST, save
from raytrain.training.progress import StepProgress
from raytrain.training.replay import eager_steps
from raytrain.training.setup import splits_of, start
from raytrain.training.trainer import fit, train_epoch

HERE = Path(__file__).parent
README = HERE.parent / "cluster" / "README.md"

NETWORK, ALGORITHM, EPOCHS, IMAGES = "wideresnet-28-10", "pgd", 30, 45_000
SWEEPS = {100: 8, 1_000: 64, 10_000: 512}  # trials, and GPUs: one for each trial at work
KEPT = 4  # files of a trial behind a URL: the last and the best, and the version before each
WRITTEN = 2  # checkpoints per epoch, at most: the last and the best


class _Enough(Exception):
    """One step was trained."""


@dataclass(frozen=True)
class Recorded:
    """What MLflow gets of a trial: once, and with every epoch."""

    requests: float
    requests_per_epoch: float
    rows: float
    rows_per_epoch: float


def checkpoint_bytes(network: str) -> int:
    """The size of a file after a step, which makes the optimiser's state."""
    run = _tiny(model=network)
    context = DistributedContext()
    splits = splits_of(run, context)
    state = start(run, splits, context)

    def on_step(done: StepProgress) -> None:
        raise _Enough

    with suppress(_Enough):
        train_epoch(run, splits, state, eager_steps(state), on_step)
    with tempfile.TemporaryDirectory() as folder:
        save(state, run, Path(folder, LAST), context)
        return Path(folder, LAST).stat().st_size


def recorded() -> Recorded:
    """A trial of a few epochs and one of more, recorded in SQLite as fast as epochs come one by one."""
    short, long = 2, 12
    (requests, rows), (more_requests, more_rows) = (_recorded(epochs) for epochs in (short, long))
    requests_per_epoch = (more_requests - requests) / (long - short)
    rows_per_epoch = (more_rows - rows) / (long - short)
    return Recorded(
        requests - short * requests_per_epoch,
        requests_per_epoch,
        rows - short * rows_per_epoch,
        rows_per_epoch,
    )


def _recorded(epochs: int) -> tuple[int, int]:
    """Requests and rows of one trial."""
    from raytrain.tracking import tracked
    from raytrain.tuning.mlflow_runs import PARENT, MlflowRuns

    run = _tiny()
    row, _ = next(fit(run, DistributedContext()))
    with tempfile.TemporaryDirectory() as name, _counted() as requests:
        folder = Path(name)
        database = folder / "mlflow.db"
        with tracked(f"sqlite:///{database}", "plan", folder / "mlflow.jsonl") as tracker:
            runs = MlflowRuns(tracker, "s", folder)
            tracker.open(PARENT, "s", {}, {})
            assert tracker.flush()
            before, rows = len(requests), _rows_in(database)
            runs.begin("t0000", run, {"optimizer.lr": 0.1})
            assert tracker.flush()
            for epoch in range(1, epochs + 1):
                runs.row("t0000", _later(row, epoch), epoch)
                runs.tag("t0000", row.tags())
                assert tracker.flush()
            runs.end("t0000", "complete")
            assert tracker.flush()
            return len(requests) - before, _rows_in(database) - rows


def _tiny(**changes: Any) -> RunConfig:
    values = {
        "data": {"name": "digits", "train_size": 64},
        "model": "small_cnn",
        "algorithm": {"name": "pgd", "steps": 1},
        "batch_size": 8,
        "epochs": 1,
        "evaluation": {"steps": 1},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


def _later(row: EpochMetrics, epoch: int) -> dict[str, float]:
    return {name: value + epoch for name, value in row.metrics().items()}


@contextmanager
def _counted() -> Iterator[list[str]]:
    """The calls of MLflow's stores, each of which is a request where the store is a server."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    calls: list[str] = []
    depth = [0]

    def counting(name: str, actual: Any) -> Any:
        def call(*args: Any, **fields: Any) -> Any:
            if not depth[0]:
                calls.append(name)
            depth[0] += 1
            try:
                return actual(*args, **fields)
            finally:
                depth[0] -= 1

        return call

    with patch.multiple(
        SqlAlchemyStore,
        **{
            name: counting(name, actual)
            for name, actual in vars(SqlAlchemyStore).items()
            if not name.startswith("_") and callable(actual) and not isinstance(actual, type)
        },
    ):
        name = "log_artifact"
        actual = vars(LocalArtifactRepository)[name]
        with patch.object(LocalArtifactRepository, name, counting(name, actual)):
            yield calls


def _rows_in(database: Path) -> int:
    with closing(sqlite3.connect(database)) as tables:
        names = tables.execute("select name from sqlite_master where type = 'table'").fetchall()
        return sum(
            tables.execute(f'select count(*) from "{name}"').fetchone()[0] for (name,) in names
        )


def driver_seconds(trials: int) -> float:
    """Processor seconds of the driver per trial when there are so many."""
    import pyarrow.parquet as pq

    rows = pq.read_table(HERE / "scale.parquet").to_pylist()
    near = min(rows, key=lambda row: abs(row["trials"] - trials))
    return near["ms_per_trial"] / 1e3


def plan_table() -> list[str]:
    """The table, and what its numbers are of."""
    size, tracking = checkpoint_bytes(NETWORK), recorded()
    hours = FE[ALGORITHM] * size_of(NETWORK).flops * IMAGES * EPOCHS / (PEAK * UTILISATION) / 3600
    requests = tracking.requests + EPOCHS * tracking.requests_per_epoch
    rows = tracking.rows + EPOCHS * tracking.rows_per_epoch
    lines = [
        "| trials | GPUs | hours | GPU-hours | in the bucket | written to it, at most | requests to MLflow "
        "| rows of its database | of the driver's time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for trials, gpus in SWEEPS.items():
        per_second = gpus / (3600 * hours)
        written = WRITTEN * EPOCHS * size * per_second
        cells = [
            f"{trials:,}",
            str(gpus),
            f"{trials * hours / gpus:.1f}",
            f"{trials * hours:,.0f}",
            f"{KEPT * size * trials / 1e12:.2g} TB",
            f"{written / 1e9:.2g} GB/s",
            f"{requests * per_second:.2g} per second",
            f"{rows * trials:,.0f}",
            f"{per_second * driver_seconds(trials):.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{NETWORK}, PGD-10, {EPOCHS} epochs of {IMAGES:,} images of 32x32 pixels: {hours:.2f} hours on "
        "one GPU "
        "as the model assumes it, no trial stopped early, one GPU for each. A checkpoint has "
        f"{size / 1e6:.0f} MB; a trial leaves {KEPT} and writes up to {WRITTEN} per epoch; "
        "`checkpoint_every` "
        f"makes them fewer. A trial is {tracking.requests:.0f} requests and {tracking.rows:.0f} rows in "
        "MLflow, "
        f"and {tracking.requests_per_epoch:.0f} and {tracking.rows_per_epoch:.0f} more per epoch. Where "
        "MLflow "
        "is slower than that, epochs wait in the outbox, and up to 800 values go in one request. The "
        "driver's "
        "time per trial is [measured](../benchmarks/scale.md).",
    ]


def into_readme(plan: list[str]) -> None:
    """Write the plan between its marks."""
    text = README.read_text()
    made = "\n".join(plan)
    found = re.sub(
        r"(<!-- plan -->\n).*?(\n<!-- end -->)",
        lambda marks: f"{marks[1]}{made}{marks[2]}",
        text,
        flags=re.DOTALL,
    )
    README.write_text(found)
