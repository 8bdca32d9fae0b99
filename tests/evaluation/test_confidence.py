"""Confidence: closed forms, published examples, dualities between intervals and tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from raytrain.core.errors import RequestError
from raytrain.evaluation import confidence
from raytrain.evaluation.confidence import (
    align,
    difference,
    holm,
    mcnemar,
    over_seeds,
    paired,
    wilson,
)

Z = 1.959963984540054  # the normal quantile of 0.975
PAIRS = list(itertools.product(range(6), repeat=2))
SMALL = [
    (more, fewer, images)
    for images in (1, 2, 7, 11)
    for more, fewer in itertools.product(range(images + 1), repeat=2)
    if more + fewer <= images
]


def flags(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of verdicts with these four counts, in an order that mixes them."""
    counts = (both, only_first, only_second, neither)
    rows = np.repeat([(True, True), (True, False), (False, True), (False, False)], counts, axis=0)
    rows = np.random.RandomState(0).permutation(rows)
    return rows[:, 0], rows[:, 1]


# ---------------------------------------------------------------- one share


@pytest.mark.parametrize("count", [0, 1, 20, 199, 200])
def test_the_limits_of_a_share_are_where_the_score_test_just_fails_to_reject(count: int) -> None:
    share = wilson(count, 200)
    assert share.value == count / 200 and (share.count, share.images) == (count, 200)
    assert share.low <= share.value <= share.high
    for limit in {share.low, share.high} - {0.0, 1.0}:
        score = (share.value - limit) / math.sqrt(limit * (1 - limit) / 200)
        assert abs(score) == pytest.approx(Z, abs=1e-9)


def test_nothing_right_and_everything_right_have_the_closed_form_and_stay_in_range() -> None:
    none, every = wilson(0, 10), wilson(10, 10)
    assert none.low == 0 and none.high == pytest.approx(Z**2 / (10 + Z**2))
    assert every.high == 1 and every.low == pytest.approx(10 / (10 + Z**2))


def test_a_higher_level_is_wider() -> None:
    assert wilson(3, 10, 0.99).low < wilson(3, 10, 0.95).low < wilson(3, 10, 0.5).low


def test_no_images_are_refused() -> None:
    with pytest.raises(RequestError, match="0 images"):
        wilson(0, 0)


# ---------------------------------------------------------------- two rows of verdicts


def test_the_four_cells_are_counted() -> None:
    found = paired(*flags(11, 5, 3, 2))
    assert (found.both, found.only_first, found.only_second, found.neither) == (11, 5, 3, 2)
    assert found.images == 21 and found.difference == 2 / 21


def test_the_published_example_of_the_interval() -> None:
    """Airway hyper-responsiveness, 21 children: Fagerland, Lydersen and Laake 2014, Statistics in
    Medicine 33:2850, table of Tango's interval: -0.517 to -0.026."""
    found = paired(*flags(1, 1, 7, 12))
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)
    assert found.p == pytest.approx(0.0703125)  # 2 (1 + 8) / 2^8


@pytest.mark.parametrize(("more", "fewer", "images"), SMALL)
def test_the_limits_are_where_the_score_of_the_likeliest_shares_is_the_quantile(
    more: int, fewer: int, images: int
) -> None:
    """Against a numerical maximum of the likelihood: the closed form has no part in it."""
    found = paired(*flags(0, more, fewer, images - more - fewer))
    assert -1 <= found.low <= found.difference <= found.high <= 1
    for limit in (found.low, found.high):
        if abs(limit) == 1:
            assert found.difference == limit
            continue
        share = likeliest(limit, more, fewer, images)
        variance = images * (2 * share + limit - limit**2)
        score = (more - fewer - images * limit) / math.sqrt(variance)
        assert abs(score) == pytest.approx(Z, rel=1e-3)


def likeliest(difference: float, more: int, fewer: int, images: int) -> float:
    """The share of images right by the second alone, where the first leads by `difference`."""

    def against(share: float) -> float:
        shares = (share + difference, share, 1 - 2 * share - difference)
        counts = (more, fewer, images - more - fewer)
        return -math.fsum(
            count * math.log(max(value, 1e-300))
            for count, value in zip(counts, shares, strict=True)
            if count
        )

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    found = minimize_scalar(against, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    return min([*bounds, float(found.x)], key=against)


@pytest.mark.parametrize(("more", "fewer", "images"), SMALL)
def test_the_interval_leaves_zero_out_exactly_when_the_score_test_rejects(
    more: int, fewer: int, images: int
) -> None:
    found = paired(*flags(images - more - fewer, more, fewer, 0))
    rejects = more + fewer > 0 and (more - fewer) ** 2 / (more + fewer) > Z**2
    assert rejects == (not found.low <= 0 <= found.high)


@pytest.mark.parametrize("images", [1, 10, 10_000])
def test_models_that_never_disagree_have_the_width_of_a_share_of_none(images: int) -> None:
    found = paired(*flags(images, 0, 0, 0))
    assert found.difference == 0 and found.p == 1
    assert found.high == pytest.approx(wilson(0, images).high, rel=1e-6)
    assert found.low == -found.high


def test_swapping_the_two_swaps_the_signs_and_agreements_tell_nothing_apart() -> None:
    first, second = flags(50, 9, 4, 37)
    there, back = paired(first, second), paired(second, first)
    assert (there.low, there.high) == (-back.high, -back.low)
    assert there.difference == -back.difference and there.p == back.p
    moved = paired(*flags(87, 9, 4, 0))
    assert (there.low, there.high, there.p) == (moved.low, moved.high, moved.p)


@pytest.mark.parametrize(("only_first", "only_second"), PAIRS)
def test_mcnemar_is_the_count_of_coin_tosses_at_least_as_one_sided(
    only_first: int, only_second: int
) -> None:
    tosses = only_first + only_second
    as_rare = [
        math.comb(tosses, k)
        for k in range(tosses + 1)
        if abs(2 * k - tosses) >= abs(only_first - only_second)
    ]
    assert mcnemar(only_first, only_second) == pytest.approx(sum(as_rare) / 2**tosses)


def test_other_lengths_and_no_images_are_refused() -> None:
    with pytest.raises(RequestError, match="found 2 and 3"):
        paired(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(RequestError, match="found 0 and 0"):
        paired(np.ones(0, bool), np.ones(0, bool))


# ---------------------------------------------------------------- many tests, many seeds


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]  # not 0.9 after 1.0
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_holm_rejects_what_its_step_down_rule_rejects() -> None:
    values = np.random.RandomState(1).uniform(0, 0.05, 40).tolist()
    ordered = sorted(values)
    fails = [rank for rank, p in enumerate(ordered) if p > 0.05 / (len(values) - rank)]
    rejected = ordered[: min(fails, default=len(values))]
    assert sorted(p for p, q in zip(values, holm(values), strict=True) if q <= 0.05) == rejected
    assert 0 < len(rejected) < len(values)


def test_seeds_have_the_sample_deviation_and_a_t_interval() -> None:
    found = over_seeds([0.50, 0.52, 0.57])
    assert found.mean == pytest.approx(0.53) and found.seeds == 3
    assert found.std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert found.std is not None and found.low is not None and found.high is not None
    reach = (
        4.302652729911275 * found.std / math.sqrt(3)
    )  # t of two degrees of freedom, closed form
    assert found.high - found.mean == pytest.approx(reach)
    assert found.mean - found.low == pytest.approx(reach)


def test_one_seed_has_no_interval_and_no_seed_is_refused() -> None:
    found = over_seeds([0.5])
    assert (found.mean, found.std, found.low, found.high, found.seeds) == (
        0.5,
        None,
        None,
        None,
        1,
    )
    with pytest.raises(RequestError, match="at least one value"):
        over_seeds([])


# ---------------------------------------------------------------- tables


def table(index: list[int], label: list[int]) -> pa.Table:
    return pa.table({"index": index, "label": label, "aa": [i % 2 == 0 for i in index]})


def test_tables_meet_image_by_image_whatever_their_order() -> None:
    one, two = align(table([7, 3, 5], [1, 0, 2]), table([5, 7, 3], [2, 1, 0]))
    assert one["index"].to_pylist() == two["index"].to_pylist() == [3, 5, 7]
    assert one["aa"].to_pylist() == two["aa"].to_pylist() == [False, False, False]
    assert one["label"].to_pylist() == [0, 2, 1]


def test_different_test_sets_are_refused_in_one_sentence() -> None:
    with pytest.raises(
        RequestError, match="first and second are of different test images.*1 only"
    ):
        align(table([1, 2], [0, 0]), table([1, 3], [0, 0]))
    with pytest.raises(RequestError, match="label them differently"):
        align(table([1, 2], [0, 1]), table([1, 2], [0, 0]))
    with pytest.raises(RequestError, match="second holds 1 images twice"):
        align(table([1, 2], [0, 0]), table([1, 1], [0, 0]))


def test_the_score_of_a_certain_difference_is_infinite() -> None:
    """At a difference of one no image can be against it: any that is refutes it."""
    assert confidence._score(1.0, 9, 0, 10) == -math.inf


# ---------------------------------------------------------------- differences over several seeds


def crossed(seeds: int, images: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of two equally good methods: images differ in difficulty for either, seeds in skill."""
    source = np.random.RandomState(number)
    hard = source.normal(size=(2, 1, images))
    skill = source.normal(scale=0.3, size=(2, seeds, 1))
    first, second = source.normal(size=(2, seeds, images)) + hard + skill > 0
    return list(zip(first, second, strict=True))


def test_one_pair_of_seeds_is_the_paired_comparison() -> None:
    one, two = flags(3, 9, 2, 6)
    single, whole = paired(one, two), difference([(one, two)])
    expected = (single.difference, single.low, single.high, single.p, 1)
    assert (whole.value, whole.low, whole.high, whole.p, whole.seeds) == expected


def test_seeds_that_agree_image_by_image_leave_the_variance_of_the_images_alone() -> None:
    one, two = flags(3, 9, 2, 6)
    whole = difference([(one, two)] * 4)
    each = one.astype(float) - two.astype(float)
    error = each.std(ddof=1) / math.sqrt(len(each))
    reach = float(student.ppf(0.975, len(each) - 1)) * error
    assert whole.high - whole.value == pytest.approx(reach, rel=1e-12)
    assert whole.p == pytest.approx(ttest_1samp(each, 0)[1], rel=1e-12)


def test_images_that_agree_leave_the_interval_over_seeds() -> None:
    skill = [True, True, False, True, True]
    pairs = [(np.full(30, right), np.zeros(30, dtype=bool)) for right in skill]
    whole, expected = difference(pairs), over_seeds([float(right) for right in skill])
    assert (whole.low, whole.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert whole.p == pytest.approx(ttest_1samp(np.array(skill, dtype=float), 0)[1], rel=1e-12)


def test_methods_that_never_differ_have_an_interval_of_no_width_and_p_of_one() -> None:
    one, _ = flags(3, 9, 2, 6)
    whole = difference([(one, one), (one, one)])
    assert (whole.value, whole.low, whole.high, whole.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_holds_for_other_seeds_and_other_images() -> None:
    """95 % of intervals hold the true difference, 0; those of either source alone do not."""
    trials = [crossed(3, 60, number) for number in range(400)]
    found = [difference(pairs) for pairs in trials]
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.93
    assert np.mean([one.p < 0.05 for one in found]) <= 0.07
    alone = [paired(*pairs[0]) for pairs in trials]
    assert np.mean([one.low <= 0 <= one.high for one in alone]) < 0.9


def test_the_difference_turns_its_sign_with_the_methods() -> None:
    pairs = crossed(3, 60, 7)
    one, other = difference(pairs), difference([(b, a) for a, b in pairs])
    assert (one.value, one.low, one.high) == (-other.value, -other.high, -other.low)
    assert one.p == other.p


def test_a_difference_of_no_pairs_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one pair"):
        difference([])
