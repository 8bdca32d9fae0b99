"""Clipping of the mean gradient: the baseline of per-example normalisation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, PositiveFloat

from raytrain.core.card import Card, Range
from raytrain.core.network import trainable
from raytrain.core.train_state import TrainState
from raytrain.outer.base import AbstractOuter


@final
class Clip(AbstractOuter):
    """g <- g min(1, max_norm / |g|), g = mean_i grad f_i;  theta <- optimizer(theta, g).

    Pascanu et al. 2013 (arXiv 1211.5063). One global l2 norm over all weights, of the gradient that
    is already averaged over the workers, before weight decay and momentum. torch adds 1e-6 to |g|: a
    clipped gradient is shorter than max_norm by the share 1e-6 / |g|. With one sample per batch it is
    ENGM, to that rounding; with more it is not.
    """

    card: ClassVar[Card] = Card(
        paper="On the difficulty of training recurrent neural networks, Pascanu et al. 2013, "
        "arXiv 1211.5063",
        rule="g <- g min(1, max_norm / |g|), g the mean gradient",
        cost="none beyond sgd",
        ranges={"max_norm": Range(0.1, 10, log=True)},
    )

    name: Literal["clip"] = "clip"
    max_norm: Annotated[
        PositiveFloat, Field(description="largest l2 norm of the mean gradient")
    ] = 1.0

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        return ()

    def step(self, state: TrainState, rate: float = 1.0) -> None:
        torch.nn.utils.clip_grad_norm_(trainable(state.model), self.max_norm)
        super().step(state, rate)
