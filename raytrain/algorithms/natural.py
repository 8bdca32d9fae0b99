"""Training on clean images, the baseline of every robust method."""

from __future__ import annotations

from typing import ClassVar, Literal, final

from raytrain.algorithms.base import Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import ProjectedAscent, Zero
from raytrain.core.card import Card
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.outer import AbstractOuter


@final
class Natural(Smoothed):
    """theta <- theta - lr mean_i grad loss_i(theta, 0)."""

    card: ClassVar[Card] = Card(
        paper="empirical risk minimisation",
        rule="theta <- theta - lr mean grad loss(theta, 0)",
        cost="3 FE",
    )

    name: Literal["natural"] = "natural"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        attack = ProjectedAscent(start=Zero(), steps=0, step_size="eps", bn="eval")
        return Nested(ball, attack, outer, self.cross_entropy())
