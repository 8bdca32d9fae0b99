"""The interface of an outer update, and the plain one: a step of the optimiser on the mean loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, final

from pydantic import Field
from torch.optim import Optimizer

from raytrain.oracle import Oracle
from raytrain.types import Delta, PerSample, Spec, named


class AbstractOuter(Spec):
    """One update of the weights at a found perturbation."""

    @abstractmethod
    def update(self, oracle: Oracle, delta: Delta, optimizer: Optimizer) -> PerSample:
        """Move the weights; return the losses at the weights before the move."""


@final
class Plain(AbstractOuter):
    """theta <- optimizer(theta, mean_i grad f_i(theta, delta_i))."""

    name: Literal["sgd"] = "sgd"

    def update(self, oracle: Oracle, delta: Delta, optimizer: Optimizer) -> PerSample:
        optimizer.zero_grad(set_to_none=True)
        losses = oracle.theta_grad(delta)
        optimizer.step()
        return losses


Outer = Annotated[Plain, Field(), named("name")]
