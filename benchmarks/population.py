"""Population-based training here against Ray Tune's scheduler and against no exchange, at equal cost.

Every seed draws four members of the same space (learning rate, step size of the attack), on the digits. The
three methods train them from the same configurations for the same epochs, `--concurrent` at once; none is
drawn beyond these, so that a random search is the same members without an exchange. A row is the best
member's `valid/robust` at the end, in per cent. Ray's scheduler is asynchronous, its default.

    python benchmarks/population.py --seeds 3 --concurrent 4
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raytrain.commands.tune import tune
from raytrain.core.distributed_context import local_context
from raytrain.distributed.jobs import Job, job_rows
from raytrain.tuning.space.search_space import SearchSpace

# isort: split
import ray  # after raytrain, which sets its environment
from ray import tune as ray_tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

MEMBERS, INTERVALS, EPOCHS = 4, 4, 8
LR, STEP = (0.001, 1.0), (0.05, 1.0)
METRIC = "valid/robust"


def space_of(seed: int, folder: Path, concurrent: int) -> SearchSpace:
    return SearchSpace.model_validate(
        {
            "name": "population",
            "base": {
                "data": {"name": "digits", "train_size": 400},
                "algorithm": {"name": "pgd", "steps": 3},
                "epochs": EPOCHS,
                "batch_size": 32,
                "seed": seed,
                "device": "cpu",
                "storage": str(folder),
                "tracking_uri": f"sqlite:///{folder}/mlflow.db",
            },
            "space": {
                "optimizer.lr": {"float": list(LR), "log": True},
                "algorithm.step_size": {"float": list(STEP), "unit": "eps"},
            },
            "search": {
                "sampler": "pbt",
                "seed": seed,
                "population": {"size": MEMBERS, "interval": EPOCHS / INTERVALS},
            },
            "budget": {"concurrent": concurrent},
        }
    )


class Member(ray_tune.Trainable):
    """A run that is trained interval after interval, for Ray Tune's own scheduler."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config, self._folder, self._passed = new_config, Path(tempfile.mkdtemp()), 0
        return True

    def step(self) -> dict[str, Any]:
        self._passed += 1
        space = SearchSpace.model_validate_json(self._config["space"])
        values = space.values({key: self._config[key] for key in space.space})
        until = self._passed / INTERVALS - 1e-9
        job = Job.of(space.run(values), self._folder, resume=True, until=until)
        rows = list(job_rows(job, local_context("cpu"), resume=True))
        return {"robust": rows[-1].metrics()[METRIC], "done": self._passed == INTERVALS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        shutil.copytree(self._folder, checkpoint_dir, dirs_exist_ok=True)
        Path(checkpoint_dir, "passed").write_text(str(self._passed))

    def load_checkpoint(self, checkpoint: Any) -> None:
        shutil.rmtree(self._folder)
        shutil.copytree(checkpoint, self._folder)
        self._passed = int((self._folder / "passed").read_text())


def by_raytrain(space: SearchSpace) -> tuple[float, int, list[dict[str, Any]]]:
    """The best member's result, the number of exchanges, the members' first configurations."""
    result = tune(space, name="sweep")
    storage = JournalStorage(JournalFileBackend(str(result.folder / "study.log")))
    (study,) = optuna.get_all_study_names(storage)
    members = [dict(t.params) for t in optuna.load_study(study_name=study, storage=storage).trials]
    assert len(members) == MEMBERS
    exchanges = result.folder / "population.jsonl"
    count = len(exchanges.read_text().splitlines()) if exchanges.is_file() else 0
    return max(row.metrics[METRIC] for row in result.trials), count, members


def by_ray(
    space: SearchSpace, members: list[dict[str, Any]], folder: Path, exchange: bool
) -> float:
    """The best member's result under Ray Tune, with its scheduler or without an exchange."""
    random.seed(space.search.seed)
    np.random.seed(space.search.seed)
    changed: dict[str, Any] = {
        "optimizer.lr": ray_tune.loguniform(*LR),
        "algorithm.step_size": ray_tune.uniform(*STEP),
    }
    rules = space.search.population
    scheduler = PopulationBasedTraining(
        perturbation_interval=1,
        hyperparam_mutations=changed,
        quantile_fraction=rules.share,
        resample_probability=rules.resample,
        perturbation_factors=(rules.factor, 1 / rules.factor),
    )
    results = ray_tune.Tuner(
        Member,
        param_space={**changed, "space": space.model_dump_json(by_alias=True)},
        tune_config=ray_tune.TuneConfig(
            metric="robust",
            mode="max",
            num_samples=MEMBERS,
            search_alg=BasicVariantGenerator(points_to_evaluate=members),
            scheduler=scheduler if exchange else None,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(name="pbt", storage_path=str(folder), verbose=0),
    ).fit()
    assert not results.errors, results.errors
    return max(result.metrics["robust"] for result in results if result.metrics)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="for runs; default: temporary")
    args = parser.parse_args()
    root = args.folder or Path(tempfile.mkdtemp())
    columns = ("raytrain", "Ray's PBT", "no exchange")
    print(f"| seed | {' | '.join(columns)} | exchanges of raytrain's |\n|---|{'---|' * 4}")
    table = []
    for seed in range(args.seeds):
        folder = (root / str(seed)).resolve()
        space = space_of(seed, folder, args.concurrent)
        ours, exchanges, members = by_raytrain(space)
        ray.init(
            address="local", num_cpus=args.concurrent, include_dashboard=False, log_to_driver=False
        )
        theirs, none = (by_ray(space, members, folder / str(on), on) for on in (True, False))
        ray.shutdown()
        table.append([100 * value for value in (ours, theirs, none)])
        cells = " | ".join(f"{value:.1f}" for value in table[-1])
        print(f"| {seed} | {cells} | {exchanges} |", flush=True)
    spread = [
        f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in zip(*table, strict=True)
    ]
    print(f"| all | {' | '.join(spread)} | |")


if __name__ == "__main__":
    main()
