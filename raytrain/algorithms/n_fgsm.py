"""FGSM from strong noise, without the projection (de Jorge et al. 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field, PositiveFloat

from raytrain.algorithms.base import Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import ProjectedAscent, Uniform
from raytrain.core.card import Card, Range
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE, AttackBatchNorm, StepSize
from raytrain.outer import AbstractOuter


@final
class NFgsm(Smoothed):
    """delta <- box(u + step_size * sign g(u)), u ~ U(-k eps, k eps);  theta <- theta - lr
    grad(delta).

    de Jorge et al. 2022 (arXiv 2202.01181), algorithm 1. On purpose delta is clipped to the pixel
    box only, so its size may reach (k + step_size/eps) eps: training is outside the threat model, the
    evaluation is not. l2 and l1 scale the norm's own noise by k; the paper has l-inf only.
    On SVHN the public code increases eps from 0 over the first five epochs, noise and step with it;
    here that is a curriculum of eps and not part of this recipe.
    """

    card: ClassVar[Card] = Card(
        paper="Make some noise, de Jorge et al. 2022, arXiv 2202.01181",
        rule="delta <- box(u + step_size sign g(u)), u ~ U(-k eps, k eps)",
        cost="5 FE",
        ranges={"k": Range(0.5, 4.0), "step_size": Range(0.5, 1.5, unit="eps")},
    )

    name: Literal["n_fgsm"] = "n_fgsm"
    k: Annotated[PositiveFloat, Field(description="noise radius in multiples of eps")] = 2.0
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps"
    attack_bn: AttackBatchNorm = "train"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        attack = ProjectedAscent(
            start=Uniform(radius=self.k),
            steps=1,
            step_size=self.step_size,
            bn=self.attack_bn,
            confined=False,
        )
        return Nested(ball, attack, outer, self.cross_entropy())
