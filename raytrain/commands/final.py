"""The end of a sweep: its best configurations on several seeds, and on the test set, once."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from raytrain.commands.evaluate import evaluate
from raytrain.commands.sweep_results import write_run_ids
from raytrain.config.run import RunConfig
from raytrain.core.files import write_atomically
from raytrain.tracking import Tracker
from raytrain.training.checkpoint import BEST, LAST
from raytrain.training.run_folder import fetch_checkpoints
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.executor import execute, trainable_for
from raytrain.tuning.mlflow_runs import PARENT
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import Budget, Limit, Objectives, Search
from raytrain.tuning.study import open_study
from raytrain.tuning.trial_manager import TrialManager

_TEST = "test.json"


@dataclass(frozen=True)
class Finals:
    """The runs to be made, as a space whose only dimension is which of them."""

    base_run: RunConfig
    objective: Objectives
    runs: tuple[RunConfig, ...]
    labels: tuple[dict[str, Any], ...]  # rank (from 1), trial and seed of each

    search = Search(sampler="grid", pruner="none", defaults=False)

    @classmethod
    def of(
        cls,
        base: RunConfig,
        objective: Objectives,
        best: list[tuple[TrialRow, RunConfig]],
        seeds: int,
    ) -> Finals:
        """`best` in their order, each with seeds that the search did not use."""
        runs, labels = [], []
        for rank, (row, run) in enumerate(best, start=1):
            for seed in range(run.seed + 1, run.seed + 1 + seeds):
                runs.append(run.model_copy(update={"seed": seed, "run_name": None}))
                labels.append({"rank": rank, "trial": row.number, "seed": seed})
        return cls(base, objective, tuple(runs), tuple(labels))

    @property
    def feasible(self) -> Mapping[str, Limit]:
        return {}

    @property
    def budget(self) -> Budget:
        return Budget(trials=len(self.runs))

    def sample(self, trial: Any) -> dict[str, Any]:
        return self.values({"run": trial.suggest_int("run", 0, len(self.runs) - 1)})

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self.labels[params["run"]]

    def violations(self, values: Mapping[str, Any]) -> dict[str, float]:
        del values
        return {}

    def run(self, values: Mapping[str, Any]) -> RunConfig:
        return self.runs[self.labels.index(dict(values))]

    def hash(self) -> str:
        """Another set of runs has another one."""
        text = json.dumps([[run.signature(), run.seed] for run in self.runs])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class FinalRow:
    """A configuration on the test set: means and standard deviations over its seeds."""

    rank: int  # by validation, in the search
    trial: int
    seeds: int
    clean: float
    clean_std: float
    robust: float
    robust_std: float
    attack: str
    fe_per_sample: float


def train_finals(
    manager: TrialManager,
    space: SearchSpace,
    tracker: Tracker,
    count: int,
    seeds: int,
    concurrent: int | None,
    watch: Callable[[SweepProgress], None] | None,
) -> list[FinalRow]:
    """Train the best again and evaluate them; what an earlier launch did is not done twice."""
    ranked = _ranked(manager, space)[:count]
    if not ranked:
        return []
    finals = Finals.of(
        space.base_run, space.objective, [(row, space.run(row.params)) for row in ranked], seeds
    )
    folder = manager.folder / f"final-{finals.hash()[:6]}"
    name = f"{manager.study.study_name}-{folder.name}"
    fidelity = manager.fidelity
    study = open_study(name, folder, finals, finals.hash(), None, fidelity.length, space.study)
    second = TrialManager(
        study, finals, tracker, folder, fidelity, watch, prefix=f"{folder.name}-"
    )
    second.recover()
    if not study.user_attrs.get("planned"):
        known = len(second.history.trials())
        for number in range(known, len(finals.runs)):
            second.enqueue({"run": number})
        study.set_user_attr("planned", True)
    execute(second, trainable_for(space.base_run), concurrent)
    write_run_ids(tracker, second)
    done = [row for row in second.history.rows() if row.state == "complete"]
    storage = space.base_run.storage
    return summarised([(row, test_once(folder / "trials" / row.handle, storage)) for row in done])


def log_finals(tracker: Tracker, folder: Path, finals: list[FinalRow]) -> None:
    """The table of the finals, and the first of them on the sweep's own run."""
    if not finals:
        return
    file = folder / "final.yaml"
    write_atomically(file, yaml.safe_dump([asdict(row) for row in finals], sort_keys=False))
    tracker.artifact(PARENT, file)
    first = finals[0]
    tracker.log(
        PARENT,
        {
            "final/clean": first.clean,
            "final/robust": first.robust,
            "final/robust_std": first.robust_std,
            "final/seeds": float(first.seeds),
        },
    )


def test_once(folder: Path, storage: Path | str) -> dict[str, Any]:
    """Test-set accuracy of the training in `folder`; stored there, so that it is evaluated once."""
    fetch_checkpoints(folder)
    kept = folder / _TEST
    if kept.is_file():
        return json.loads(kept.read_text())
    which = "best" if (folder / BEST).is_file() else "last"
    result = evaluate(folder / (BEST if which == "best" else LAST), storage=storage)
    assert result.strongest is not None
    result_values = {
        "clean": result.accuracies["clean"].value,
        "robust": result.accuracies[result.strongest].value,
        "attack": result.strongest,
        "images": result.images,
        "fe": result.fe,
        "which": which,
        "trusted": result.trusted,
    }
    write_atomically(kept, json.dumps(result_values))
    return result_values


def summarised(
    rows: list[tuple[TrialRow, dict[str, Any]]],
) -> list[FinalRow]:
    """One row per configuration; `rows` are trainings with their test results."""
    by_rank: dict[int, list[tuple[TrialRow, dict[str, Any]]]] = {}
    for row, tested in rows:
        by_rank.setdefault(row.params["rank"], []).append((row, tested))
    return [_mean(rank, by_rank[rank]) for rank in sorted(by_rank)]


def _mean(rank: int, rows: list[tuple[TrialRow, dict[str, Any]]]) -> FinalRow:
    clean = [tested["clean"] for _, tested in rows]
    robust = [tested["robust"] for _, tested in rows]
    costs = [row.metrics["cost/fe_per_sample"] for row, _ in rows]
    return FinalRow(
        rank=rank,
        trial=rows[0][0].params["trial"],
        seeds=len(rows),
        clean=statistics.fmean(clean),
        clean_std=statistics.stdev(clean) if len(clean) > 1 else 0.0,
        robust=statistics.fmean(robust),
        robust_std=statistics.stdev(robust) if len(robust) > 1 else 0.0,
        attack=rows[0][1]["attack"],
        fe_per_sample=statistics.fmean(costs),
    )


def _ranked(manager: TrialManager, space: SearchSpace) -> list[TrialRow]:
    """Finished trials, best first by validation; of several objectives, the front by the first."""
    several = len(space.objective) > 1
    rows = manager.history.front() if several else manager.history.rows()
    done = [row for row in rows if row.state == "complete" and row.value is not None]
    return sorted(done, key=lambda row: -space.objective[0].sign * row.values[0])
