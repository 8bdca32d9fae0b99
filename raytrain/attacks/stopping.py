"""When an attack leaves a sample alone."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field

from raytrain.core.schedules import Power, Shape
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Clock, Delta, Images, Mask, Number, Spec, named, per_sample_dot


class AbstractStopping(Spec):
    """Decides per sample, from the gradient that the next step would use anyway."""

    def reached(
        self,
        ball: AbstractThreatModel,
        delta: Delta,
        start: Delta,
        grad: Delta,
        images: Images,
        clock: Clock,
    ) -> Mask | None:
        """True where the sample is to be left as it is; None says never, without looking.

        `start` is where the attack began, `grad` the gradient at `delta`.
        """
        del ball, delta, start, grad, images, clock
        return None


@final
class Never(AbstractStopping):
    """Take all the steps."""

    kind: Literal["never"] = "never"


@final
class Gap(AbstractStopping):
    """Stop where FOSC(delta_i) <= c_t, with c_t = c_max * decay(t).

    Wang et al. 2019 (arXiv 2112.08304), section 4. The decay defaults to the paper's linear fall. A
    negative `c_max` is not decayed: since FOSC >= 0, such a rule never stops, and the attack is PGD.
    The released code measures the displacement in FOSC from the random start u instead of from the
    natural image (`anchor=start`): that adds <u, g>, may be negative, and near zero is a coin-flip.
    """

    kind: Literal["gap"] = "gap"
    c_max: Annotated[
        Number, Field(description="threshold at the start of training, in nats; negative: never")
    ]
    decay: Annotated[Shape, named("kind", "power")] = Power()
    over: Annotated[
        Literal["ball", "ball_box"],
        Field(
            description="the set FOSC is taken over: the ball (paper), or its part with legal pixels"
        ),
    ] = "ball"
    anchor: Annotated[
        Literal["natural", "start"],
        Field(description="FOSC of the displacement from the image (paper) or from the start"),
    ] = "natural"
    per: Annotated[
        Literal["epoch", "step"], Field(description="how often the threshold falls (paper: epoch)")
    ] = "epoch"

    def threshold(self, progress: float) -> float:
        """c_t, in nats, at a share of training."""
        left = self.decay.at(progress)
        if self.c_max < 0:
            return self.c_max
        return self.c_max * left if left else 0.0  # inf * 0 is not a number

    def reached(
        self,
        ball: AbstractThreatModel,
        delta: Delta,
        start: Delta,
        grad: Delta,
        images: Images,
        clock: Clock,
    ) -> Mask:
        gap = ball.gap(delta, grad) if self.over == "ball" else ball.box_gap(delta, grad, images)
        if self.anchor == "start":
            gap = gap + per_sample_dot(start, grad)
        return gap <= self.threshold(clock.epoch if self.per == "epoch" else clock.step)


Stop = Annotated[Never | Gap, Field(discriminator="kind"), named("kind")]
