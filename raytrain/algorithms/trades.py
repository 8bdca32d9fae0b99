"""TRADES: natural loss plus the distance between clean and perturbed predictions (Zhang et al. 2019)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import Gaussian, Init
from raytrain.core.card import Card, Range
from raytrain.core.losses import Trades
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE
from raytrain.outer import AbstractOuter


@final
class TradesRecipe(Smoothed, Iterated):
    """delta <- argmax KL(p(x) | p(x + delta)) by PGD;
    theta <- theta - lr grad [CE(p(x), y) + beta KL(p(x) | p(x + delta))].

    Zhang et al. 2019 (arXiv 1901.08573), equation 5 and algorithm 1. Cost per image: clean logits for
    the attack 1, K inner steps 2 each, two forwards and a backward through both 6: 2 K + 7 FE. No
    per-sample state. See `losses.Trades` for the loss, the errors of the public code that it
    avoids, and the passes of BatchNorm (one clean pass less). beta = 0 gives the gradient of natural
    training, though not its running statistics. l2 and l1 take the norm's own steps.

    Deviations from the public code, because start, step and projection are those of every algorithm
    here:

    - The start is clipped to the pixel box before the first gradient; there it is not, and the first
      gradient is taken outside [0, 1] where pixels are saturated.
    - l2: delta is projected on the ball and then clipped to the box; there it is clipped first. The
      results are the same where the box does not bind. Elsewhere delta is never longer here,
      |box(ball(delta))| <= |ball(box(delta))|: what the box clips is not redistributed to other pixels, and
      images with saturated pixels are attacked with less of the radius.
    - l2: where the gradient is zero, delta stays; there it moves along noise N(0, 1), a step longer by
      about the square root of the number of pixels. The step is step_size; there it is 2 eps / K.
    - Its numbers in l-inf are eps 0.031 and step 0.007.
    """

    card: ClassVar[Card] = Card(
        paper="Theoretically principled trade-off between robustness and accuracy, Zhang et al. 2019, "
        "arXiv 1901.08573",
        rule="min CE(p(x), y) + beta max KL(p(x) | p(x + delta))",
        cost="2 steps + 7 FE (10 steps: 27)",
        ranges={
            "beta": Range(0.5, 15, log=True),
            "steps": Range(5, 10),
            "step_size": Range(0.05, 1.5, log=True, unit="eps"),
        },
    )

    name: Literal["trades"] = "trades"
    beta: Annotated[
        float, SCHEDULABLE, Field(ge=0, allow_inf_nan=False, description="weight of the KL")
    ] = 6.0
    start: Init = Gaussian()

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        objective = Trades(beta=self.beta, label_smoothing=self.label_smoothing)
        return Nested(ball, self.attack(), outer, objective)
