"""Shapes over training: a factor as a function of progress in [0, 1], for learning rates and FOSC alike."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal, final

from pydantic import Field, PositiveFloat, model_validator

from raytrain.types import Number, Spec, named


class AbstractShape(Spec):
    """A factor that multiplies a base value (a learning rate, a threshold) as training goes on."""

    @abstractmethod
    def at(self, progress: float) -> float:
        """The factor at `progress`: 0 is the start of training, 1 its end."""


Share = Annotated[Number, Field(gt=0, le=1)]


@final
class Constant(AbstractShape):
    """1."""

    kind: Literal["constant"] = "constant"

    def at(self, progress: float) -> float:
        del progress
        return 1.0


@final
class Power(AbstractShape):
    """max(0, 1 - progress / end)^exponent; exponent 1 is the linear fall of Dynamic AT's threshold."""

    kind: Literal["power"] = "power"
    end: Annotated[Share, Field(description="share of training after which the factor is 0")] = 1.0
    exponent: Annotated[
        PositiveFloat, Field(description="1 is linear; below 1 falls late, above early")
    ] = 1.0

    def at(self, progress: float) -> float:
        return max(0.0, 1 - progress / self.end) ** self.exponent


@final
class Cosine(AbstractShape):
    """(1 + cos(pi min(1, progress / end))) / 2."""

    kind: Literal["cosine"] = "cosine"
    end: Annotated[Share, Field(description="share of training after which the factor is 0")] = 1.0

    def at(self, progress: float) -> float:
        return (1 + math.cos(math.pi * min(1.0, progress / self.end))) / 2


@final
class Piecewise(AbstractShape):
    """factor^(number of milestones passed): the step schedule of the robust-training literature."""

    kind: Literal["piecewise"] = "piecewise"
    milestones: Annotated[
        tuple[Share, ...], Field(description="shares of training, increasing, at which to drop")
    ] = (0.5, 0.75)
    factor: Annotated[float, Field(gt=0, lt=1, description="each drop multiplies by this")] = 0.1

    @model_validator(mode="after")
    def _increasing(self) -> Piecewise:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must increase")
        return self

    def at(self, progress: float) -> float:
        return self.factor ** sum(progress >= m for m in self.milestones)


@final
class OneCycle(AbstractShape):
    """Rise linearly from 0 to 1 at `peak`, then fall linearly to 0: the fast schedule of FGSM-RS."""

    kind: Literal["onecycle"] = "onecycle"
    peak: Annotated[float, Field(gt=0, lt=1, description="share of training at which it is 1")] = (
        0.4
    )

    def at(self, progress: float) -> float:
        rising = progress / self.peak
        return max(0.0, min(rising, (1 - progress) / (1 - self.peak)))


Shape = Annotated[
    Constant | Power | Cosine | Piecewise | OneCycle, Field(discriminator="kind"), named("kind")
]
