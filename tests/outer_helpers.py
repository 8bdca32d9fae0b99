"""What the tests of outer updates share: objectives, recipes, and updates at a fixed perturbation."""

from __future__ import annotations

from typing import Any

import torch
from helpers import ball_of, moved, state_of, visited
from torch import Tensor, nn

from raytrain.algorithms import (
    RECIPES,
    AbstractRecipe,
    Dynamic,
    Free,
    L2l,
    MartRecipe,
    Nested,
    NestedRecipe,
    Pgd,
    SiHg,
    Ssds,
    TradesRecipe,
    Yopo,
)
from raytrain.attacks import ProjectedAscent, Zero
from raytrain.core.losses import AbstractLoss, CrossEntropy, Mart, Reference, Trades, cross_entropy
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, Delta, PerSample, Predict
from raytrain.outer.base import AbstractOuter

CE = CrossEntropy()
OBJECTIVES: dict[str, AbstractLoss] = {
    "cross_entropy": CE,
    "trades": Trades(),
    "mart": Mart(),
}
INSTANCES: dict[str, AbstractRecipe] = {
    **{name: kind() for name, kind in RECIPES.items() if kind is not NestedRecipe},
    "nested": NestedRecipe(attack=ProjectedAscent(steps=2, step_size="eps/2", bn="eval")),
    "free": Free(m=2),
    "pgd": Pgd(steps=2),
    "yopo": Yopo(m=2, n=1),
    "trades": TradesRecipe(steps=2),
    "mart": MartRecipe(steps=2),
    "dynamic": Dynamic(steps=3),
    "l2l": L2l(steps=2),
    "si_hg_J": SiHg(mode="J"),
    "ssds_jacobi": Ssds(order="jacobi"),
}
"""Every recipe with few steps, and two that measure both gradients in one pass."""


class Scaled(AbstractLoss):
    """Cross-entropy times a number, or a number per label."""

    by: tuple[float, ...]

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return self.outer(predict, batch, delta, reference)

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        losses = cross_entropy(predict(batch.images + delta), batch.labels)
        return torch.tensor(self.by, dtype=losses.dtype)[batch.labels] * losses


def ready(
    outer: AbstractOuter, model: nn.Module, objective: AbstractLoss = CE, **options: Any
) -> TrainState:
    """A fresh state of an algorithm whose perturbation is zero; `options` are those of `state_of`."""
    attack = ProjectedAscent(start=Zero(), steps=0, step_size="eps", bn="eval")
    return state_of(model, Nested(ball_of("linf"), attack, outer, objective), **options)


def update(
    outer: AbstractOuter,
    state: TrainState,
    batch: Batch,
    objective: AbstractLoss = CE,
    *,
    delta: Tensor | None = None,
    given: Tensor | None = None,
    reference: Reference = (),
    latest: Tensor | None = None,
) -> Tensor:
    """One update of the weights, at the perturbation `moved` unless another is given; its losses."""
    oracle = state.oracle(batch, objective, "eval")
    oracle.set_reference(*reference)
    oracle.latest = latest
    return outer.update(state, oracle, moved(batch) if delta is None else delta, given)


def trained(
    recipe: AbstractRecipe, outer: AbstractOuter, steps: int = 2, *, epoch: int = 0
) -> TrainState:
    """The state of a network with BatchNorm after a few steps with this outer update."""
    algorithm = recipe.build(ball_of("linf"), outer)
    return visited(algorithm, steps, batch_norm=True, epoch=epoch, lr=0.02, weight_decay=0.01)
