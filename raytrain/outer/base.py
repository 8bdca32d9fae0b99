"""Interface of outer updates: the weights at which the gradient is measured, and its application."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable
from raytrain.core.losses import AbstractLoss
from raytrain.core.oracle import Oracle, Weigh
from raytrain.core.registry import OneOf, Registry
from raytrain.core.train_state import TrainState
from raytrain.core.types import Delta, PerSample, Spec


class AbstractOuter(Spec):
    """One update of the weights at a found perturbation.

    `update` is the whole update. An algorithm that computes its weight gradients in another way (several
    passes, or one pass for both gradients) calls its parts: `weights` for the mean over the batch,
    `step` once every p.grad is complete. An update that `displaces_weights` cannot be split.
    """

    card: ClassVar[Card]

    name: Any = None

    @property
    def weighs_samples(self) -> bool:
        """Whether samples count differently, so that `weights` matter."""
        return False

    @property
    def displaces_weights(self) -> bool:
        """Whether the gradient is measured at other weights than the present ones."""
        return False

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        """Return the state that it keeps between steps, by name."""
        del setup
        return {}

    def weights(
        self, state: TrainState, oracle: Oracle, delta: Delta, given: PerSample | None = None
    ) -> PerSample | Weigh | None:
        """Return each sample's weight in the mean loss at delta, multiplied by those that are `given`."""
        del state, oracle, delta
        return given

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        """All that the next so many updates decide on the host; see `AbstractAlgorithm.replay_key`.

        Raises:
            NotReplayable: with the reason, if its steps cannot be recorded and replayed.
        """
        raise NotReplayable(f"outer {self.name} does not define replay_key")

    def step(self, state: TrainState, rate: float = 1.0) -> None:
        """Move the weights along the gradients that are in p.grad, with `rate` times the learning rate."""
        groups = state.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * rate  # not in place: it may be a tensor
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

    def weights_fe(
        self,
        loss: AbstractLoss,
        setting: CostSetting,
        *,
        has_gradient: bool,
        input_gradient: float = 1.0,
    ) -> float:
        """Forward-equivalents of `weights` per image.

        `has_gradient`: an attack has left its last input gradient (`Oracle.latest`). `input_gradient`:
        cost of the input gradient if the weights need it during the training pass.
        """
        del loss, setting, has_gradient, input_gradient
        return 0.0

    def update_fe(self, loss: AbstractLoss, setting: CostSetting, *, has_gradient: bool) -> float:
        """Forward-equivalents of `update` per image, the mean over many updates."""
        return self.weights_fe(loss, setting, has_gradient=has_gradient) + loss.update_fe

    def measures(self, state: TrainState) -> dict[str, float]:
        """Return metrics of the update for an epoch."""
        del state
        return {}


OUTERS = Registry(AbstractOuter, "name", group="raytrain.outers")

Outer = Annotated[AbstractOuter, OneOf(OUTERS, "sgd")]


def names_of(fits: Callable[[AbstractOuter], bool]) -> str:
    """List raytrain's own outer updates for which `fits` holds at their defaults, for a message."""
    *most, last = [name for name, part in OUTERS.own.items() if fits(part.model_validate({}))]
    return f"{', '.join(most)} or {last}" if most else last


def _at_present_weights(outer: AbstractOuter) -> AbstractOuter:
    if outer.displaces_weights:
        expected = names_of(lambda other: not other.displaces_weights)
        raise ValueError(f"{outer.name} displaces the weights itself; expected {expected}")
    return outer


InnerOuter = Annotated[AbstractOuter, OneOf(OUTERS, "sgd"), AfterValidator(_at_present_weights)]
"""An update that another one applies at displaced weights."""
