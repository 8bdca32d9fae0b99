"""Rows of a comparison by cost, the highest first; what is folded away."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from raytrain.report.comparable import ComparableRuns
from raytrain.report.rows import VALID, Row

_ROWS, _FIRST = 40, 24  # more rows than that are cut to about so many, the best of every band


@dataclass(frozen=True)
class CostBand:
    """Rows of equal cost, the best first."""

    cost: str  # FE per training image, or their range; empty if unknown
    shown: list[Row]
    folded: list[Row]  # stopped early, or behind the best of many
    count: str  # of those, by kind: `5 stopped early and 3 more`; empty without them
    summary: str  # the same with the best of them

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.cost} FE per training image" if self.cost else "cost not recorded"


def bands_of(comparable: ComparableRuns) -> list[CostBand]:
    """From the highest cost to the lowest; rows of unknown cost are last.

    What was stopped early is folded away, unless it was evaluated on the test set, leads, or nothing of
    the arena was trained to its end.
    """
    bands: dict[int, list[Row]] = {}
    for row in comparable.rows:
        bands.setdefault(row.band, []).append(row)
    ordered = sorted(bands.items(), key=lambda item: (item[1][0].cost is None, -item[0]))
    whole = [row for row in comparable.rows if not row.stopped]
    most = max(1, _FIRST // len(bands)) if len(whole) > _ROWS else len(comparable.rows)
    return [_band(comparable, rows, most, fold=bool(whole)) for _, rows in ordered]


def _band(comparable: ComparableRuns, rows: list[Row], most: int, fold: bool) -> CostBand:
    shown: list[Row] = []
    folded: list[Row] = []
    for row in rows:
        first = bool(row.best) or row is comparable.leader
        hidden = fold and row.stopped
        best = row.front or len(shown) < most
        (shown if first or (best and not hidden) else folded).append(row)
    kinds = Counter("stopped early" if row.stopped else "more" for row in folded)
    count = " and ".join(f"{number} {kind}" for kind, number in kinds.items())
    summary = f"{count}; {_best(comparable, folded[0])}" if folded else ""
    return CostBand(_cost(rows), shown, folded, count, summary)


def _cost(rows: list[Row]) -> str:
    known = [row.cost for row in rows if row.cost is not None]
    if not known:
        return ""
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return low if low == high else f"{low} to {high}"


def _best(comparable: ComparableRuns, best: Row) -> str:
    """`the best is E (t0003): 72.1 % in validation`."""
    attack = comparable.attack if best.ranking_cell(comparable.attack) else VALID
    cell = best.ranking_cell(attack)
    front = ", on the Pareto front" if best.front else ""
    where = " in validation" if attack == VALID else ""
    value = "" if cell is None else f": {100 * cell.value:.1f} %{where}{front}"
    return f"the best is {best.letter} ({best.setting.names}){value}"
