"""Every algorithm at its defaults, at the same cost: clean and robust accuracy, FOSC and seconds.

    python benchmarks/algorithms.py                                  # digits, 10 seeds
    python benchmarks/algorithms.py --data PATH/train.parquet --name cifar10 --seeds 3 ...

The budget is in forward-equivalents per training image: an algorithm trains as many epochs as it
pays for, its schedules stretched to them. What an epoch costs is measured by a first run where it
is not fixed. The test set is touched once per run, by PGD-20 on the last weights; nothing was tuned
on it. Writes NAME.md (the table), NAME.parquet (every run) and NAME.png beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.core.git import git

HERE = Path(__file__).parent

METHODS: dict[str, dict[str, Any]] = {
    "natural": {},
    "fgsm_rs": {},
    "n_fgsm": {},
    "free": {},
    "pgd": {},
    "yopo": {},
    "trades": {},
    "mart": {},
    "gradalign": {},
    "dynamic": {},
    "si_hg": {},
    "si_hg (N)": {"algorithm.mode": "N"},
    "ssds": {},
    "l2l": {},
    "l2l (trades)": {"algorithm.loss": "trades"},
    "pgd + clip": {"outer": "clip"},
    "pgd + engm": {"outer": "engm"},
    "pgd + awp": {"outer": "awp"},
}


def configuration(method: str, options: argparse.Namespace, epochs: int, seed: int) -> Any:
    """The run of a method: defaults, but for the data, the length and the seed."""
    from raytrain.config.request import as_run

    base: dict[str, Any] = {
        "data": {"name": options.data, "validation": options.validation},
        "model": options.model,
        "algorithm": {"name": method.split()[0]},
        "batch_size": options.batch_size,
        "epochs": epochs,
        "seed": seed,
        "evaluation": {"steps": 10, "every": 10**6},
        "device": "auto" if options.gpu else "cpu",
    }
    if options.train_size:
        base["data"]["train_size"] = options.train_size
    if options.eps:
        base["threat"] = {"norm": "linf", "eps": options.eps}
    return as_run(base, METHODS[method])


def trained(
    method: str, options: argparse.Namespace, epochs: int, seed: int, judged: bool = True
) -> dict[str, Any]:
    """One run and, unless it is only for its price, its verdict on the test set."""
    import torch

    from raytrain.core.distributed_context import local_context
    from raytrain.core.errors import TrainingFailed
    from raytrain.core.types import mix
    from raytrain.data.loader import iter_eval, open_test
    from raytrain.evaluation.validation import Evaluation, validate
    from raytrain.training.trainer import fit

    torch.set_num_threads(1)
    run = configuration(method, options, epochs, seed)
    place = local_context(run.device)
    row: dict[str, Any] = {"method": method, "seed": seed, "epochs": epochs}
    model = None
    try:
        for report, state in fit(run, place):
            model = state.eval_model
            row |= {"fe": report.fe / report.samples * report.epoch, "seconds": report.seconds}
            row |= {"fosc": report.fosc_box, "loss": report.loss}
    except TrainingFailed as error:
        return {**row, "failed": str(error)}
    if not judged:
        return row
    part, _ = open_test(run.data, place)
    batches = iter_eval(part, 500, mix(seed, "test"))
    if options.test_size:
        batches = islice(batches, options.test_size // 500)
    assert model is not None
    verdict, _ = validate(model, batches, run.threat, Evaluation(steps=20), place)
    return {**row, "clean": verdict.clean, "robust": verdict.robust, "images": verdict.images}


def priced(method: str, options: argparse.Namespace) -> tuple[str, int]:
    """The epochs that the budget pays for; twice looked, because a longer run may stop earlier."""
    varies = method.startswith("dynamic")
    epochs = 3 if varies else 1
    for _ in range(2 if varies else 1):
        row = trained(method, options, epochs, seed=10**6, judged=False)
        epochs = max(1, round(options.budget / (row["fe"] / row["epochs"])))
    return method, epochs


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods and seeds, on as many processes as asked."""
    methods = options.only or list(METHODS)
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.processes) as pool:
        lengths = dict(pool.map(priced, methods, [options] * len(methods)))
        jobs = [
            pool.submit(trained, method, options, lengths[method], seed)
            for seed in range(options.seeds)
            for method in methods
        ]
        began = time.monotonic()
        for done, job in enumerate(as_completed(jobs), start=1):
            rows.append(job.result())
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            print(
                f"{done}/{len(jobs)}  {rows[-1]['method']:14} {left / 60:.0f} min left", flush=True
            )
    return sorted(rows, key=lambda row: (methods.index(row["method"]), row["seed"]))


def spread(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [row[key] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: mean and standard deviation over the seeds, robust accuracy first."""
    lines = [
        "| method | PGD-20 | clean | FE per image | epochs | seconds | FOSC in the box |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = grouped(rows)
    for method in sorted(groups, key=lambda m: -spread(groups[m], "robust")[0]):
        runs = groups[method]
        robust, clean = spread(runs, "robust"), spread(runs, "clean")
        lines.append(
            f"| {method} | {100 * robust[0]:.1f} ± {100 * robust[1]:.1f} "
            f"| {100 * clean[0]:.1f} ± {100 * clean[1]:.1f} | {spread(runs, 'fe')[0]:.0f} "
            f"| {runs[0]['epochs']} | {spread(runs, 'seconds')[0]:.1f} | {spread(runs, 'fosc')[0]:.3f} |"
        )
    failed = [
        f"{row['method']} (seed {row['seed']}): {row['failed']}" for row in rows if "failed" in row
    ]
    images = next(row["images"] for row in rows if "images" in row)
    notes = [
        f"{options.model}, {options.seeds} seeds, mean ± standard deviation over them; {images} test "
        f"images, PGD-20 with step eps/4 on the last weights; budget {options.budget} FE per training "
        "image; defaults of every algorithm, nothing tuned.",
        "",
        f"`{' '.join(['python', 'benchmarks/algorithms.py', *options.words])}`  ",
        f"{hardware(options)}; {versions()}",
    ]
    return "\n".join([*lines, "", *notes, *failed, ""])


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs that finished, by method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            found.setdefault(row["method"], []).append(row)
    return found


def hardware(options: argparse.Namespace) -> str:
    """Where it ran: seconds mean nothing without it."""
    if options.gpu:
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {options.processes} processes of one thread"


def versions() -> str:
    """Versions and commit."""
    import torch

    commit = git(HERE, "rev-parse", "--short", "HEAD")
    return f"torch {torch.__version__}, raytrain {version('raytrain')} at {commit}"


def figure(rows: list[dict[str, Any]], options: argparse.Namespace, file: Path) -> None:
    """Robust and clean accuracy of every method, with standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    order = sorted(groups, key=lambda m: spread(groups[m], "robust")[0])
    fig, axes = plt.subplots(figsize=(7, 0.32 * len(order) + 1.2), layout="constrained")
    for key, colour, label in (("clean", "#8a8f98", "clean"), ("robust", "#1f5fbf", "PGD-20")):
        means = [100 * spread(groups[m], key)[0] for m in order]
        errors = [100 * spread(groups[m], key)[1] for m in order]
        axes.errorbar(means, range(len(order)), xerr=errors, fmt="o", color=colour, label=label)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("test accuracy, %")
    axes.set_title(
        f"{options.name}: {options.budget} forward-equivalents per image, {options.seeds} seeds",
        loc="left",
        fontsize=10,
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    fig.savefig(file, dpi=120)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="digits", help="a name, or the path of a Parquet file")
    parser.add_argument("--name", default="digits", help="of the files that are written")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--budget", type=int, default=345, help="FE per image: PGD-10 for 15 epochs"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train-size", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--test-size", type=int, default=0, help="test images, of 500; 0: all")
    parser.add_argument("--validation", type=float, default=0.1)
    parser.add_argument("--eps", default="", help="such as 8/255; default: customary for the data")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), help="methods; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    options.words = [
        word if "/" not in word or word[0].isdigit() else Path(word).name for word in sys.argv[1:]
    ]
    return options


def main() -> None:
    options = arguments()
    rows = run_all(options)
    columns = sorted({key for row in rows for key in row})
    data = {key: [row.get(key) for row in rows] for key in columns}
    pq.write_table(pa.table(data), HERE / f"algorithms-{options.name}.parquet")
    text = table(rows, options)
    (HERE / f"algorithms-{options.name}.md").write_text(text)
    figure(rows, options, HERE / f"algorithms-{options.name}.png")
    print(text)


if __name__ == "__main__":
    main()
