"""The interface of an algorithm, and the recipe a configuration names it by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, model_validator

from raytrain.attacks import NEVER, AbstractStopping, Init, ProjectedAscent, Uniform
from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card
from raytrain.core.cost import CostSetting
from raytrain.core.losses import CrossEntropy, Smoothing
from raytrain.core.registry import OneOf, Registry
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import SCHEDULABLE, Batch, BatchNorm, Spec, StepSize
from raytrain.outer.base import AbstractOuter, names_of


class AbstractAlgorithm(ABC):
    """The interface that the trainer uses. `step` changes the `TrainState` and nothing else."""

    ball: AbstractThreatModel
    outer: AbstractOuter

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        """What it keeps between steps, by name, the outer update's memory included.

        Raises:
            RequestError: if it cannot run on this network or data.
        """
        return self.outer.memory(setup)

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> StepResult:
        """One mini-batch: find a perturbation, move the weights."""

    @abstractmethod
    def fe_per_image(self, setting: CostSetting) -> float:
        """Forward-equivalents of a step per image, as `Meter` counts them: the mean over many steps.

        Where `cost_varies`, those of a step in which no sample stops early.
        """

    @property
    def cost_varies(self) -> bool:
        """Whether a step may cost less than `fe_per_image`, as attacks stop early."""
        return False

    def measures(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Numbers of its own for the record of an epoch, `batch` being its last: a collective."""
        del batch
        return self.outer.measures(state)


class AbstractRecipe(Spec):
    """A paper's hyperparameters, flat and in the paper's names; `build` turns them into parts that run.

    `preset` (where a recipe has presets) names a set of defaults; fields that are given win over it.
    Numbers that a curriculum may change are annotated with `SCHEDULABLE`.
    """

    card: ClassVar[Card]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    name: Any = None

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_the_rest(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**cls.presets.get(str(values.get("preset")), {}), **values}

    def build(self, ball: AbstractThreatModel, outer: AbstractOuter) -> AbstractAlgorithm:
        """The algorithm for a threat model and an outer update.

        Raises:
            ValueError: with the reason, if it is not defined for them.
        """
        norms = self.card.norms
        if norms is not None and ball.norm not in norms:
            raise ValueError(
                f"threat.norm: {self.name} is not defined in {ball.norm}{self.why_not_in(ball.norm)}; "
                f"expected {' or '.join(norms)}"
            )
        if reason := self._why_not_with(outer):
            expected = names_of(lambda other: self._why_not_with(other) is None)
            raise ValueError(
                f"outer: {outer.name} does not go with {self.name}: {reason}; expected {expected}"
            )
        return self.assemble(ball, outer)

    @abstractmethod
    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> AbstractAlgorithm:
        """The parts, for a combination that makes sense."""

    def why_not_in(self, norm: str) -> str:
        """`: reason` for a norm that the card leaves out."""
        del norm
        return ""

    def why_not_displaced(self) -> str | None:
        """Why its weight gradient cannot be measured at displaced weights; None if it can."""
        return None

    def why_not_weighted(self) -> str | None:
        """Why its samples cannot be weighted one by one; None if they can."""
        return None

    def _why_not_with(self, outer: AbstractOuter) -> str | None:
        displaced = self.why_not_displaced() if outer.displaces_weights else None
        return displaced or (self.why_not_weighted() if outer.weighs_samples else None)


RECIPES = Registry(AbstractRecipe, "name", group="raytrain.algorithms")

Recipe = Annotated[AbstractRecipe, OneOf(RECIPES, "pgd")]


class Smoothed(AbstractRecipe):
    """A recipe whose training loss has a cross-entropy that may be smoothed."""

    label_smoothing: Smoothing = 0.0

    def cross_entropy(self) -> CrossEntropy:
        """The loss, smoothed as asked."""
        return CrossEntropy(label_smoothing=self.label_smoothing)


class Iterated(AbstractRecipe):
    """A recipe whose attack is projected ascent: the fields of PGD."""

    steps: Annotated[NonNegativeInt, SCHEDULABLE, Field(description="K, inner steps")] = 10
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps/4"
    start: Init = Uniform()
    attack_bn: BatchNorm = "eval"

    def attack(self, stop: AbstractStopping = NEVER, compact: bool = True) -> ProjectedAscent:
        """The attack of these fields, ended by `stop`."""
        return ProjectedAscent(
            start=self.start,
            steps=self.steps,
            step_size=self.step_size,
            stop=stop,
            bn=self.attack_bn,
            compact=compact,
        )


ONE_PASS = "it takes both gradients from one pass at the present weights"
"""Why algorithms that move delta and theta at once do not go with updates at displaced weights."""
