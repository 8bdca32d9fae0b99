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
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def of_shares(shares: Sequence[Share]) -> Cell | None:
    """Several seeds, or one with the interval of its images."""
    if not shares:
        return None
    if len(shares) > 1:
        return of_values([share.value for share in shares])
    (share,) = shares
    known = share.images > 0
    return Cell(share.value, 1, None, share.low if known else None, share.high if known else None)


def of_values(values: Sequence[float | None]) -> Cell | None:
    """Numbers of which no more is known; what is missing is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = over_seeds(known)
    return Cell(spread.mean, spread.seeds, spread.std, spread.low, spread.high)
