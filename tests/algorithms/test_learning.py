"""Each robust algorithm, at its defaults, learns what natural training does not: real digits, two seeds."""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import Any

import pytest
from helpers import unchecked

from raytrain.algorithms import RECIPES
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.training.trainer import fit

SEEDS = range(2)
MARGIN = 0.25
"""At this length natural training ends near 0.17, the weakest robust algorithm above 0.5."""

ROBUST: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in RECIPES if name not in {"natural", "nested"}},
    "pgd with clip": {"algorithm": "pgd", "outer": "clip"},
    "pgd with engm": {"algorithm": "pgd", "outer": "engm"},
    "pgd with awp": {"algorithm": "pgd", "outer": "awp"},
}

EPOCHS = {"free": 2, "natural": 12}
"""Others train for six, on 400 images: cheap, and long enough for the difference to be there."""


@lru_cache(maxsize=1)
def natural() -> float:
    """Mean PGD-20 accuracy of natural training."""
    return robust_accuracy({"algorithm": "natural"})


def robust_accuracy(changes: dict[str, Any]) -> float:
    """Mean PGD-20 accuracy on the validation images, at the last epoch."""
    found: list[float] = []
    for seed in SEEDS:
        epochs = EPOCHS.get(str(changes["algorithm"]), 6)
        values = {
            "data": {"name": "digits", "validation": 0.2, "train_size": 400},
            "epochs": epochs,
            "batch_size": 32,
            "seed": seed,
            "evaluation": {"steps": 20, "every": epochs},
            "device": "cpu",
        }
        with unchecked():
            *_, (last, _) = fit(
                RunConfig.model_validate({**values, **changes}), DistributedContext()
            )
        assert last.robust is not None
        found.append(last.robust)
    return statistics.mean(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROBUST)
def test_robust_training_beats_natural_training_by_a_wide_margin(name: str) -> None:
    assert robust_accuracy(ROBUST[name]) > natural() + MARGIN
