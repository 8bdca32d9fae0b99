"""PGD adversarial training (Madry et al. 2018): the reference method."""

from __future__ import annotations

from typing import ClassVar, Literal, final

from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.core.card import Card, Range
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.outer import AbstractOuter


@final
class Pgd(Smoothed, Iterated):
    """delta <- P(delta + step_size * sign g(delta)), `steps` times;  theta <- theta - lr
    grad(delta).

    Madry et al. 2018 (arXiv 1706.06083), section 2. The last iterate is trained on, as there.
    Public codes attack in train mode (Madry, Rice) or in eval mode (Pang's baseline); eval is the
    default, because then a sample's perturbation does not depend on its neighbours in the batch.
    start=remembered starts from the last perturbation of the image; `atta` also resets it.

    Deviations: with attack_bn=train BatchNorm has K + 1 passes per update, all of perturbed images.
    Rice's code has K + 3: one more of perturbed images, for the loss that compares restarts, and one
    of the clean images after the step, which enters the running statistics last.
    """

    card: ClassVar[Card] = Card(
        paper="Towards deep learning models resistant to adversarial attacks, Madry et al. 2018, "
        "arXiv 1706.06083",
        rule="delta <- P(delta + step_size sign g(delta)), steps times;  theta <- theta - lr grad",
        cost="2 steps + 3 FE (10 steps: 23)",
        memory="4 bytes per pixel and channel with start=remembered, otherwise none",
        ranges={"steps": Range(1, 20), "step_size": Range(0.05, 1.5, log=True, unit="eps")},
    )

    name: Literal["pgd"] = "pgd"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        return Nested(ball, self.attack(), outer, self.cross_entropy())
