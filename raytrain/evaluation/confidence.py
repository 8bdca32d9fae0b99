"""Confidence intervals and tests of accuracies and of their differences.

Accuracies measured on the same images are compared image by image: most images fall to both models
or to neither, and only those on which the two disagree carry information. That has far more power than
comparing two percentages with an interval each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool

from raytrain.core.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa

Flags = Bool[np.ndarray, "_"]
"""One result per image: classified rightly, or survived an attack."""


@dataclass(frozen=True)
class Share:
    """`count` of `images`, with its confidence limits: all three in [0, 1]."""

    value: float
    low: float
    high: float
    count: int
    images: int


@dataclass(frozen=True)
class Paired:
    """Two models, or two attacks on one, on the same images: how often each was right.

    `difference` is the accuracy of the first less that of the second, in [-1, 1], between the
    limits `low` and `high`; `p` is the chance of a disagreement at least as one-sided if the two
    are equally good.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def images(self) -> int:
        """How many images were compared."""
        return self.both + self.only_first + self.only_second + self.neither


@dataclass(frozen=True)
class Spread:
    """Mean of several seeds, its sample standard deviation and confidence limits of the mean.

    With one seed `std`, `low` and `high` are None.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int


def wilson(count: int, images: int, level: float = 0.95) -> Share:
    """A share with its score interval (Wilson 1927, JASA 22:209), which is right at 0 and 1 too.

    The limits are the two shares that a normal test of `level` just fails to reject: they stay in
    [0, 1] and have a width where nothing, or everything, was right. Raises RequestError if there is
    no image.

    >>> share = wilson(75, 100)
    >>> round(share.low, 3), share.value, round(share.high, 3)
    (0.657, 0.75, 0.825)
    """
    if images == 0:
        raise RequestError(
            "images: no accuracy can be estimated from 0 images; expected at least one"
        )
    from scipy.stats import binomtest  # imports of scipy take a second: not at start-up

    limits = binomtest(count, images).proportion_ci(level, method="wilson")
    return Share(count / images, float(limits.low), float(limits.high), count, images)


def paired(first: Flags, second: Flags, level: float = 0.95) -> Paired:
    """Compare two rows of results on the same images, in the same order.

    The interval is Tango's score interval for a difference of paired proportions (1998, Statistics
    in Medicine 17:891); `p` is McNemar's exact two-sided one (1947, Psychometrika 12:153). Raises
    RequestError if the two are not of one length, or empty.
    """
    if len(first) != len(second) or len(first) == 0:
        raise RequestError(
            "flags: expected the same images for both, at least one, "
            f"found {len(first)} and {len(second)}"
        )
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    images = len(first)
    return Paired(
        both,
        only_first,
        only_second,
        neither,
        (only_first - only_second) / images,
        -_upper(only_second, only_first, images, level),
        _upper(only_first, only_second, images, level),
        mcnemar(only_first, only_second),
    )


def mcnemar(
    only_first: int, only_second: int, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> float:
    """p: each disagreement goes either way with chance 1/2 if both are equally good.

    `greater`: that the first is right so much more often. Exact, from the binomial distribution; 1 if
    the two never disagree.

    >>> mcnemar(only_first=8, only_second=0)
    0.0078125
    """
    from scipy.stats import binomtest

    disagreements = only_first + only_second
    if not disagreements:
        return 1.0
    return float(binomtest(only_first, disagreements, alternative=alternative).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family of tests, adjusted so that all errors together stay below the level.

    Holm 1979 (Scandinavian Journal of Statistics 6:65): the smallest of m is multiplied by m, the
    next by m - 1, and so on; no adjusted value is below that of a smaller one, or above 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def over_seeds(values: Sequence[float], level: float = 0.95) -> Spread:
    """Mean over seeds with Student's t interval (1908, Biometrika 6:1).

    An interval of the mean over all seeds, not of the next seed. Raises RequestError if there is no
    value.
    """
    seeds = len(values)
    if seeds == 0:
        raise RequestError("seeds: expected at least one value to average, found none")
    mean = math.fsum(values) / seeds
    if seeds == 1:
        return Spread(mean, None, None, None, seeds)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (seeds - 1))
    from scipy.stats import t

    reach = float(t.ppf((1 + level) / 2, seeds - 1)) * std / math.sqrt(seeds)
    return Spread(mean, std, mean - reach, mean + reach, seeds)


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method less that of another, in [-1, 1], over pairs of seeds on the same images.

    `low` and `high` are its confidence limits, `p` the chance of a difference at least as large, in either
    direction, if the two are equally good.
    """

    value: float
    low: float
    high: float
    p: float
    seeds: int  # pairs


def difference(pairs: Sequence[tuple[Flags, Flags]], level: float = 0.95) -> Difference:
    """Compare two methods by a pair of results of each seed, all on the same images in the same order.

    The two are taken to differ on other seeds and on other images as they differ on these: the variance
    of the mean difference is that of the means of seeds over their number, plus that of the means of images
    over theirs. What seed and image have in common is in both terms, so that the interval is too wide
    rather than too narrow (Owen 2007, Annals of Applied Statistics 1:386). Limits and `p` are those of
    Student's t with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2:110). A single seed
    has the limits and `p` of `paired`, which hold for that seed alone.

    Raises:
        RequestError: if there is no pair, or the results are not of one length.
    """
    if not pairs:
        raise RequestError("seeds: expected at least one pair of results, found none")
    singles = [paired(first, second, level) for first, second in pairs]
    if len(pairs) == 1:
        (single,) = singles
        return Difference(single.difference, single.low, single.high, single.p, 1)
    table = np.array([first.astype(float) - second.astype(float) for first, second in pairs])
    seeds, images = table.shape
    value = float(table.mean())
    of_seeds = float(table.mean(1).var(ddof=1)) / seeds
    of_images = float(table.mean(0).var(ddof=1)) / images if images > 1 else 0.0
    variance = of_seeds + of_images
    if variance == 0:
        return Difference(value, value, value, 0.0 if value else 1.0, seeds)
    from scipy.stats import t

    images_part = of_images**2 / (images - 1) if images > 1 else 0.0
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + images_part)
    error = math.sqrt(variance)
    reach = float(t.ppf((1 + level) / 2, freedom)) * error
    p = 2 * float(t.sf(abs(value) / error, freedom))
    return Difference(value, value - reach, value + reach, p, seeds)


def align(first: pa.Table, second: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Two tables of flags in the order of the image's number, so that equal rows are the same image.

    Each has a column `index`, the image's number in the test set, and a column `label`. Raises
    RequestError if they are not of the same test set: other numbers, a
    number twice, or another label.
    """
    one, two = first.sort_by("index"), second.sort_by("index")
    _refuse_twice(one, "first")
    _refuse_twice(two, "second")
    if not one["index"].equals(two["index"]):
        raise RequestError(
            "flags: first and second are of different test images "
            f"({_only_in(one, two)} only in the one, {_only_in(two, one)} only in the other); "
            "expected the same, so evaluate both on one test set"
        )
    if not one["label"].equals(two["label"]):
        raise RequestError(
            "flags: first and second number their images alike but label them differently; "
            "expected the same test set"
        )
    return one, two


def _upper(more: int, fewer: int, images: int, level: float) -> float:
    """The largest difference that a score test of `level` does not reject; `more` speak for it.

    The root of z(d) = -quantile, where z falls from 0 at the estimate.
    """
    from scipy.optimize import root_scalar
    from scipy.stats import norm

    estimate, quantile = (more - fewer) / images, float(norm.ppf((1 + level) / 2))
    if more == images:
        return 1.0
    found = root_scalar(
        lambda d: _score(d, more, fewer, images) + quantile,
        bracket=(estimate, 1.0),
        method="brentq",
    )
    return float(found.root)


def _score(difference: float, more: int, fewer: int, images: int) -> float:
    """Tango's z: how far the disagreements are from a true `difference`, in standard deviations.

    The variance is that of the likeliest shares which differ by just so much: the share of `fewer`
    is the larger root of a quadratic.
    """
    away = more - fewer - images * difference
    if away == 0:
        return 0.0
    half = (2 * images - more + fewer) * difference - more - fewer
    root = math.sqrt(max(0.0, half**2 + 8 * images * fewer * difference * (1 - difference)))
    share = (root - half) / (4 * images)
    variance = images * (2 * share + difference * (1 - difference))
    return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away)


def _refuse_twice(table: pa.Table, name: str) -> None:
    twice = len(table) - len(table["index"].unique())
    if twice:
        raise RequestError(
            f"flags: {name} holds {twice} images twice; expected each test image once"
        )


def _only_in(one: pa.Table, other: pa.Table) -> int:
    return len(set(one["index"].to_pylist()) - set(other["index"].to_pylist()))
