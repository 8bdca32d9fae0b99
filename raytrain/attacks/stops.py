"""When an attack leaves a sample alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, final

from pydantic import Field

from raytrain.balls import AbstractBall
from raytrain.schedules import Power, Shape
from raytrain.types import Delta, Images, Mask, Number, Spec, named


class AbstractStop(Spec):
    """Decides per sample, from the gradient that the next step would use anyway."""

    @abstractmethod
    def reached(
        self, ball: AbstractBall, delta: Delta, grad: Delta, images: Images, progress: float
    ) -> Mask | None:
        """True where the sample is to be left as it is; None says never, without looking."""


@final
class Never(AbstractStop):
    """Take all the steps."""

    kind: Literal["never"] = "never"

    def reached(
        self, ball: AbstractBall, delta: Delta, grad: Delta, images: Images, progress: float
    ) -> None:
        del ball, delta, grad, images, progress


@final
class Gap(AbstractStop):
    """Stop where FOSC(delta_i) <= c_t, with c_t = c_max * decay(progress).

    Wang et al. 2019 (arXiv 2112.08304), section 4. The decay defaults to the paper's linear fall.
    A negative `c_max` is not decayed: since FOSC >= 0, such a rule never stops, and the attack is
    PGD.
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

    def threshold(self, progress: float) -> float:
        """c_t, in nats."""
        left = self.decay.at(progress)
        if self.c_max < 0:
            return self.c_max
        return self.c_max * left if left else 0.0  # inf * 0 is not a number

    def reached(
        self, ball: AbstractBall, delta: Delta, grad: Delta, images: Images, progress: float
    ) -> Mask:
        gap = ball.gap(delta, grad) if self.over == "ball" else ball.box_gap(delta, grad, images)
        return gap <= self.threshold(progress)


Stop = Annotated[Never | Gap, Field(discriminator="kind"), named("kind")]
