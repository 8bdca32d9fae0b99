"""FGSM from a random start, the cheapest adversarial training that works (Wong, Rice and Kolter 2020)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from raytrain.algorithms.base import Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import Init, ProjectedAscent, Uniform
from raytrain.core.card import Card, Range
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE, AttackBatchNorm, StepSize
from raytrain.outer import AbstractOuter


@final
class FgsmRs(Smoothed):
    """delta <- P(u + step_size * sign g(u)), u ~ U(-eps, eps);  theta <- theta - lr grad(delta).

    Wong et al. 2020 (arXiv 2001.03994), algorithm 3. The public code draws its start and attacks
    in train mode, updating BatchNorm twice per step: that is the default here too. It computes
    weight gradients during the attack and discards them (6 FE); this does not (5 FE). l2 and l1
    take the norm's own steepest step; the paper has l-inf only. Catastrophic overfitting is known
    for step sizes from about 1.5 eps and for start=zero.

    Deviations from the public code: there the start of channel i is U(-eps, eps s_i / s_0), s the
    channels' standard deviations, because the upper bound of the first channel is used for all (0.985
    eps for green and 1.06 eps for blue on CIFAR-10); here it is U(-eps, eps) for each. There the
    gradient is that of the mean loss in half precision at a loss scale of 1, in which small entries
    round to zero and their pixels do not move; here it is that of the sum, in float32 or bfloat16.
    """

    card: ClassVar[Card] = Card(
        paper="Fast is better than free, Wong et al. 2020, arXiv 2001.03994",
        rule="delta <- P(u + step_size sign g(u)), u uniform;  theta <- theta - lr grad(delta)",
        cost="5 FE",
        ranges={"step_size": Range(0.5, 2, unit="eps")},
    )

    name: Literal["fgsm_rs"] = "fgsm_rs"
    step_size: Annotated[StepSize, SCHEDULABLE, Field(description="10/255 at eps 8/255")] = (
        "1.25*eps"
    )
    start: Init = Uniform()
    attack_bn: AttackBatchNorm = "train"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        attack = ProjectedAscent(
            start=self.start, steps=1, step_size=self.step_size, bn=self.attack_bn
        )
        return Nested(ball, attack, outer, self.cross_entropy())
