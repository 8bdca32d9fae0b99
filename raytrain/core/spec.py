"""Frozen specifications, and numbers that may be written as fractions; does not import torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


class Spec(BaseModel):
    """Base of frozen specifications: hyperparameters and behaviour, without state that training changes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings"
    )

    bare: ClassVar[str | None] = None
    """The field that is set by a string in place of the whole record."""

    @model_validator(mode="before")
    @classmethod
    def _from_bare_name(cls, values: Any) -> Any:
        return {cls.bare: values} if cls.bare and isinstance(values, str) else values

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                annotation = cls.model_fields[name].annotation
                kinds = set(get_args(annotation)) or {annotation}
                if kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{name}: expected a number, found {value}")
        return values


FRACTION = re.compile(r"\s*([-+0-9.eE]+)\s*/\s*([-+0-9.eE]+)\s*")
"""Two numbers and a slash."""


def fraction(value: Any) -> Any:
    """Convert `"8/255"` to a float; return anything else unchanged for the field's own validation.

    >>> fraction("8/255"), fraction(0.1), fraction("eps/4")
    (0.03137254901960784, 0.1, 'eps/4')
    """
    match = FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        return float(match[1]) / float(match[2])
    except (ValueError, ZeroDivisionError):
        return value


def a_number(value: float) -> float:
    """Return the value.

    Raises:
        ValueError: if it is not a number.
    """
    if math.isnan(value):
        raise ValueError("expected a number")
    return value


_FractionText = Annotated[str, Field(pattern=f"^{FRACTION.pattern}$", examples=[])]

Number = Annotated[
    float,
    BeforeValidator(fraction, json_schema_input_type=float | _FractionText),
    AfterValidator(a_number),
]
"""A float that may be written as a fraction: `1/3`."""
