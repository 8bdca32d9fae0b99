"""YOPO: most inner steps go through the first layer only (Zhang et al. 2019)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, PositiveInt

from raytrain.algorithms.base import AbstractAlgorithm, Smoothed
from raytrain.attacks import Init, Uniform, ascend
from raytrain.core.algorithm_state import Numbers, Stateful, TrainingSetup
from raytrain.core.card import Card, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import CrossEntropy
from raytrain.core.network import stem_share, trainable
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import SCHEDULABLE, Batch, StepSize, in_pixels
from raytrain.outer import AbstractOuter


@final
@dataclass(frozen=True)
class YopoTraining(AbstractAlgorithm):
    """m full passes, each giving the costate p;  n steps after each along grad <p, stem(x + delta)>."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: CrossEntropy
    recipe: Yopo

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        share = Numbers({"share": stem_share(setup.model, _image(setup))})
        return {**self.outer.memory(setup), "stem": share}

    def fe_per_image(self, setting: CostSetting) -> float:
        recipe, loss = self.recipe, self.objective
        weights = self.outer.weights_fe(
            loss, setting, has_gradient=False, input_gradient=loss.outer_forwards + 1.0
        )
        stem = 2 * (recipe.n + 1) * setting.stem_share()
        return recipe.m * (loss.update_fe + stem + weights)

    def replay_key(self, state: TrainState) -> Hashable:
        return self.outer.replay_key(state, self.recipe.m)

    def why_not_mixed(self) -> str | None:
        return self.objective.why_not_mixed()

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        recipe, ball = self.recipe, self.ball
        share = state.part("stem", Numbers)["share"]
        size = in_pixels(recipe.step_size, ball.eps)
        hamiltonian = recipe.stem_grad == "hamiltonian"
        oracle = state.oracle(batch, self.objective, "train")
        delta = recipe.start.delta(ball, batch, None)
        state.optimizer.zero_grad(set_to_none=True)
        first = None
        for _ in range(recipe.m):
            weights = self.outer.weights(state, oracle, delta)
            losses, costate, used = oracle.costate(delta, weights, stem_too=not hamiltonian)
            first = losses if first is None else first
            for _ in range(recipe.n):
                grad = oracle.stem_delta_grad(delta, costate, share)
                moved = ascend(ball, delta, grad, batch.images, size, "steepest")
                delta = ball.feasible(moved, batch.images)
            oracle.stem_theta_grad(delta, _weighted(costate, used), share)
        for parameter in trainable(state.model):
            if parameter.grad is not None:
                parameter.grad /= recipe.m
        state.context.average_grads(state.model)
        self.outer.step(state)
        assert first is not None
        return StepResult(first, delta, torch.full_like(batch.labels, recipe.m * recipe.n))


@final
class Yopo(Smoothed):
    """m times: p = grad_h f(theta, delta) at h = stem(x + delta);  n times:
    delta <- P(delta + step_size * sign grad_delta <p, stem(x + delta)>);
    theta <- theta - lr mean of the m gradients.

    Zhang et al. 2019 (You only propagate once, arXiv 1905.00877), algorithm 1, YOPO-m-n. Images enter
    a network only through its first layer, so a frozen costate p gives input gradients without the
    later layers. The stem's own weight gradient is that of <p, stem(x + delta)> at the *new* delta
    (the Hamiltonian's). Cost: 3 m FE, and 2 m (n + 1) times the first layer's share of a forward; no
    per-sample state. BatchNorm is in train mode, as every full pass is part of the weight update.

    With a first layer that is linear, as in all of raytrain's own networks and all public ones, the
    gradient of <p, stem(x + delta)> does not depend on delta: n steps of size s are one step of size
    n s, and searching both is searching one number. With m = 1 all layers but the first train on the
    random start alone. A smoothed label reaches the perturbation too, through the costate. Needs a
    network with a separate first layer: raytrain's own. l2 and l1 take the norm's own
    steepest step; the paper has l-inf only.

    Deviations from the public code:

    - There the stem's gradient is counted twice, by the full backward and by the Hamiltonian
      (`stem_grad=both` reproduces it; the author called the code that should prevent it ineffective).
    - The m gradients are summed there and the rate divided by m: here they are averaged, so that `lr`
      means the same as elsewhere and weight decay is not divided too. Its lr r and weight decay d are
      m r and d / m here: 0.04 and 5e-4 with m = 5 are 0.2 and 1e-4.
    - The start is clipped to the pixel box. There it is not: the first full pass has pixels outside
      [0, 1], and these have no gradient in the first inner step, which clips the image inside its
      graph, so that they do not move with the others.
    - BatchNorm has m passes per update. There it has m + 1: after the last inner loop the accuracy is
      measured in train mode. The running statistics there include the images of the final delta, here
      those of the m full passes only, the last of which is one inner loop behind.
    """

    card: ClassVar[Card] = Card(
        paper="You only propagate once, Zhang et al. 2019, arXiv 1905.00877",
        rule="m full passes give the costate p, n steps each along grad <p, stem(x + delta)>",
        cost="3 m FE, and 2 m (n + 1) passes of the first layer (m=5, n=3: 15 and a little)",
        ranges={
            "m": Range(2, 8),
            "n": Range(1, 6),
            "step_size": Range(0.3, 1.5, unit="eps", note="of n * step_size"),
        },
    )

    name: Literal["yopo"] = "yopo"
    m: Annotated[PositiveInt, Field(description="full passes")] = 5
    n: Annotated[PositiveInt, Field(description="steps through the first layer per full pass")] = 3
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps/4"
    start: Init = Uniform()
    stem_grad: Annotated[
        Literal["hamiltonian", "both"],
        Field(
            description="the first layer's gradient; both: counted twice, as in the public code"
        ),
    ] = "hamiltonian"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> YopoTraining:
        if self.start.remembers:
            raise ValueError(
                "algorithm.start: yopo keeps no perturbation per image; expected uniform or zero"
            )
        return YopoTraining(ball, outer, self.cross_entropy(), self)

    def why_not_displaced(self) -> str | None:
        return "its costate and weight gradients belong to the present weights"


def _image(setup: TrainingSetup) -> torch.Tensor:
    return torch.zeros(1, *setup.shape, dtype=setup.dtype, device=setup.context.device)


def _weighted(costate: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The costate of the weighted mean, per sample."""
    if weights is None:
        return costate
    return costate * weights.view(-1, *[1] * (costate.dim() - 1))
