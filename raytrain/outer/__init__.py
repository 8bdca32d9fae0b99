"""Where the weight gradient is measured and how it is applied."""

from typing import Annotated

from pydantic import Field

from raytrain.core.types import named
from raytrain.outer.awp import Awp
from raytrain.outer.base import AbstractOuter
from raytrain.outer.clip import Clip
from raytrain.outer.engm import Engm
from raytrain.outer.plain import Plain

Outer = Annotated[Plain | Clip | Engm | Awp, Field(discriminator="name"), named("name", "sgd")]

OUTERS: dict[str, type[AbstractOuter]] = {
    outer.model_fields["name"].default: outer for outer in (Plain, Clip, Engm, Awp)
}

__all__ = ["OUTERS", "AbstractOuter", "Awp", "Clip", "Engm", "Outer", "Plain"]
