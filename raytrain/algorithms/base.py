"""Interface of algorithms, and the recipes by which a configuration selects them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, model_validator

from raytrain.attacks import NEVER, AbstractStopping, Init, ProjectedAscent, Uniform
from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable
from raytrain.core.losses import CrossEntropy, Smoothing
from raytrain.core.registry import OneOf, Registry
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import SCHEDULABLE, AttackBatchNorm, Batch, Spec, StepSize
from raytrain.outer.base import AbstractOuter, names_of


class AbstractAlgorithm(ABC):
    """The interface that the trainer uses. `step` changes the `TrainState` and nothing else."""

    ball: AbstractThreatModel
    outer: AbstractOuter

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        """Return the state that it keeps between steps, by name, with that of the outer update.

        Raises:
            RequestError: if it cannot run on this network or data.
        """
        return self.outer.memory(setup)

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> StepResult:
        """Run one mini-batch: find a perturbation, update the weights."""

    def replay_key(self, state: TrainState) -> Hashable:
        """All that the next `step` decides on the host, beside this object itself.

        Steps with equal keys run the same operations on the same tensors, so that one of them can be
        recorded, as a CUDA graph, and replayed for the others. Such a step reads no tensor on the host,
        changes tensors of the state in place, and counts in the meter or in `counts` of a part.

        Raises:
            NotReplayable: with the reason, if its steps are not of this kind.
        """
        raise NotReplayable(f"{type(self).__name__} does not define replay_key")

    @abstractmethod
    def fe_per_image(self, setting: CostSetting) -> float:
        """Forward-equivalents of a step per image, as `Meter` counts them: the mean over many steps.

        Where `cost_varies`, those of a step in which no sample stops early.
        """

    def why_not_mixed(self) -> str | None:
        """Why it cannot train on images that are mixed of two (CutMix); None if it can."""
        return f"{type(self).__name__} does not define why_not_mixed"

    @property
    def cost_varies(self) -> bool:
        """Whether a step may cost less than `fe_per_image`, because attacks stop early."""
        return False

    def measures(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Return metrics of the algorithm for an epoch, `batch` being its last: a collective."""
        del batch
        return self.outer.measures(state)


class AbstractRecipe(Spec):
    """Hyperparameters of a paper, flat and by the paper's names; `build` makes the algorithm of them.

    `preset` (where a recipe has presets) names a set of defaults; given fields override it.
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
        """Return the algorithm for a threat model and an outer update.

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
        """Return the algorithm, for a combination that `build` has checked."""

    def why_not_in(self, norm: str) -> str:
        """Return `: reason` for a norm that is not on the card."""
        del norm
        return ""

    def why_not_displaced(self) -> str | None:
        """Why its weight gradient cannot be measured at displaced weights; None if it can."""
        return None

    def why_not_weighted(self) -> str | None:
        """Why its samples cannot be weighted one by one; None if they can."""
        return None

    def why_not_repeated(self) -> str | None:
        """Why some images cannot be trained on more often than others; None if they can."""
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
        """Return the loss, with `label_smoothing`."""
        return CrossEntropy(label_smoothing=self.label_smoothing)


class Iterated(AbstractRecipe):
    """A recipe whose attack is projected ascent: the fields of PGD."""

    steps: Annotated[NonNegativeInt, SCHEDULABLE, Field(description="K, inner steps")] = 10
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps/4"
    start: Init = Uniform()
    attack_bn: AttackBatchNorm = "eval"

    def attack(self, stop: AbstractStopping = NEVER, compact: bool = True) -> ProjectedAscent:
        """Return the attack of these fields with stopping rule `stop`."""
        return ProjectedAscent(
            start=self.start,
            steps=self.steps,
            step_size=self.step_size,
            stop=stop,
            bn=self.attack_bn,
            compact=compact,
        )


REMEMBERS = (
    "it remembers a perturbation of every image, and a mixed image is another one each time"
)
"""Why algorithms with memory per image do not go with CutMix."""

ONE_PASS = "it takes both gradients from one pass at the present weights"
"""Why algorithms that move delta and theta at once do not go with updates at displaced weights."""
