"""Dynamic adversarial training: attacks grow stronger as training goes on, measured by FOSC."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from raytrain.algorithms.base import AbstractRecipe, Card
from raytrain.algorithms.nested import Nested
from raytrain.attacks import Gap, ProjectedAscent, Start, Uniform
from raytrain.balls import AbstractBall
from raytrain.outer import AbstractOuter
from raytrain.schedules import Power, Shape
from raytrain.types import BatchNorm, Number, StepSize, named


@final
class Dynamic(AbstractRecipe):
    """PGD that leaves sample i alone once FOSC(delta_i) <= c_t;  c_t = c_max (1 - t/T')^+ falls to
    0.

    Wang et al. 2019 (arXiv 2112.08304), algorithm 1 and section 4. Every sample takes at least one
    step. FOSC is anchored at the natural image, as in the paper (the released code anchors it at
    the random start, which makes it a coin-flip near zero), and stopped samples leave the batch
    (the released code computes them to the end, so that it costs more than PGD). Beyond the paper:
    other shapes of the fall, FOSC over the legal pixels only, and l2 and l1 by Hoelder's
    inequality.
    """

    card: ClassVar[Card] = Card(
        paper="On the convergence and robustness of adversarial training, Wang et al. 2019, "
        "arXiv 2112.08304",
        rule="PGD; sample i stops once FOSC(delta_i) <= c_max decay(t)",
        cost="2 min(s + 1, K) + 3 FE for a sample that stops after s of K steps (K=10: 7 to 23)",
        ranges={
            "c_max": "[0.05, 2] nats, log",
            "decay.kind": "constant | power | cosine",
            "decay.end": "[0.5, 1] of training",
            "decay.exponent": "[0.5, 2], log (kind=power; 1 is the paper's)",
            "steps": "5..20",
            "step_size": "eps * [1/8, 1/2], log",
        },
    )

    name: Literal["dynamic"] = "dynamic"
    steps: Annotated[PositiveInt, Field(description="K, the most inner steps")] = 10
    step_size: StepSize = "eps/4"
    c_max: Annotated[
        Number, Field(description="FOSC threshold at the start, in nats; negative: PGD")
    ] = 0.5
    decay: Annotated[
        Shape, named("kind", "power"), Field(description="how the threshold falls, by epoch")
    ] = Power(end=0.8)
    over: Annotated[
        Literal["ball", "ball_box"],
        Field(
            description="FOSC over the ball (paper) or its legal pixels (for MNIST-like images)"
        ),
    ] = "ball"
    start: Start = Uniform()
    attack_bn: BatchNorm = "eval"
    compact: Annotated[
        bool, Field(description="stopped samples leave the batch; needs attack_bn=eval")
    ] = True

    def build(self, ball: AbstractBall, outer: AbstractOuter) -> Nested:
        attack = ProjectedAscent(
            start=self.start,
            steps=self.steps,
            step_size=self.step_size,
            stop=Gap(c_max=self.c_max, decay=self.decay, over=self.over),
            bn=self.attack_bn,
            compact=self.compact,
        )
        return Nested(ball, attack, outer)
