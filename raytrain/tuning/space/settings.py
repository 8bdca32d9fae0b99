"""What a sweep is after, how it searches, and when it ends."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from raytrain.core.epoch_metrics import METRICS
from raytrain.core.spec import Number, Spec

Sampler = Literal["tpe", "gp", "nsga2", "random", "grid", "pbt"]
Pruner = Literal["asha", "hyperband", "median", "none"]

_LEARNS_FROM_STOPPED = ("tpe", "random", "grid")  # gp and nsga2 look at finished trials alone


def _known(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{metric} is not one of {', '.join(METRICS)}")


class Objective(Spec):
    """An objective of the search: a metric at a trial's last epoch."""

    metric: Annotated[
        str, Field(description="at a trial's last epoch", examples=list(METRICS))
    ] = "valid/robust"
    mode: Annotated[Literal["max", "min"], Field(description="which end is better")] = "max"

    @model_validator(mode="after")
    def _is_a_metric(self) -> Objective:
        _known(self.metric)
        return self

    @property
    def sign(self) -> int:
        """1 where larger is better, -1 where smaller is."""
        return 1 if self.mode == "max" else -1


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Objectives = Annotated[
    tuple[Objective, ...],
    BeforeValidator(
        _several,
        json_schema_input_type=Objective | Annotated[list[Objective], Field(min_length=1)],
    ),
    Field(min_length=1),
]
"""One objective, or a list of them: then the sweep looks for a Pareto front."""


class Limit(Spec):
    """Bounds on a metric of the last epoch; beyond them a trial is infeasible, however good."""

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Limit:
        if self.min is None and self.max is None:
            raise ValueError("expected min or max, or both")
        return self

    def excess(self, value: float) -> float:
        """How far beyond its bounds a value is; at most 0 within them."""
        below = float("-inf") if self.min is None else self.min - value
        above = float("-inf") if self.max is None else value - self.max
        return max(below, above)


class Population(Spec):
    """Population-based training: at every interval the worst go on from the best, with numbers changed.

    Jaderberg et al. 2017 (arXiv 1711.09846): truncation selection, and perturbation by a factor or a
    fresh draw.
    """

    size: Annotated[PositiveInt, Field(description="members, each trained to the end")] = 8
    interval: Annotated[
        PositiveFloat | None,
        Field(description="between exchanges, in the sweep's unit; default: a tenth of a run"),
    ] = None
    share: Annotated[
        float, Field(gt=0, le=0.5, description="worst share that copies from the best share")
    ] = 0.25
    factor: Annotated[
        float, Field(gt=1, description="numbers are multiplied or divided by it")
    ] = 1.25
    resample: Annotated[
        float, Field(ge=0, le=1, description="probability of a fresh draw instead")
    ] = 0.25


class Search(Spec):
    """How configurations are proposed, and which trials are stopped early."""

    sampler: Annotated[
        Sampler,
        Field(description="pbt: population-based training, which changes trials as they run"),
    ] = "tpe"
    startup: Annotated[
        PositiveInt, Field(description="random trials before a sampler has enough to learn from")
    ] = 10
    pruner: Annotated[
        Pruner | None,
        Field(
            description="early stopping; default asha, none where the sampler cannot learn from it"
        ),
    ] = None
    first_rung: Annotated[
        PositiveFloat | None,
        Field(
            description="cost before a trial may be stopped: epochs, or FE per image where runs are "
            "measured in them; default: a run / reduction"
        ),
    ] = None
    reduction: Annotated[int, Field(ge=2, description="share that goes on is 1/reduction")] = 3
    defaults: Annotated[
        bool,
        Field(description="try the published defaults first, of every algorithm in the space"),
    ] = True
    earlier: Annotated[
        str | None, Field(description="MLflow experiment whose finished runs are learned from")
    ] = None
    earlier_best: Annotated[
        NonNegativeInt, Field(description="configurations from there to be tried again here")
    ] = 3
    population: Population = Population()
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _pruner_is_learned_from(self) -> Search:
        if self.pruner in (None, "none") or self.sampler in _LEARNS_FROM_STOPPED:
            return self
        raise ValueError(
            f"pruner: {self.sampler} learns nothing from trials that {self.pruner} stops; expected none"
        )


class Budget(Spec):
    """When a sweep ends: at whichever comes first."""

    trials: Annotated[
        PositiveInt | None,
        Field(
            description="trials that ended, early-stopped included; default 20, if nothing else is given"
        ),
    ] = None
    fe_per_image: Annotated[
        PositiveFloat | None,
        Field(description="forward-equivalents per training image, over all trials"),
    ] = None
    hours: Annotated[PositiveFloat | None, Field(description="of this launch")] = None
    concurrent: Annotated[
        PositiveInt | None, Field(description="trials at once; default: what fits the cluster")
    ] = None


def sees_stopped(search: Search, objectives: Objectives) -> bool:
    """Whether the sampler looks at trials that were stopped early (pbt looks at none)."""
    return len(objectives) == 1 and search.sampler in (*_LEARNS_FROM_STOPPED, "pbt")


def pruner_of(search: Search, objectives: Objectives) -> Pruner:
    """The pruner in use."""
    if search.pruner is not None:
        return search.pruner
    fits = search.sampler in _LEARNS_FROM_STOPPED and len(objectives) == 1
    return "asha" if fits else "none"


def check_plan(search: Search, objectives: Objectives) -> None:
    """Refuse combinations that would not mean anything.

    Raises:
        ValueError: with what was expected.
    """
    if len(objectives) > 1 and pruner_of(search, objectives) != "none":
        raise ValueError(
            f"search.pruner: {search.pruner} cannot rank trials by several objectives; expected none"
        )
    if len(objectives) > 1 and search.sampler == "pbt":
        raise ValueError("search.sampler: pbt ranks its members by one objective; expected one")
    if len({objective.metric for objective in objectives}) < len(objectives):
        raise ValueError("objective: a metric is given twice")


def check_limits(limits: dict[str, Limit]) -> None:
    """Refuse bounds on what is no metric.

    Raises:
        ValueError: naming the metrics there are.
    """
    for metric in limits:
        try:
            _known(metric)
        except ValueError as error:
            raise ValueError(f"feasible: {error}") from None


CATASTROPHIC: dict[str, Limit] = {"valid/robust_drop": Limit(max=0.5)}
"""Half of the robustness that was there has been lost: infeasible, unless the sweep sets another limit."""
