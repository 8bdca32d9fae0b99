"""The interface of an algorithm, and the recipe a configuration names it by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.losses import CrossEntropy, Smoothing
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import Outcome, TrainState
from raytrain.core.types import Batch, Card, Spec
from raytrain.outer import AbstractOuter


class AbstractAlgorithm(ABC):
    """All that the loop knows. `step` changes the `TrainState` and nothing else."""

    ball: AbstractThreatModel
    outer: AbstractOuter

    def memory(self, setting: TrainingSetup) -> dict[str, Stateful]:
        """What it keeps between steps, by name, the outer update's memory included.

        Raises:
            RequestError: if it cannot run on this network or data.
        """
        return self.outer.memory(setting)

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> Outcome:
        """One mini-batch: find a perturbation, move the weights."""

    def measures(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Numbers of its own for the record of an epoch, `batch` being its last: a collective."""
        del batch
        return self.outer.measures(state)


class AbstractRecipe(Spec):
    """A paper's hyperparameters, flat and in the paper's names; `build` turns them into parts that run.

    `preset` (where a recipe has presets) names a set of defaults; fields that are given win over it.
    """

    card: ClassVar[Card]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

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
        name = type(self).model_fields["name"].default
        norm = type(ball).model_fields["norm"].default
        if norm not in self.card.norms:
            raise ValueError(
                f"threat.norm: {name} is not defined in {norm}{self.why_not_in(norm)}; "
                f"expected {' or '.join(self.card.norms)}"
            )
        if outer.leaves and (reason := self.why_not_elsewhere()) is not None:
            raise ValueError(f"outer: awp does not go with {name}: {reason}")
        if outer.weighs and (reason := self.why_not_weighted()) is not None:
            raise ValueError(f"outer: engm does not go with {name}: {reason}")
        return self.assemble(ball, outer)

    @abstractmethod
    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> AbstractAlgorithm:
        """The parts, for a combination that makes sense."""

    def why_not_in(self, norm: str) -> str:
        """`, because ...` for a norm that the card leaves out."""
        del norm
        return ""

    def why_not_elsewhere(self) -> str | None:
        """Why its weight gradient cannot be measured at other weights, if so."""
        return None

    def why_not_weighted(self) -> str | None:
        """Why its samples cannot be weighted one by one, if so."""
        return None


class Smoothed(AbstractRecipe):
    """A recipe whose training loss has a cross-entropy that may be smoothed."""

    label_smoothing: Smoothing = 0.0

    def cross_entropy(self) -> CrossEntropy:
        """The loss, smoothed as asked."""
        return CrossEntropy(label_smoothing=self.label_smoothing)


ONE_PASS = "it takes both gradients from one pass at the present weights; expected outer sgd, clip or engm"
"""Why awp does not go with algorithms that move delta and theta at once."""
