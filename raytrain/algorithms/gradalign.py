"""GradAlign: FGSM with a penalty on changes of the gradient's direction within the ball."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field

from raytrain.algorithms.base import AbstractAlgorithm, Smoothed
from raytrain.attacks import Init, Zero, ascend
from raytrain.core.card import Card, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import (
    AttackedByCrossEntropy,
    Reference,
    Smoothing,
    label_loss,
)
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import (
    SCHEDULABLE,
    AttackBatchNorm,
    Batch,
    BatchNorm,
    Delta,
    Mask,
    PerSample,
    Predict,
    StepSize,
    in_pixels,
    over_pixels,
    per_sample_dot,
)
from raytrain.outer import AbstractOuter


@final
class Aligned(AttackedByCrossEntropy):
    """CE(x + delta) + lambda (1 - cos(g, grad CE(x + eta))), the reference being (g, eta).

    g is held fixed, the other gradient is differentiated once more. A sample with a zero gradient
    has no penalty, and still counts in the mean over samples.
    """

    takes_mixed_labels: ClassVar[bool] = True
    outer_forwards: ClassVar[int] = 2
    nested_gradients: ClassVar[int] = 1

    name: Literal["gradalign"] = "gradalign"
    lam: float
    label_smoothing: Smoothing = 0.0

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        fixed, eta = reference
        loss = label_loss(predict(batch.images + delta), batch, self.label_smoothing)
        point = (batch.images + eta).detach().requires_grad_(True)
        with torch.enable_grad():
            there = label_loss(predict(point), batch)
            (turned,) = torch.autograd.grad(there.sum(), point, create_graph=True)
        return loss + self.lam * (1 - _cosine(fixed, turned))


@final
@dataclass(frozen=True)
class GradAlignTraining(AbstractAlgorithm):
    """delta <- P(delta0 + s sign g), g = grad CE(x + delta0);  theta <- outer(theta, delta) on `Aligned`."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: Aligned
    start: Init
    step_size: StepSize
    bn: BatchNorm

    def fe_per_image(self, setting: CostSetting) -> float:
        loss = self.objective
        return 2.0 * loss.inner_forwards + self.outer.update_fe(loss, setting, has_gradient=True)

    def why_not_mixed(self) -> str | None:
        return self.objective.why_not_mixed()

    def replay_key(self, state: TrainState) -> Hashable:
        return self.outer.replay_key(state)

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        oracle = state.oracle(batch, self.objective, self.bn)
        delta = self.start.delta(self.ball, batch, None)
        _, grad = oracle.delta_grad(delta)
        eta = self.ball.noise(batch.images, batch.rng, "align")
        oracle.set_reference(grad, eta)
        size = in_pixels(self.step_size, self.ball.eps)
        moved = ascend(self.ball, delta, grad, batch.images, size, "steepest")
        delta = self.ball.feasible(moved, batch.images)
        losses = self.outer.update(state, oracle, delta)
        return StepResult(losses, delta, torch.ones_like(batch.labels))


@final
class GradAlign(Smoothed):
    """delta <- P(delta0 + step_size * sign g), g = grad_x CE(x + delta0);
    theta <- theta - lr grad [CE(x + delta) + lam (1 - mean cos(g, grad_x CE(x + eta)))],
    eta ~ U(-eps, eps).

    Andriushchenko and Flammarion 2020 (arXiv 2007.02617), equation 6 and algorithm 1. Cost: the FGSM
    gradient g, which the penalty uses again, 2 FE; the training pass 3; a second input gradient with
    its graph and a pass through both directions of it, counted 6: 11 FE. No per-sample state. As in
    the public code, the first gradient is held fixed, the noise is not clipped to the pixel box, and
    both passes are in train mode. lam = 0 is FGSM in its weights (not in its running statistics, which
    include the noise). Differentiating twice needs a network that allows it: torch's SyncBatchNorm
    does not. The penalty is the same in every norm: it is an angle; the paper has l-inf only.

    Deviations from the public code:

    - The penalty is averaged over all samples of the batch, those with a zero gradient counting 0,
      because every training loss here is a mean of per-sample terms. The public code averages over
      the others only. With a share z of zero gradients the penalty here at lam is the public one at
      (1 - z) lam: it weakens here, and not there, as the network becomes confident.
    - A gradient is zero here if all its pixels are. The public test squares them in float32, so that
      gradients of the mean loss below about 3e-23 in every pixel count as zero too and z is larger
      there. With z = 1 its penalty is NaN; here it is 0.
    - It clips x + delta0 to [0, 1] inside the graph of g. With a zero start that halves g on pixels of
      exactly 0 or 1, where torch.min and torch.max (of today) share the gradient between their two
      arguments: the angle is another one, the sign step is the same. With start=uniform its start is
      not clipped, and pixels outside [0, 1] have no gradient and take no step; here the start is
      clipped and every pixel takes it.
    """

    card: ClassVar[Card] = Card(
        paper="Understanding and improving fast adversarial training, Andriushchenko and Flammarion "
        "2020, arXiv 2007.02617",
        rule="FGSM + lam (1 - cos(grad at x, grad at x + noise))",
        cost="11 FE",
        ranges={
            "lam": Range(0.02, 5, log=True, note="larger for larger eps"),
            "step_size": Range(0.5, 1.5, unit="eps"),
        },
    )

    name: Literal["gradalign"] = "gradalign"
    lam: Annotated[
        float,
        SCHEDULABLE,
        Field(ge=0, allow_inf_nan=False, description="lambda, weight of the penalty"),
    ] = 0.2
    step_size: Annotated[StepSize, SCHEDULABLE] = "1.25*eps"
    start: Init = Zero()
    attack_bn: AttackBatchNorm = "train"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> GradAlignTraining:
        if self.start.remembers:
            raise ValueError(
                "algorithm.start: gradalign keeps no perturbation per image; expected zero or uniform"
            )
        objective = Aligned(lam=self.lam, label_smoothing=self.label_smoothing)
        return GradAlignTraining(
            ball, outer, objective, self.start, self.step_size, self.attack_bn
        )

    def why_not_displaced(self) -> str | None:
        return "the gradient it aligns with belongs to the present weights"


def _cosine(a: Delta, b: Delta) -> PerSample:
    """cos(a_i, b_i), however short they are; 1 where one of them is zero."""
    (one, has_one), (other, has_other) = _unit(a), _unit(b)
    cosine = per_sample_dot(one, other)
    return torch.where(has_one & has_other, cosine, torch.ones_like(cosine))


def _unit(values: Delta) -> tuple[Delta, Mask]:
    """Each sample's direction, and whether it has one.

    Scaled by its largest pixel first: the squares of a confident network's gradients vanish in
    float32, and their slopes would be infinite.
    """
    largest = values.detach().flatten(1).abs().amax(1)
    there = largest > 0
    scaled = values / over_pixels(torch.where(there, largest, torch.ones_like(largest)))
    squares = scaled.flatten(1).square().sum(1)
    length = torch.where(there, squares, torch.ones_like(squares)).sqrt()
    return scaled / over_pixels(length), there
