"""Values of fields as text for a reader."""

from __future__ import annotations

import math
from typing import Any


def shown(value: Any) -> str:
    """A plain value as YAML has it, text as it is."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {shown(one)}" for key, one in value.items())
        return f"{{{inner}}}"
    return str(value)


def fraction_text(value: float) -> str:
    """A float as `8/255` if that is shorter, and exactly equal."""
    levels = round(255 * value) if math.isfinite(value) else 0
    exact = levels / 255 == value and len(repr(value)) > len(f"{levels}/255")
    return f"{levels}/255" if exact else str(value)
