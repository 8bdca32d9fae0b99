"""Outer updates whose gradient is measured at displaced weights; another update makes the step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated

from pydantic import Field

from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.train_state import TrainState
from raytrain.outer.base import AbstractOuter, InnerOuter
from raytrain.outer.plain import Plain


class DisplacedOuter(AbstractOuter):
    """An outer update that wraps the update `then`, whose state and metrics it has."""

    then: Annotated[InnerOuter, Field(description="the update at the displaced weights")] = Plain()

    @property
    def weighs_samples(self) -> bool:
        return self.then.weighs_samples

    @property
    def displaces_weights(self) -> bool:
        return True

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        return self.then.replay_key(state, updates)

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        return self.then.memory(setup)

    def measures(self, state: TrainState) -> dict[str, float]:
        return self.then.measures(state)
