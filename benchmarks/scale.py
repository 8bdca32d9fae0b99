"""Ten thousand trials on 64 slots: what the driver pays per trial, and where that stops being flat.

    python benchmarks/scale.py                     # 10,000 trials, 64 slots
    python benchmarks/scale.py --ray --trials 500 --slots 8

Everything is real but the training and the cluster: the ledger, the Optuna study in its journal file, TPE
over 8 dimensions with ASHA, MLflow in SQLite through the spool. 64 simulated nodes hand over the three
rows of a stub trial as fast as the driver takes them, so it is asked for more trials per second than any
cluster that trains would. Times are of the processor, which other work on the machine disturbs little: of
the driver's own thread for a suggestion and an end, of all threads (MLflow's delivery is one) for a trial.
With --ray the slots are real actors under Ray Tune, on one machine. Writes scale.md, scale.parquet and
scale.png beside this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.distributed import ray_session  # first: it sets what Ray reads
from raytrain.tracking.provenance import hardware

HERE = Path(__file__).parent
ROWS = 3
SPACE: dict[str, Any] = {
    "optimizer.lr": {"float": [0.001, 1.0], "log": True},
    "optimizer.weight_decay": {"float": [1e-5, 1e-2], "log": True},
    "optimizer.momentum": {"float": [0.5, 0.99]},
    "algorithm.step_size": {"float": [0.05, 1.0], "unit": "eps"},
    "algorithm.steps": {"int": [1, 10]},
    "algorithm.start": {"choice": ["uniform", "zero"]},
    "algorithm.attack_bn": {"choice": ["eval", "train"]},
    "ema": {"float": [0.9, 0.999]},
}


def stub(values: dict[str, Any], epoch: int) -> float:
    """An objective with an optimum inside, that grows with training."""
    off = abs(values["optimizer.momentum"] - 0.9) + abs(values["ema"] - 0.99)
    return (1 - off) * epoch / ROWS


def slot_class() -> Any:
    """A slot without torch: what a trial costs here is what the driver does."""
    from ray import tune as ray_tune

    class StubSlot(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._values, self._epoch = new_config["job"], 0
            return True

        def step(self) -> dict[str, Any]:
            self._epoch += 1
            return row_of(self._values, self._epoch)

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return StubSlot


def measured(trials: int, slots: int, every: int, with_ray: bool) -> list[dict[str, float]]:
    """One row per `every` trials: milliseconds per trial and per suggestion, memory of the driver."""
    import ray
    from ray import tune as ray_tune

    from raytrain.tracking import tracked
    from raytrain.tuning.executor import execute
    from raytrain.tuning.fidelity import Fidelity
    from raytrain.tuning.mlflow_runs import PARENT
    from raytrain.tuning.space.search_space import SearchSpace
    from raytrain.tuning.study import open_study
    from raytrain.tuning.trial_manager import Live, TrialManager

    space = SearchSpace.model_validate(
        {
            "name": "scale",
            "base": {"epochs": ROWS},
            "space": SPACE,
            "search": {"first_rung": 1, "reduction": 3, "defaults": False},
            "budget": {"trials": trials},
        }
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # as the commands do
    rows: list[dict[str, float]] = []

    class Measured(TrialManager):
        suggesting: list[float] = []
        telling: list[float] = []
        last = time.process_time()
        clock = time.perf_counter()

        def begin(self, tune_id: str) -> dict[str, Any] | None:
            began = time.thread_time()
            job = super().begin(tune_id)
            if job is not None:
                self.suggesting.append(time.thread_time() - began)
            return job

        def end(self, tune_id: str, result: dict[str, Any] | None, lost: bool) -> None:
            began = time.thread_time()
            super().end(tune_id, result, lost)
            self.telling.append(time.thread_time() - began)
            ended = self.progress().finished
            if ended % every == 0 and self.suggesting:
                now, clock = time.process_time(), time.perf_counter()
                row = {
                    "trials": float(ended),
                    "ms_per_trial": 1000 * (now - self.last) / every,
                    "elapsed_ms_per_trial": 1000 * (clock - self.clock) / every,
                    "ms_per_suggestion": 1000 * statistics.median(self.suggesting),
                    "ms_per_end": 1000 * statistics.median(self.telling),
                    "mb": resident(),
                }
                rows.append(row)
                print("  ".join(f"{k} {v:.1f}" for k, v in row.items()), flush=True)
                self.last, self.clock = now, clock
                self.suggesting, self.telling = [], []

        def _job(self, live: Live) -> Any:
            return {"of": [stub(live.values, epoch) for epoch in range(1, ROWS + 1)]}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        study = open_study("scale", folder, space, space.hash(), False, float(ROWS))
        with tracked(f"sqlite:///{name}/mlflow.db", "scale", folder / "mlflow.jsonl") as tracker:
            tracker.open(PARENT, "scale", {}, {})
            manager = Measured(study, space, tracker, folder, Fidelity(False, float(ROWS), 1000))
            if not with_ray:
                simulate(manager, slots)
            else:
                ray.init(
                    address="local", num_cpus=slots, include_dashboard=False, log_to_driver=False
                )
                needs = ray_tune.PlacementGroupFactory([{"CPU": 1}])
                execute(manager, ray_tune.with_resources(slot_class(), needs), slots)
                ray.shutdown()
            print("trials done; MLflow is given what is left", flush=True)
    return rows


def row_of(job: dict[str, Any], epoch: int) -> dict[str, Any]:
    """What a slot hands over after an epoch of the stub."""
    final = epoch == ROWS
    metrics = {"cost/fe": 10.0 * epoch, "valid/robust": job["of"][epoch - 1]}
    row = {"metrics": json.dumps(metrics), "epoch": epoch, "final": final, "done": final}
    return {**row, "progress": epoch / ROWS}


def simulate(manager: Any, slots: int) -> None:
    """Nodes that answer in turn."""
    running: deque[tuple[str, Any, int]] = deque()
    begun, over = 0, False
    while running or not over:
        while not over and len(running) < slots:
            try:
                started = manager.begin(str(begun))
            except StopIteration:
                over = True
                break
            if started is None:
                break
            running.append((str(begun), started["job"], 1))
            begun += 1
        if not running:
            continue
        name, job, epoch = running.popleft()
        row = row_of(job, epoch)
        if row["done"] or manager.row(name, row):
            manager.end(name, row, lost=False)
        else:
            running.append((name, job, epoch + 1))


def resident() -> float:
    """Memory of this process now, MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1024


def report(rows: list[dict[str, float]], slots: int) -> str:
    """Markdown."""
    lines = [
        "| trials so far | ms per trial | elapsed | ms per suggestion | ms per end | driver, MB |",
        "|---|---|---|---|---|---|",
    ]
    shown = rows if len(rows) <= 12 else [rows[round(i * (len(rows) - 1) / 11)] for i in range(12)]
    for row in shown:
        lines.append(
            f"| {row['trials']:,.0f} | {row['ms_per_trial']:.1f} | "
            f"{row['elapsed_ms_per_trial']:.1f} | {row['ms_per_suggestion']:.1f} | "
            f"{row['ms_per_end']:.1f} | {row['mb']:.0f} |"
        )
    return "\n".join(
        [*lines, "", f"{slots} slots, {ROWS} rows per trial. {hardware()}; {_versions()}.", ""]
    )


def figure(rows: list[dict[str, float]], file: Path) -> None:
    """Time and memory against the number of trials."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 5.0), layout="constrained")
    times, memory = picture.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    trials = [row["trials"] for row in rows]
    for name, label, colour in (
        ("ms_per_trial", "driver, per trial, all threads", "#0072b2"),
        ("ms_per_suggestion", "of that, asking for it (TPE, journal)", "#d55e00"),
        ("ms_per_end", "of that, ending it", "#009e73"),
    ):
        times.plot(trials, [row[name] for row in rows], label=label, color=colour, lw=2)
    times.set_ylabel("milliseconds of the processor")
    times.set_ylim(bottom=0)
    times.legend(frameon=False)
    memory.plot(trials, [row["mb"] for row in rows], color="#333333", lw=2)
    memory.set_ylabel("driver's memory, MB")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("trials so far")
    for axes in (times, memory):
        axes.grid(alpha=0.3)
    picture.savefig(file, dpi=160)


def _versions() -> str:
    from importlib.metadata import version

    assert ray_session
    return ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna", "mlflow", "raytrain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--every", type=int, default=None, help="trials between two measurements")
    parser.add_argument("--ray", action="store_true", help="real actors under Ray Tune")
    options = parser.parse_args()
    every = options.every or max(1, options.trials // 40)
    rows = measured(options.trials, options.slots, every, options.ray)
    text = report(rows, options.slots)
    print(text)
    (HERE / "scale.md").write_text(text)
    pq.write_table(pa.Table.from_pylist(rows), HERE / "scale.parquet")
    figure(rows, HERE / "scale.png")


if __name__ == "__main__":
    main()
