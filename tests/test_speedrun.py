"""The run files of the speed record and the space around them: valid, alike, and trained for a few steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.cost_estimate import estimate_cost
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.training.trainer import fit
from raytrain.tuning.space.reading import read_space

ROOT = Path(__file__).parents[1]
FILES = {"3min": 690, "10min": 2300}  # FE per image
SMALL: dict[str, Any] = {
    "data.name": "digits",
    "data.train_size": 64,
    "data.validation": 40,
    "model": "small_cnn",
    "batch_size": 32,
    "device": "cpu",
}


def run_file(name: str) -> Path:
    return ROOT / "benchmarks" / f"speedrun-{name}.yaml"


def trained(run: RunConfig) -> None:
    """Train to the end and check the numbers, of which there are few."""
    rows = [report for report, _ in fit(run, DistributedContext())]
    assert rows[-1].final and rows[-1].robust is not None
    assert 0 < rows[-1].loss < 10


@pytest.mark.parametrize(("name", "cost"), FILES.items())
def test_a_run_file_is_the_task_and_costs_what_it_says(name: str, cost: float) -> None:
    run = as_run(run_file(name))
    assert (run.data.name, run.model.name, run.precision) == ("cifar10", "resnet18", "bf16")
    assert (run.threat.norm, run.threat.eps, run.model.weights) == ("linf", 8 / 255, None)
    assert estimate_cost(run) == run.fe_per_image == cost
    assert "Not measured" in run_file(name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_run_file_trains(name: str) -> None:
    trained(as_run(run_file(name), {**SMALL, "fe_per_image": 40}))


def test_the_space_is_around_the_run_file_and_trains() -> None:
    space = read_space(ROOT / "search_spaces" / "speedrun.yaml")
    base, file = space.base_run, as_run(run_file("3min"))
    for field in ("data", "model", "threat", "fe_per_image", "batch_size", "precision", "ema"):
        assert getattr(base, field) == getattr(file, field), field
    source = random.Random(0)
    drawn = {
        run.outer.name: run for run in (space.run(space.sample(Draw(source))) for _ in range(9))
    }
    assert drawn.keys() == {"sgd", "awp"}
    for run in drawn.values():
        trained(as_run(run, {**SMALL, "fe_per_image": 30}))


class Draw:
    """A trial that draws uniformly."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return self._source.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return self._source.randint(low, high)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._source.choice(choices)
