"""A number with what is known of its chance: over seeds, or over the images of a single seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrain.evaluation.confidence import Share, over_seeds


@dataclass(frozen=True)
class Cell:
    """A share in [0, 1]. `low` and `high` are 95 % limits: Student's over seeds, else Wilson's."""

    value: float
    seeds: int
    std: float | None = None  # sample standard deviation over seeds
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """In per cent: `53.2 ± 0.8`, or `53.2 [50.1, 56.2]` for one seed."""
        if self.std is not None:
            return f"{100 * self.value:.1f} ± {100 * self.std:.1f}"
        return f"{100 * self.value:.1f}{f' {self.limits}' if self.limits else ''}"

    @property
    def limits(self) -> str:
        """The 95 % limits in per cent, within 0 and 100: `[50.1, 56.2]`; empty if unknown."""
        if self.low is None or self.high is None:
            return ""
        return f"[{100 * max(0.0, self.low):.1f}, {100 * min(1.0, self.high):.1f}]"


def of_shares(shares: Sequence[Share]) -> Cell | None:
    """Several seeds, or one with the interval of its images."""
    if not shares:
        return None
    if len(shares) > 1:
        spread = over_seeds([share.value for share in shares])
        return Cell(spread.mean, spread.seeds, spread.std, spread.low, spread.high)
    (share,) = shares
    known = share.images > 0
    return Cell(share.value, 1, None, share.low if known else None, share.high if known else None)
