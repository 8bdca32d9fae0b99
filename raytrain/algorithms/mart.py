"""MART: misclassified examples have a larger weight (Wang et al. 2020)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from raytrain.algorithms.base import Iterated
from raytrain.algorithms.nested import Nested
from raytrain.attacks import Gaussian, Init
from raytrain.core.card import Card, Range
from raytrain.core.losses import Mart
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE
from raytrain.outer import AbstractOuter


@final
class MartRecipe(Iterated):
    """delta <- argmax CE by PGD;
    theta <- theta - lr grad [BCE(p(x'), y) + beta KL(p(x) | p(x')) (1 - p_y(x))].

    Wang et al. 2020 (Improving adversarial robustness requires revisiting misclassified examples,
    ICLR), equation 11. Cost per image: K inner steps 2 each, two forwards and a backward through both
    6: 2 K + 6 FE. No per-sample state. See `losses.Mart` for the loss and the errors of the public
    code that it avoids. With K = 0 and no noise it is natural training on BCE, not on cross-entropy,
    and a smoothed label has no meaning in it: there is no label_smoothing. Its weight decay is an
    order larger than elsewhere (3.5e-3 at lr 0.01 in the public code): search both. Known: a high PGD
    accuracy goes with a lower AutoAttack accuracy; with awp on wide networks it has collapsed. l2 and
    l1 take the norm's own steps; the paper has l-inf only.

    Deviations from the public code: its KL has 1e-12 beside p(x'), this one has not (see
    `losses.Mart` for the difference); it does not clip the start to the pixel box before the
    first gradient, which is then taken outside [0, 1] where pixels are saturated. Its numbers are eps
    0.031 and step 0.007.
    """

    card: ClassVar[Card] = Card(
        paper="Improving adversarial robustness requires revisiting misclassified examples, "
        "Wang et al. 2020, ICLR",
        rule="min BCE(p(x'), y) + beta KL(p(x) | p(x')) (1 - p_y(x)), x' by PGD on cross-entropy",
        cost="2 steps + 6 FE (10 steps: 26)",
        ranges={
            "beta": Range(1, 10, log=True),
            "steps": Range(5, 10),
            "step_size": Range(0.05, 1.5, log=True, unit="eps"),
        },
    )

    name: Literal["mart"] = "mart"
    beta: Annotated[
        float, SCHEDULABLE, Field(ge=0, allow_inf_nan=False, description="weight of the KL")
    ] = 5.0
    start: Init = Gaussian()

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        return Nested(ball, self.attack(), outer, Mart(beta=self.beta))
