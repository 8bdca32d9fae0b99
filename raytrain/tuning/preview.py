"""What a sweep would do, without doing it: the space, samples of it, and an estimate of the cost."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from raytrain.config.cost_estimate import estimate_cost, is_bound
from raytrain.config.run import RunConfig
from raytrain.training.setup import preflight
from raytrain.tuning.choices import check_choices
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.pruners import first_rung
from raytrain.tuning.space.draws import Draw
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import Budget, Pruner, Search, pruner_of

_SHOWN = 5
_PRICED = 24  # random configurations behind the estimate
_TRIES = 100  # draws for each of them, until the constraints hold


@dataclass(frozen=True)
class Preview:
    """All prices in forward-equivalents per training image; those of adaptive methods are upper bounds."""

    name: str
    rows: list[tuple[str, str, str]]  # path, range, condition
    constraints: list[str]
    samples: list[tuple[dict[str, Any], float]]
    images: int  # training images
    run_min: float
    run_mean: float
    run_max: float
    bound: bool  # whether runs may cost less: their attacks stop on their own, or they do
    trials: int | None  # that the budget allows for
    total: float | None  # if no trial is stopped early
    early_stopped: float | None  # if the pruner stops as many as it may
    budget: Budget
    pruner: Pruner

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {**asdict(self), "budget": self.budget.model_dump()}

    def words(self) -> dict[str, str]:
        """The estimate, for people."""
        said = {
            "one run": f"{'at most ' if self.bound else ''}{self.run_mean:,.0f} FE per image on average, "
            f"{self.run_min:,.0f} to {self.run_max:,.0f}; {self.images:,} training images",
        }
        if self.trials is not None and self.total is not None:
            about = f"about {self.trials} trials, {self.total:,.0f} FE per image"
            if self.early_stopped is not None:
                about += f" without early stopping, {self.early_stopped:,.0f} with {self.pruner}"
            said["the sweep"] = f"{about} ({self.total * self.images:,.0f} forward passes at most)"
        limits = {k: v for k, v in self.budget.model_dump().items() if v is not None}
        said["budget"] = ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "none"
        return said


def preview_space(space: SearchSpace) -> Preview:
    """The preview of a space.

    Raises:
        RequestError: as `tune` would.
    """
    check_choices(space)
    splits = preflight(space.base_run)
    drawn = [values for seed in range(_PRICED) if (values := _drawn(space, seed)) is not None]
    runs = [space.run(values) for values in drawn]
    prices = [estimate_cost(run) for run in runs]
    mean = statistics.fmean(prices)
    trials = _trials(space, mean)
    total = None if trials is None else trials * mean
    share = _early_share(space.base_run, space.search, pruner_of(space.search, space.objective))
    return Preview(
        name=space.name,
        rows=space.rows(),
        constraints=list(space.constraints),
        samples=list(zip(drawn[:_SHOWN], prices, strict=False)),
        images=splits.train.num_images,
        run_min=min(prices),
        run_mean=mean,
        run_max=max(prices),
        bound=any(is_bound(run) for run in runs),
        trials=trials,
        total=total,
        early_stopped=None if total is None or share == 1 else total * share,
        budget=space.budget,
        pruner=pruner_of(space.search, space.objective),
    )


def _drawn(space: SearchSpace, seed: int) -> dict[str, Any] | None:
    """A random configuration that the constraints allow."""
    source = random.Random(seed)
    for _ in range(_TRIES):
        values = space.sample(Draw(source.randrange(2**31), {}))
        if space.allows(values):
            return values
    return None


def _trials(space: SearchSpace, mean: float) -> int | None:
    if space.search.sampler == "grid":
        return sum(1 for _ in space.grid())
    known = [] if space.budget.trials is None else [space.budget.trials]
    if space.budget.fe_per_image is not None:
        known.append(math.ceil(space.budget.fe_per_image / mean))
    return min(known, default=None)


def _early_share(base: RunConfig, search: Search, pruner: Pruner) -> float:
    """The share of all cost that successive halving leaves, if it stops as many as it may."""
    if pruner != "asha":
        return 1.0
    length = Fidelity.of(base, 1).length
    rung = float(first_rung(pruner, search, length))
    spent, before, share = 0.0, 0.0, 1.0
    while rung < length:
        spent += share * (rung - before)
        before, rung, share = rung, rung * search.reduction, share / search.reduction
    return (spent + share * (length - before)) / length
