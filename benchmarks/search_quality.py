"""How much of random search's budget does it take to find what random search finds with all of it?

    python benchmarks/search_quality.py               # needs curves-digits.parquet (curves.py makes it)

Real learning curves of 420 configurations of four algorithms, replayed: a trial hands over the rows of
the nearest configuration of the table and pays for them, so that ten seeds of every strategy take
minutes and meet the same numbers. Compared at equal forward-equivalents, one trial at a time:

- raytrain: its ledger with the default search (TPE, ASHA, stopped trials told as such);
- no early stopping: the same sampler, every trial trained to the end;
- stock: Ray's own OptunaSearch and AsyncHyperBandScheduler, called as Tune calls them;
- random: random search, every trial trained to the end.

What a strategy has found at a cost is the configuration that it would then call best (its own rule:
raytrain the best trained to the end, stock the best last report), judged by that configuration's value
after a whole run. Writes search-quality.md, .parquet and .png beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.distributed import ray_session  # first: it sets what Ray reads
from raytrain.tracking import Tracker
from raytrain.tracking.provenance import hardware
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.study import open_study
from raytrain.tuning.trial_manager import TrialManager

HERE = Path(__file__).parent
METRIC = "valid/robust"
LEVELS = {"optimizer.lr": [0.0003, 0.005, 0.05, 0.3, 3.0], "optimizer.weight_decay": [0.0, 5e-3]}
STEPS, SIZES = [2, 5, 10], ["eps/8", "eps/4", "eps/2"]
SPACE: dict[str, Any] = {
    "algorithm.name": {
        "branch": {
            "fgsm_rs": {"algorithm.step_size": {"choice": ["eps/2", "eps", "1.25*eps"]}},
            "pgd": {
                "algorithm.steps": {"choice": STEPS},
                "algorithm.step_size": {"choice": SIZES},
            },
            "trades": {
                "algorithm.steps": {"choice": STEPS},
                "algorithm.step_size": {"choice": SIZES},
                "algorithm.beta": {"choice": [1.0, 6.0]},
            },
            "dynamic": {
                "algorithm.steps": {"choice": [5, 10]},
                "algorithm.step_size": {"choice": ["eps/4", "eps/2"]},
                "algorithm.c_max": {"choice": [0.1, 0.5, 2.0]},
            },
        }
    },
    "optimizer.lr": {"float": [0.0003, 3.0], "log": True},
    "optimizer.weight_decay": {"choice": LEVELS["optimizer.weight_decay"]},
}
"""The table's own grid, but for a learning rate that is searched as a number and met by the nearest."""

Row = tuple[float, float]  # cost in FE per image, robust accuracy


class Table:
    """Curves by configuration."""

    def __init__(self, file: Path) -> None:
        read = pq.read_table(file)
        self.length = float(json.loads(read.schema.metadata[b"problem"])["fe_per_image"])
        self._curves: dict[str, list[Row]] = {}
        for row in read.to_pylist():
            curve = self._curves.setdefault(row["params"], [])
            if row["failed"] is None:
                curve.append((row["fe_per_image"], row[METRIC]))

    def curve(self, values: dict[str, Any]) -> list[Row]:
        """The rows of the nearest configuration; none if it diverged at once."""
        near = {**values, "optimizer.lr": _nearest(values["optimizer.lr"], LEVELS["optimizer.lr"])}
        return self._curves[json.dumps(near, sort_keys=True)]

    def final(self, values: dict[str, Any]) -> float:
        """What a whole run of it reaches."""
        curve = self.curve(values)
        return curve[-1][1] if curve else 0.0

    def best(self) -> float:
        """The best of all configurations."""
        return max(curve[-1][1] for curve in self._curves.values() if curve)

    def size(self) -> int:
        return len(self._curves)


def _nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(math.log(level / value)))


@dataclass
class Found:
    """The incumbent's true value over the cost spent."""

    spent: list[float]
    value: list[float]

    def at(self, cost: float) -> float:
        """What had been found for this much."""
        return max(
            (v for c, v in [*zip(self.spent, self.value, strict=True)] if c <= cost), default=0.0
        )

    def cost_of(self, target: float) -> float:
        """What it took to find a configuration as good; inf if it was not found."""
        reached = [c for c, v in zip(self.spent, self.value, strict=True) if v >= target]
        return min(reached, default=math.inf)


class Silent(Tracker):
    """MLflow, left out."""

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        answers = {"known": False, "last_step": 0}
        return lambda *_, **__: answers.get(name)


def ours(table: Table, seed: int, budget: float, search: dict[str, Any]) -> Found:
    """The ledger, fed from the table."""
    space = SearchSpace.model_validate(
        {
            "name": "quality",
            "base": {"fe_per_image": table.length, "threat": {"norm": "linf", "eps": 0.1}},
            "space": SPACE,
            "search": {"seed": seed, "defaults": False, **search},
            "feasible": {},
            "budget": {"fe_per_image": budget},
        }
    )
    fidelity = Fidelity(by_cost=True, length=table.length, num_images=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        study = open_study("quality", folder, space, space.hash(), False, table.length)
        manager = TrialManager(study, space, Silent(), folder, fidelity)
        return _driven(manager, table)


def _driven(manager: TrialManager, table: Table) -> Found:
    found, number = Found([], []), 0
    while True:
        try:
            manager.begin(str(number))
        except StopIteration:
            return found
        values = manager.progress().running[0].params
        _train(manager, str(number), table.curve(values))
        best = manager.best()
        found.spent.append(manager.progress().fe_per_image)
        found.value.append(table.final(best.params) if best is not None else 0.0)
        number += 1


def _train(manager: TrialManager, name: str, curve: list[Row]) -> None:
    for epoch, (cost, value) in enumerate(curve, start=1):
        last = epoch == len(curve)
        metrics = {"cost/fe": cost, METRIC: value}
        row = {"metrics": json.dumps(metrics), "epoch": epoch, "progress": 0.0, "final": last}
        if last or manager.row(name, row):
            manager.end(name, row, lost=False)
            return
    failed = {"metrics": "{}", "epoch": 0, "final": False, "failed": "diverged"}
    manager.end(name, failed, lost=False)


def stock(table: Table, seed: int, budget: float) -> Found:
    """Ray's OptunaSearch and AsyncHyperBandScheduler, asked in the order in which Tune asks them."""
    import numpy as np
    import optuna
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    np.random.seed(seed)
    shape = SearchSpace.model_validate({"name": "stock", "space": SPACE})
    chosen: dict[str, dict[str, Any]] = {}

    def space(trial: Any) -> dict[str, Any]:
        return {"values": shape.sample(trial)}

    searcher = OptunaSearch(space=space, metric="value", mode="max", seed=seed)
    scheduler = ASHAScheduler(
        time_attr="cost",
        metric="value",
        mode="max",
        max_t=math.ceil(table.length),
        grace_period=round(table.length / 3),
        reduction_factor=3,
    )
    found, spent, number = Found([], []), 0.0, 0
    last: dict[str, float] = {}
    while spent < budget:
        name = f"trial{number}"
        config = searcher.suggest(name)
        assert isinstance(config, dict)
        chosen[name] = config["values"]
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
        curve = table.curve(chosen[name]) or [(0.0, float("nan"))]
        result: dict[str, Any] = {}
        for cost, value in curve:
            done = cost == curve[-1][0]
            result = {"value": value, "cost": cost, "training_iteration": cost, "done": done}
            if done:  # then neither of the two is asked
                break
            searcher.on_trial_result(name, result)
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:  # pyright: ignore
                break
        scheduler.on_trial_complete(None, trial, result)  # pyright: ignore[reportArgumentType]
        searcher.on_trial_complete(name, result)
        spent += result["cost"]
        if math.isfinite(result["value"]):
            last[name] = result["value"]
        found.spent.append(spent)
        found.value.append(table.final(chosen[max(last, key=last.__getitem__)]) if last else 0.0)
        number += 1
    return found


STRATEGIES: dict[str, Callable[[Table, int, float], Found]] = {
    "raytrain": lambda t, seed, b: ours(t, seed, b, {}),
    "no early stopping": lambda t, seed, b: ours(t, seed, b, {"pruner": "none"}),
    "stock": stock,
    "random": lambda t, seed, b: ours(t, seed, b, {"sampler": "random", "pruner": "none"}),
}


def measured(table: Table, seeds: int, budget: float) -> Iterator[dict[str, Any]]:
    """One row per strategy and seed."""
    for seed in range(seeds):
        found = {name: search(table, seed, budget) for name, search in STRATEGIES.items()}
        target = found["random"].at(math.inf)
        for name, one in found.items():
            yield {
                "strategy": name,
                "seed": seed,
                "target": target,
                "trials": len(one.spent),
                "share": one.cost_of(target) / budget,
                "final": one.at(math.inf),
                "spent": one.spent,
                "value": one.value,
            }
        print(f"seed {seed} done", flush=True)


def report(rows: list[dict[str, Any]], table: Table, budget: float) -> str:
    """Markdown."""
    lines = [
        "| strategy | budget to random's best | reached | found with all of it | trials |",
        "|---|---|---|---|---|",
    ]
    for name in STRATEGIES:
        mine = [row for row in rows if row["strategy"] == name]
        shares = sorted(min(1.0, row["share"]) for row in mine)
        reached = sum(math.isfinite(row["share"]) for row in mine)
        finals = [100 * row["final"] for row in mine]
        quarter, half, three = (_quantile(shares, q) for q in (0.25, 0.5, 0.75))
        spread = statistics.stdev(finals) if len(finals) > 1 else 0.0
        lines.append(
            f"| {name} | {half:.0%} ({quarter:.0%} to {three:.0%}) | {reached} of {len(mine)} | "
            f"{statistics.fmean(finals):.1f} ± {spread:.1f} | "
            f"{statistics.median(row['trials'] for row in mine):.0f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{len({row['seed'] for row in rows})} seeds; budget {budget:g} forward-equivalents per image "
            f"({budget / table.length:.0f} whole runs), one trial at a time; medians and quartiles of the "
            f"share of the budget, 100 % where the target was not reached; the best of the "
            f"{table.size()} configurations is {100 * table.best():.1f}. {hardware()}; {_versions()}.",
            "",
        ]
    )


def _quantile(values: list[float], share: float) -> float:
    place = share * (len(values) - 1)
    low, high = math.floor(place), math.ceil(place)
    return values[low] + (place - low) * (values[high] - values[low])


def figure(rows: list[dict[str, Any]], budget: float, file: Path) -> None:
    """The mean over seeds of what was found, against the cost."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = picture.subplots()
    looks = {
        "raytrain": "#0072b2",
        "no early stopping": "#56b4e9",
        "stock": "#d55e00",
        "random": "#666666",
    }
    costs = [budget * step / 200 for step in range(1, 201)]
    for name, colour in looks.items():
        mine = [Found(row["spent"], row["value"]) for row in rows if row["strategy"] == name]
        means = [100 * statistics.fmean(one.at(cost) for one in mine) for cost in costs]
        axes.plot(costs, means, label=name, color=colour, lw=2)
    axes.set_xlabel("spent, forward-equivalents per image")
    axes.set_ylabel("robust validation accuracy of the best so far, %")
    finals = [100 * row["final"] for row in rows]
    axes.set_ylim(min(finals) - 8, max(finals) + 1)  # the way up from nothing is not of interest
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    picture.savefig(file, dpi=160)


def _versions() -> str:
    from importlib.metadata import version

    assert ray_session
    return ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna", "raytrain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=30, help="budget, in whole runs")
    parser.add_argument("--table", type=Path, default=HERE / "curves-digits.parquet")
    options = parser.parse_args()
    table = Table(options.table)
    budget = options.runs * table.length
    rows = list(measured(table, options.seeds, budget))
    text = report(rows, table, budget)
    print(text)
    (HERE / "search-quality.md").write_text(text)
    pq.write_table(pa.Table.from_pylist(rows), HERE / "search-quality.parquet")
    figure(rows, budget, HERE / "search-quality.png")


if __name__ == "__main__":
    main()
