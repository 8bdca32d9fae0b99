"""The leading configuration against the others, image by image."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np

from raytrain.evaluation.confidence import align, difference, holm, mcnemar, paired
from raytrain.report.comparable import ComparableRuns
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.rows import VALID, Row, order

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """The leader less another one, in shares of the same test images."""

    leader: Row
    other: Row
    attack: str
    difference: float  # mean over the pairs of seeds
    low: float  # 95 % limits, see `difference`
    high: float
    only_leader: int  # images that only the leader holds, summed over the pairs
    only_other: int
    seeds: int  # pairs
    ahead: int  # pairs in which the leader is the better one
    p: float
    is_ahead: bool  # the direction that p is of
    holm: float = 1.0  # p, adjusted for all that the leader is compared with

    @property
    def relation(self) -> str:
        """In words: whether the leader is ahead, or behind, beyond chance."""
        if self.holm >= LEVEL:
            return "not told apart"
        return "ahead" if self.is_ahead else "behind"


def pairs_of(comparable: ComparableRuns) -> list[Pair]:
    """The leader against every other trusted row that has flags of the same images, the best first.

    Runs are paired by seed, or in order where no seed is shared. Over several pairs the p of a direction
    is twice the median of theirs (Rueger 1978; Meinshausen, Meier and Buehlmann 2009, JASA 104:1671),
    which holds however the pairs depend on one another; p is twice that of the likelier direction.
    """
    leader = comparable.leader
    if leader is None or comparable.attack == VALID:
        return []
    rows = sorted(comparable.rows, key=lambda row: order(row, comparable.attack))
    others = [row for row in rows if row is not leader and row.trusted]
    found = [pair for row in others if (pair := _pair(leader, row, comparable.attack)) is not None]
    adjusted = holm([pair.p for pair in found])
    return [replace(pair, holm=p) for pair, p in zip(found, adjusted, strict=True)]


def flags_by_seed(first: Row, second: Row, attack: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which images survived `attack` for either row, (n,) bool each, per pair of seeds: aligned."""
    return [_flags(one, two, attack) for one, two in _together(first, second, attack)]


def _pair(leader: Row, other: Row, attack: str) -> Pair | None:
    flags = flags_by_seed(leader, other, attack)
    if not flags:
        return None
    per_seed, whole = [paired(one, two) for one, two in flags], difference(flags)
    ahead, behind = (
        _combined([mcnemar(*counts(one), alternative="greater") for one in per_seed])
        for counts in (
            lambda one: (one.only_first, one.only_second),
            lambda one: (one.only_second, one.only_first),
        )
    )
    return Pair(
        leader=leader,
        other=other,
        attack=attack,
        difference=whole.value,
        low=whole.low,
        high=whole.high,
        only_leader=sum(one.only_first for one in per_seed),
        only_other=sum(one.only_second for one in per_seed),
        seeds=len(per_seed),
        ahead=sum(one.difference > 0 for one in per_seed),
        p=min(1.0, 2 * min(ahead, behind)),
        is_ahead=ahead <= behind,
    )


def _combined(p_values: list[float]) -> float:
    return p_values[0] if len(p_values) == 1 else min(1.0, 2 * statistics.median(p_values))


def _together(leader: Row, other: Row, attack: str) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """Evaluations with flags of the same images, paired by seed."""
    one, two = _by_seed(leader, attack), _by_seed(other, attack)
    shared = [seed for seed in one if seed in two]
    if shared:
        return [(one[seed], two[seed]) for seed in shared]
    return list(zip(one.values(), two.values(), strict=False))


def _by_seed(row: Row, attack: str) -> dict[str, EvaluatedRun]:
    mine = {id(one) for one in row.best}
    return {
        run.seed: one
        for run in row.setting.runs
        for one in run.evaluations
        if id(one) in mine and one.flags is not None and attack in one.flags.column_names
    }


def _flags(
    first: EvaluatedRun, second: EvaluatedRun, attack: str
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts on the same images in the same order; an arena holds one test set only."""
    assert first.flags is not None and second.flags is not None
    one, two = align(first.flags, second.flags)
    return tuple(np.asarray(t[attack].to_numpy(), dtype=bool) for t in (one, two))  # pyright: ignore[reportReturnType]
