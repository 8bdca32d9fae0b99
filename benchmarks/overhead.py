"""What a further trial costs beside its training: raytrain's slots against the two stock recipes of Ray.

The same work everywhere: one epoch of PGD-1 on 128 digits with a remembered perturbation per image, so
that every trial starts for real (network, optimiser, bank, seed). The stock recipes are a Tune function
trainable, and a Tune function that drives a TorchTrainer of two workers; neither logs anywhere, while
raytrain records every trial in its study and in MLflow. One trial at a time.

    python benchmarks/overhead.py --trials 20 --out benchmarks/overhead.md
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrain.commands.tune import tune
from raytrain.distributed import ray_session  # first: it sets what Ray reads
from raytrain.tracking.provenance import hardware
from raytrain.tuning.space.search_space import SearchSpace

WORK: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 128, "validation": 100},
    "model": "small_cnn",
    "algorithm": {"name": "pgd", "steps": 1, "start": "remembered"},
    "epochs": 1,
    "batch_size": 64,
    "evaluation": {"steps": 1},
    "device": "cpu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="measured trials of each recipe")
    parser.add_argument("--trainer-trials", type=int, default=None, help="of the slowest recipe")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    slow = options.trainer_trials or options.trials
    recipes: dict[str, tuple[Callable[[int], list[float]], int]] = {
        "raytrain, 1 worker": (lambda n: ours(n, 1), options.trials),
        "raytrain, 2 workers": (lambda n: ours(n, 2), options.trials),
        "Tune function": (stock_function, options.trials),
        "Tune function, TorchTrainer of 2": (stock_trainer, slow),
    }
    work = epoch_seconds()
    found: dict[str, tuple[float, int]] = {}
    for name, (measure, trials) in recipes.items():
        seconds = measure(trials)
        found[name] = (statistics.median(seconds), len(seconds))
        print(
            f"{name}: {found[name][0]:.3f} s per further trial, median of {len(seconds)}",
            flush=True,
        )
    text = table(found, work)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def epoch_seconds() -> float:
    """The epoch itself, in a process that is warm: what no recipe can save."""
    from raytrain.config.request import as_run
    from raytrain.core.distributed_context import DistributedContext
    from raytrain.training.trainer import fit

    run = as_run(WORK)
    list(fit(run, DistributedContext()))
    seconds = []
    for _ in range(20):
        rows = fit(run, DistributedContext())
        began = time.perf_counter()
        list(rows)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def ours(trials: int, workers: int) -> list[float]:
    """Seconds between the ends of trials of a sweep, its first one left out."""
    ends: list[float] = []

    def watch(progress: Any) -> None:
        if progress.finished > len(ends):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        space = SearchSpace.model_validate(
            {
                "name": "overhead",
                "base": {
                    **WORK,
                    "workers": workers,
                    "storage": folder,
                    "tracking_uri": f"sqlite:///{folder}/mlflow.db",
                },
                "space": {"optimizer.lr": {"float": [0.01, 0.1], "log": True}},
                "search": {"sampler": "random", "pruner": "none", "defaults": False},
                "budget": {"trials": trials + 1, "concurrent": 1},
            }
        )
        tune(space, watch=watch)
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def train_here(config: dict[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    """The work, in whichever process this is."""
    from raytrain.config.request import as_run
    from raytrain.core.distributed_context import DistributedContext
    from raytrain.training.trainer import fit

    run = as_run({**WORK, "optimizer": {"lr": config["lr"]}})
    for row, _ in fit(run, DistributedContext()):
        report(row.metrics())


def one_process(config: dict[str, Any]) -> None:
    """A function trainable, as Ray's documentation shows it."""
    from ray import tune as ray_tune

    train_here(config, ray_tune.report)


def two_workers(config: dict[str, Any]) -> None:
    """A function trainable that drives Ray Train, as Ray's documentation shows it."""
    from ray import tune as ray_tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        on_a_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=ray_tune.get_context().get_trial_id(),
            storage_path=config["folder"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def on_a_worker(config: dict[str, Any]) -> None:
    """One of the two workers; the first one's rows are reported."""
    import ray.train

    train_here(config, ray.train.report)


def stock_function(trials: int) -> list[float]:
    """Tune with a function trainable."""
    return stock(one_process, {"CPU": 1}, trials)


def stock_trainer(trials: int) -> list[float]:
    """Tune around Ray Train."""
    return stock(two_workers, {"node:__internal_head__": 0.001}, trials)


def stock(
    function: Callable[[dict[str, Any]], None], needs: dict[str, float], trials: int
) -> list[float]:
    """Seconds between the ends of trials, the first one left out."""
    import ray
    from ray import tune as ray_tune

    class Ends(ray_tune.Callback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.at.append(time.perf_counter())

    ends = Ends()
    # The dashboard: without it a Ray Train trial that ends leaves its placement group behind.
    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ray_tune.Tuner(
                ray_tune.with_resources(function, ray_tune.PlacementGroupFactory([needs])),
                param_space={"lr": ray_tune.loguniform(0.01, 0.1), "folder": folder},
                tune_config=ray_tune.TuneConfig(num_samples=trials + 1, max_concurrent_trials=1),
                run_config=ray_tune.RunConfig(storage_path=folder, verbose=0, callbacks=[ends]),
            ).fit()
    finally:
        ray.shutdown()
    return [after - before for before, after in zip(ends.at, ends.at[1:], strict=False)]


def table(found: dict[str, tuple[float, int]], work: float) -> str:
    """Markdown: seconds per further trial, and the overhead as a ratio."""
    pairs = {
        "raytrain, 1 worker": "Tune function",
        "raytrain, 2 workers": "Tune function, TorchTrainer of 2",
    }
    lines = [
        "| recipe | seconds per further trial | overhead, s | trials | stock overhead / ours |",
        "|---|---|---|---|---|",
    ]
    for name, (seconds, count) in found.items():
        ratio = ""
        if name in pairs:
            mine, theirs = max(1e-9, seconds - work), found[pairs[name]][0] - work
            ratio = f"{theirs / mine:.0f}"
        lines.append(f"| {name} | {seconds:.3f} | {seconds - work:.3f} | {count} | {ratio} |")
    versions = session_versions()
    return "\n".join(
        [
            *lines,
            "",
            f"The epoch itself takes {work:.3f} s in a warm process. {hardware()}; {versions}.",
            "",
        ]
    )


def session_versions() -> str:
    """What was measured with."""
    from importlib.metadata import version

    assert ray_session
    return ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna", "mlflow", "torch"))


if __name__ == "__main__":
    main()
