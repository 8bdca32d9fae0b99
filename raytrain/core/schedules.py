"""Functions of progress in [0, 1]: factors for rates and FOSC thresholds, ramps for other numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal, final

from pydantic import Field, PositiveFloat, model_validator

from raytrain.core.registry import Registry
from raytrain.core.types import Number, Pixels, Spec, StepSize, in_pixels


class AbstractShape(Spec):
    """A factor that multiplies a base value (a learning rate, a threshold) as training goes on."""

    @abstractmethod
    def at(self, progress: float) -> float:
        """The factor at `progress`: 0 is the start of training, 1 its end."""


PositiveShare = Annotated[Number, Field(gt=0, le=1)]


@final
class Constant(AbstractShape):
    """1."""

    kind: Literal["constant"] = "constant"

    def at(self, progress: float) -> float:
        del progress
        return 1.0


@final
class Power(AbstractShape):
    """max(0, 1 - progress / end)^exponent; exponent 1 is the linear fall of Dynamic AT's threshold.

    >>> [round(Power(end=0.8).at(progress), 3) for progress in (0.0, 0.4, 0.8, 1.0)]
    [1.0, 0.5, 0.0, 0.0]
    """

    kind: Literal["power"] = "power"
    end: Annotated[
        PositiveShare, Field(description="share of training after which the factor is 0")
    ] = 1.0
    exponent: Annotated[
        PositiveFloat, Field(description="1 is linear; below 1 falls late, above early")
    ] = 1.0

    def at(self, progress: float) -> float:
        return max(0.0, 1 - progress / self.end) ** self.exponent


@final
class Cosine(AbstractShape):
    """(1 + cos(pi min(1, progress / end))) / 2.

    >>> [round(Cosine().at(progress), 3) for progress in (0.0, 0.5, 1.0)]
    [1.0, 0.5, 0.0]
    """

    kind: Literal["cosine"] = "cosine"
    end: Annotated[
        PositiveShare, Field(description="share of training after which the factor is 0")
    ] = 1.0

    def at(self, progress: float) -> float:
        return (1 + math.cos(math.pi * min(1.0, progress / self.end))) / 2


@final
class Piecewise(AbstractShape):
    """factor^(number of milestones passed): the step schedule of the robust-training literature.

    >>> [round(Piecewise().at(progress), 3) for progress in (0.0, 0.5, 0.75)]
    [1.0, 0.1, 0.01]
    """

    kind: Literal["piecewise"] = "piecewise"
    milestones: Annotated[
        tuple[PositiveShare, ...],
        Field(description="shares of training, increasing, at which to drop"),
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
    """Rise linearly from 0 to 1 at `peak`, then fall linearly to 0: the fast schedule of FGSM-RS.

    >>> [round(OneCycle(peak=0.4).at(progress), 3) for progress in (0.0, 0.4, 0.7, 1.0)]
    [0.0, 1.0, 0.5, 0.0]
    """

    kind: Literal["onecycle"] = "onecycle"
    peak: Annotated[float, Field(gt=0, lt=1, description="share of training at which it is 1")] = (
        0.4
    )

    def at(self, progress: float) -> float:
        rising = progress / self.peak
        return max(0.0, min(rising, (1 - progress) / (1 - self.peak)))


SHAPES = Registry(AbstractShape, "kind")
SHAPES.register(Constant, Power, Cosine, Piecewise, OneCycle)


@final
class Ramp(Spec):
    """A number that moves from `start` to `end` while training goes from `after` to `until`.

    It is `start` before and `end` afterwards. Whole numbers are rounded to the nearest. `eps/4`
    means a multiple of the radius at that time.

    >>> grow = Ramp(start=0, until=0.5)
    >>> [grow.at(progress, 0.1, eps=0.1) for progress in (0.0, 0.25, 1.0)]
    [0.0, 0.05, 0.1]
    >>> Ramp(start="eps/2").at(0.5, "eps/4", eps=0.1)
    '0.375*eps'
    """

    start: Annotated[StepSize | Pixels, Field(description="the number before it moves")]
    end: Annotated[
        StepSize | Pixels | None,
        Field(description="the number afterwards; default: that of the field"),
    ] = None
    after: Annotated[
        Number, Field(ge=0, lt=1, description="share of training before it moves")
    ] = 0.0
    until: Annotated[PositiveShare, Field(description="share of training until it has moved")] = (
        1.0
    )
    shape: Annotated[
        Literal["linear", "cosine", "geometric"], Field(description="geometric: by equal factors")
    ] = "linear"

    @model_validator(mode="after")
    def _takes_time(self) -> Ramp:
        if self.after >= self.until:
            raise ValueError(f"expected after < until, found {self.after:g} and {self.until:g}")
        return self

    def at(self, progress: float, value: float | str, eps: float) -> float | str:
        """The number at `progress`, `value` being that of the field, `eps` the full radius."""
        ends = (self.start, value if self.end is None else self.end)
        relative = all(isinstance(end, str) for end in ends)
        low, high = (in_pixels(end, 1.0 if relative else eps) for end in ends)
        between = self._between(low, high, self._share(progress))
        return f"{between!r}*eps" if relative else between

    def _share(self, progress: float) -> float:
        share = (progress - self.after) / (self.until - self.after)
        return min(1.0, max(0.0, share))

    def _between(self, low: float, high: float, share: float) -> float:
        if self.shape == "geometric":
            if low <= 0 or high <= 0:
                raise ValueError("a geometric ramp needs both ends above 0")
            return low ** (1 - share) * high**share
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * low + share * high
