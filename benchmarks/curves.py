"""Real learning curves of a finite grid: a table on which ways of searching can be compared in seconds.

    python benchmarks/curves.py                       # all of it; goes on where it was stopped
    python benchmarks/curves.py --limit 6 --file /tmp/try.parquet

Every configuration is trained once on 500 of the digits, to the same cost in forward-equivalents per
image, and validated about every 20 of them. Nothing looks at the test set. One row per validation; a
configuration that diverged has one row that says so. Writes curves-digits.parquet beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raytrain.core.git import git
from raytrain.tracking.provenance import hardware

HERE = Path(__file__).parent

IMAGES = 500
BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_size": IMAGES, "validation": 240},
    "model": "small_cnn",
    "threat": {"norm": "linf", "eps": 0.1},
    "batch_size": 32,
    "evaluation": {"steps": 10},
    "device": "cpu",
}

SHARED: dict[str, list[Any]] = {
    "optimizer.lr": [0.0003, 0.005, 0.05, 0.3, 3.0],
    "optimizer.weight_decay": [0.0, 5e-3],
}
STEPS, SIZES = [2, 5, 10], ["eps/8", "eps/4", "eps/2"]
OWN: dict[str, dict[str, list[Any]]] = {
    "fgsm_rs": {"algorithm.step_size": ["eps/2", "eps", "1.25*eps"]},
    "pgd": {"algorithm.steps": STEPS, "algorithm.step_size": SIZES},
    "trades": {
        "algorithm.steps": STEPS,
        "algorithm.step_size": SIZES,
        "algorithm.beta": [1.0, 6.0],
    },
    "dynamic": {
        "algorithm.steps": [5, 10],
        "algorithm.step_size": ["eps/4", "eps/2"],
        "algorithm.c_max": [0.1, 0.5, 2.0],
    },
}
"""5 x 2 x (3 + 9 + 18 + 12) = 420 configurations."""

SCHEMA = pa.schema(
    [
        pa.field("params", pa.string(), nullable=False, metadata={"about": "JSON: path -> value"}),
        pa.field("epoch", pa.int32(), metadata={"about": "epochs finished"}),
        pa.field("fe_per_image", pa.float64(), metadata={"about": "cost so far: the fidelity"}),
        pa.field("valid/robust", pa.float64(), metadata={"about": "under PGD-10 on 240 images"}),
        pa.field("valid/clean", pa.float64()),
        pa.field("seconds", pa.float64(), metadata={"about": "spent training so far"}),
        pa.field("failed", pa.string(), metadata={"about": "why it ended without a value"}),
    ]
)


def grid() -> Iterator[dict[str, Any]]:
    """Every configuration, as values by path."""
    for name, own in OWN.items():
        fields = {"algorithm.name": [name], **own, **SHARED}
        for values in itertools.product(*fields.values()):
            yield dict(zip(fields, values, strict=True))


def key_of(params: dict[str, Any]) -> str:
    """What a configuration is known by in the file."""
    return json.dumps(params, sort_keys=True)


def measured(params: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """The rows of one run."""
    import torch

    from raytrain.config.cost_estimate import estimate_cost, is_bound
    from raytrain.config.request import as_run
    from raytrain.core.distributed_context import DistributedContext
    from raytrain.core.errors import TrainingFailed
    from raytrain.training.trainer import fit

    torch.set_num_threads(1)
    epoch = as_run({**BASE, "epochs": 1}, params)
    often = estimate_cost(epoch) / (
        2 if is_bound(epoch) else 1
    )  # attacks that stop take about half
    every = max(1, round(20 / often))
    run = as_run({**BASE, "fe_per_image": budget}, {**params, "evaluation.every": every})
    rows: list[dict[str, Any]] = []
    try:
        for report, _ in fit(run, DistributedContext()):
            if report.robust is None:
                continue
            row = {"epoch": report.epoch, "fe_per_image": report.fe / IMAGES}
            row |= {"valid/robust": report.robust, "valid/clean": report.clean}
            rows.append({"params": key_of(params), **row, "seconds": report.seconds})
    except TrainingFailed as error:
        rows.append({"params": key_of(params), "failed": str(error)})
    return rows


def already(file: Path, budget: float) -> list[dict[str, Any]]:
    """The rows of an earlier launch on the same problem."""
    if not file.exists():
        return []
    table = pq.read_table(file)
    about = table.schema.metadata or {}
    if about.get(b"problem") != problem(budget):
        raise SystemExit(f"{file} holds curves of another problem; expected another --file")
    return table.to_pylist()


def problem(budget: float) -> bytes:
    """What all configurations share."""
    return json.dumps({**BASE, "fe_per_image": budget}, sort_keys=True).encode()


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All rows, under another name first: a kill leaves the old file whole."""
    commit = git(HERE, "rev-parse", "--short", "HEAD")
    where = f"{hardware()}, {options.processes} processes of one thread; torch {torch.__version__}"
    where += f", raytrain {version('raytrain')} at {commit}"
    about = {b"problem": problem(options.budget), b"measured": where.encode()}
    ordered = sorted(rows, key=lambda row: (row["params"], row.get("epoch") or 0))
    temporary = options.file.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(ordered, SCHEMA.with_metadata(about)), temporary)
    os.replace(temporary, options.file)


def measure_all(options: argparse.Namespace) -> None:
    """What is missing, in an order that mixes the cheap with the dear."""
    rows = already(options.file, options.budget)
    known = {row["params"] for row in rows}
    missing = [params for params in grid() if key_of(params) not in known]
    total = len(missing) + len(known)
    random.Random(0).shuffle(missing)
    jobs_wanted = missing[: options.limit]
    began: float | None = None  # when the first was done: processes take long to begin
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = {pool.submit(measured, params, options.budget): params for params in jobs_wanted}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                rows += job.result()
                if done % 10 == 0 or done == len(jobs):
                    write(rows, options)
                began = began or time.monotonic()
                each = (time.monotonic() - began) / max(1, done - 1)
                left = each * (len(missing) - done) / 60
                shown = rows[-1].get("valid/robust")
                print(f"{done + len(known)}/{total}  {key_of(jobs[job])}  {shown}", flush=True)
                print(f"    {each:.1f} s each, {left:.1f} min for all that is left", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            write(rows, options)
            raise SystemExit(130) from None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=138, help="FE per image of every run")
    parser.add_argument("--limit", type=int, default=None, help="stop after so many")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--file", type=Path, default=HERE / "curves-digits.parquet")
    options = parser.parse_args()
    options.gpu = False
    return options


if __name__ == "__main__":
    measure_all(arguments())
