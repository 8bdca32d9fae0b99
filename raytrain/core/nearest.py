"""The known names that are nearest to one that does not exist, as refusals propose them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CUTOFF = 0.5  # similarity in [0, 1] from which a name is proposed


def near(
    name: str, known: Iterable[str | None], most: int = 1, cutoff: float = _CUTOFF
) -> list[str]:
    """Return up to `most` known names that are similar to `name`, the most similar first.

    Capitals do not count; None among the known names stands for a thing without a name.

    >>> near("dynamik", ["pgd", "dynamic"]), near("PGD", ["pgd", "mart"]), near("zzz", ["pgd"])
    (['dynamic'], ['pgd'], [])
    """
    by_lower: dict[str, str] = {}
    for one in filter(None, known):
        by_lower.setdefault(one.lower(), one)
    return [
        by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, most, cutoff)
    ]


def nearest(name: str, known: Iterable[str | None], most: int = 1) -> str:
    """Return the clause that a refusal ends with; empty if no known name is similar.

    >>> nearest("dynamik", ["pgd", "dynamic"])
    '; the nearest is dynamic'
    """
    found = near(name, known, most)
    verb = "is" if len(found) == 1 else "are"
    return f"; the nearest {verb} {', '.join(found)}" if found else ""
