"""One step of an ascent."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Delta, Images

Ascent = Annotated[
    Literal["steepest", "raw"],
    Field(
        description="steepest: the norm's own direction (sign, g/|g|); raw: the gradient itself"
    ),
]


def ascend(
    ball: AbstractThreatModel, delta: Delta, grad: Delta, images: Images, size: float, ascent: str
) -> Delta:
    """delta + size * direction(grad), not yet projected.

    `size` is in pixels for `steepest` and in pixel^2 per nat for `raw`, of the per-sample gradient.
    """
    away = grad if ascent == "raw" else ball.direction(grad, delta, images)
    return delta + size * away
