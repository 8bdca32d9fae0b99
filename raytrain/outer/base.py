"""The interface of an outer update: where the weight gradient is measured, and how it is applied."""

from __future__ import annotations

from typing import ClassVar

from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.oracle import Oracle, Weigh
from raytrain.core.train_state import TrainState
from raytrain.core.types import Card, Delta, PerSample, Spec


class AbstractOuter(Spec):
    """One update of the weights at a found perturbation.

    `update` is the whole of it. An algorithm that takes its weight gradients in another way (several
    passes, or one pass for both gradients) uses the pieces: `weights` for the mean over the batch,
    `step` once every p.grad is complete. An update that `leaves` has no pieces.
    """

    card: ClassVar[Card]

    @property
    def weighs(self) -> bool:
        """Whether samples count differently, so that `weights` matter."""
        return False

    @property
    def leaves(self) -> bool:
        """Whether the gradient is measured at other weights than the present ones."""
        return False

    def memory(self, setting: TrainingSetup) -> dict[str, Stateful]:
        """What it keeps between steps, by name."""
        del setting
        return {}

    def weights(
        self, state: TrainState, oracle: Oracle, delta: Delta, given: PerSample | None = None
    ) -> PerSample | Weigh | None:
        """Each sample's weight in the mean loss at delta, on top of those that are `given`."""
        del state, oracle, delta
        return given

    def step(self, state: TrainState, rate: float = 1.0) -> None:
        """Move the weights along the gradients that are in p.grad, with `rate` times the learning rate."""
        groups = state.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= rate
        state.optimizer.step()
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr

    def update(
        self,
        state: TrainState,
        oracle: Oracle,
        delta: Delta,
        given: PerSample | None = None,
        rate: float = 1.0,
    ) -> PerSample:
        """Move the weights; return the losses at the weights where the gradient was measured."""
        state.optimizer.zero_grad(set_to_none=True)
        losses = oracle.theta_grad(delta, self.weights(state, oracle, delta, given))
        self.step(state, rate)
        return losses

    def measures(self, state: TrainState) -> dict[str, float]:
        """Numbers of its own for the record of an epoch."""
        del state
        return {}
