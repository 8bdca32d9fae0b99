"""The plain outer update: a step of the optimiser on the mean loss."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal, final

from raytrain.core.card import Card
from raytrain.core.train_state import TrainState
from raytrain.outer.base import AbstractOuter


@final
class Plain(AbstractOuter):
    """theta <- optimizer(theta, mean_i grad f_i(theta, delta_i))."""

    card: ClassVar[Card] = Card(
        paper="stochastic gradient descent with momentum, Polyak 1964",
        rule="theta <- optimizer(theta, mean_i grad f_i)",
        cost="3 FE for each forward in the training loss",
    )

    name: Literal["sgd"] = "sgd"

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        return ()
