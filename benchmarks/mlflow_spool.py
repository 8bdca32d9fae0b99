"""What logging costs: time in the caller, time to deliver, and memory, by the number of trials.

    python benchmarks/mlflow_spool.py                       # 1000 and 10000 trials
    python benchmarks/mlflow_spool.py --trials 100 1000

A trial is a child run with 20 parameters, 5 rows of 15 metrics and an end, queued as fast as the
caller can. The live store is SQLite in a temporary folder; the dead one answers when it is opened
and never again. Every case is a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS, METRICS, PARAMETERS = 5, 15, 20


class Dead:
    """A client whose store has gone away."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise ConnectionError(f"{name}: the store is away")

        return refuse


def case(trials: int, alive: bool, folder: Path) -> dict[str, Any]:
    """One sweep's worth of records."""
    from raytrain.tracking import Tracker

    outbox = folder / "mlflow.jsonl"
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "benchmark", outbox)
    tracker.open("sweep", "sweep", {}, {})
    one_trial(tracker, "warm")
    tracker.flush()
    if not alive:
        tracker._store.client = Dead()
    before = memory("VmRSS")
    calls: list[float] = []
    begun = time.perf_counter()
    for number in range(trials):
        calls += one_trial(tracker, f"t{number}")
    queued = time.perf_counter() - begun
    result = {
        "row_us": statistics.median(calls) * 1e6,
        "worst_ms": max(calls) * 1e3,
        "trial_us": queued / trials * 1e6,
        "after_queueing_mib": memory("VmRSS") - before,
        "spool_mib": outbox.stat().st_size / 2**20,
    }
    if alive:
        assert tracker.flush(1e6)
        result["delivered_ms"] = (time.perf_counter() - begun) / (trials * ROWS) * 1e3
        tracker.shut("FINISHED")
        result["kept_mib"] = sum(f.stat().st_size for f in folder.glob("mlflow.[js]*")) / 2**20
    return {**result, "before_mib": before, "peak_mib": memory("VmHWM")}


def one_trial(tracker: Any, handle: str) -> list[float]:
    """Log a trial; returns the seconds of each row's call."""
    seconds = []
    tracker.open(handle, handle, {f"p{i}": i / 7 for i in range(PARAMETERS)}, {}, parent="sweep")
    for step in range(1, ROWS + 1):
        row = {f"group/metric{i}": step / (i + 1) for i in range(METRICS)}
        begun = time.perf_counter()
        tracker.log(handle, row, step)
        seconds.append(time.perf_counter() - begun)
    tracker.close(handle, "FINISHED")
    return seconds


def memory(field: str) -> float:
    """Of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def in_process(trials: int, alive: bool) -> dict[str, Any]:
    """A case in a process of its own, so that memory is its own too."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--case", json.dumps([trials, alive, folder])]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """The model of the processor, if the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main() -> None:
    """Every case, and the table."""
    options = argparse.ArgumentParser()
    options.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000])
    options.add_argument("--case")
    chosen = options.parse_args()
    if chosen.case:
        trials, alive, folder = json.loads(chosen.case)
        print(json.dumps(case(trials, alive, Path(folder))), flush=True)
        os._exit(0)  # a dead store is not waited for
    print(
        "| store | trials | us per row, median | worst call, ms | us per trial | "
        "ms per row delivered | MiB before | peak MiB | spool, MiB | kept, MiB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for alive in (True, False):
        for trials in chosen.trials:
            found = in_process(trials, alive)
            delivered = f"{found['delivered_ms']:.2f}" if alive else ""
            kept = f"{found['kept_mib']:.1f}" if alive else ""
            print(
                f"| {'live' if alive else 'dead'} | {trials} | {found['row_us']:.0f} "
                f"| {found['worst_ms']:.1f} | {found['trial_us']:.0f} | {delivered} "
                f"| {found['before_mib']:.0f} | {found['peak_mib']:.0f} "
                f"| {found['spool_mib']:.1f} | {kept} |",
                flush=True,
            )
    print(
        f"\n{ROWS} rows of {METRICS} metrics and {PARAMETERS} parameters a trial; {processor()}, "
        f"{os.cpu_count()} cores; mlflow {version('mlflow')}, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    main()
