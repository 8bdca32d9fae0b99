"""The geometry of the threat models: closed forms, and properties of random points."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import EPS, assert_near, ball_of, generator, pixels, rng_of, row
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from raytrain.core.threat_models import L1, L2, AbstractThreatModel, Linf, in_box
from raytrain.core.types import per_sample_dot

NORMS = ["linf", "l2", "l1"]
DTYPES = [torch.float32, torch.float64]

# --- closed forms -----------------------------------------------------------------------------

GRAD = (3.0, -4.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ball", "delta", "gap"),
    [
        (Linf(eps=0.1), (0, 0, 0, 0), 0.8),
        (Linf(eps=0.1), (0.1, -0.1, 0, 0.1), 0.0),
        (Linf(eps=0.1), (-0.1, 0.1, 0, -0.1), 1.6),
        (Linf(eps=0.1), (0.05, -0.05, 0, 0.05), 0.4),
        (L2(eps=0.1), (0, 0, 0, 0), 0.1 * math.sqrt(26)),
        (L2(eps=0.1), tuple(0.1 * g / math.sqrt(26) for g in GRAD), 0.0),
        (L2(eps=0.1), tuple(-0.1 * g / math.sqrt(26) for g in GRAD), 0.2 * math.sqrt(26)),
        (L1(eps=0.1), (0, 0, 0, 0), 0.4),
        (L1(eps=0.1), (0, -0.1, 0, 0), 0.0),
        (L1(eps=0.1), (0.1, 0, 0, 0), 0.1),
    ],
)
def test_gap_of_a_known_gradient_is_the_closed_form(
    ball: AbstractThreatModel, delta: tuple[float, ...], gap: float, dtype: torch.dtype
) -> None:
    found = ball.gap(row(*delta, dtype=dtype), row(*GRAD, dtype=dtype))
    assert float(found) == pytest.approx(gap, abs=3e-7)  # two ulp of float32 at 1.6


def test_gap_of_linf_is_exactly_zero_at_the_best_vertex() -> None:
    grad = torch.randn(512, 1, 4, 4, generator=generator(0))
    ball = Linf(eps=8 / 255)
    assert torch.equal(ball.gap(ball.project(grad.sign()), grad), torch.zeros(512))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ball", "delta", "gap", "box_gap"),
    [
        (Linf(eps=0.1), (0, 0, 0, 0), 0.8, 0.05),
        (Linf(eps=0.1), (0, 0, 0, 0.05), 0.75, 0.0),
        (L2(eps=0.1), (0, 0, 0, 0), 0.1 * math.sqrt(26), 0.05),
        (L2(eps=0.1), (0, 0, 0, 0.05), 0.1 * math.sqrt(26) - 0.05, 0.0),
        (L1(eps=0.1), (0, 0, 0, 0), 0.4, 0.05),
        (L1(eps=0.1), (0, 0, 0, 0.05), 0.35, 0.0),
    ],
)
def test_box_gap_looks_past_saturated_pixels_and_gap_does_not(
    ball: AbstractThreatModel,
    delta: tuple[float, ...],
    gap: float,
    box_gap: float,
    dtype: torch.dtype,
) -> None:
    # The two large gradients push their pixels out of [0, 1]; only the last pixel may move.
    images, grad = row(1, 0, 0.5, 0.95, dtype=dtype), row(*GRAD, dtype=dtype)
    moved = row(*delta, dtype=dtype)
    assert float(ball.gap(moved, grad)) == pytest.approx(gap, abs=1e-7)
    # 1 - 0.95 in float32 is 0.05 to 6e-8.
    assert float(ball.box_gap(moved, grad, images)) == pytest.approx(box_gap, abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_gap_bounds_value_and_distance_of_a_strongly_concave_maximum(norm: str) -> None:
    # f = d - d^2/2 on |d| <= 1/2 in one dimension, where all norms agree; its maximum is at 1/2.
    ball, here = ball_of(norm, 0.5), 0.2
    gap = float(ball.gap(row(here), row(1 - here)))
    value = [d - d * d / 2 for d in (here, 0.5)]
    assert gap == pytest.approx(0.24, abs=1e-15)  # a few ulp of float64
    assert value[1] - value[0] == pytest.approx(0.195) and value[1] - value[0] <= gap
    assert (0.5 - here) ** 2 == pytest.approx(0.09) and (0.5 - here) ** 2 <= gap / 1.0


def test_l1_knapsack_fills_the_best_pixels_as_far_as_the_box_allows() -> None:
    images, grad = row(0.9, 0.2, 0.5, 0.0), row(5, -3, 2, -9)
    # The last pixel is black already; 0.1, then 0.2, then what is left of 0.45.
    assert_near(L1(eps=0.45).box_vertex(grad, images), row(0.1, -0.2, 0.15, 0), 1e-15)
    assert_near(L1(eps=0.05).box_vertex(grad, images), row(0.05, 0, 0, 0), 1e-15)


def test_l2_box_vertex_shares_what_a_blocked_pixel_leaves() -> None:
    # The first pixel may move by 0.1 only; the rest of the radius, sqrt(0.25^2 - 0.1^2), is
    # divided between the others in proportion to their gradients, 4 to 3.
    rest = math.sqrt(0.25**2 - 0.1**2)
    vertex = L2(eps=0.25).box_vertex(row(10, 4, 3), row(0.9, 0.5, 0.5))
    assert_near(vertex, row(0.1, rest * 0.8, rest * 0.6), 1e-12)


def test_l1_projection_is_soft_thresholding_with_signs_kept() -> None:
    projected = L1(eps=1.0).project(row(0.9, -0.7, 0.1, 0.0))
    assert_near(projected, row(0.6, -0.4, 0, 0), 1e-15)


def test_a_radius_may_be_written_as_a_fraction_and_is_never_negative() -> None:
    assert Linf.model_validate({"eps": "8/255"}).eps == 8 / 255
    for eps in (-0.1, "-8/255", float("nan"), "eight"):
        with pytest.raises(ValidationError):
            Linf.model_validate({"eps": eps})


# --- against brute force ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_box_vertex_beats_every_one_of_many_feasible_points(norm: str) -> None:
    images, ball = pixels(200, size=3), ball_of(norm)
    grad = torch.randn(images.shape, generator=generator(1), dtype=torch.float64)
    vertex = ball.box_vertex(grad, images)
    # (1 + 1e-12): the bisection of l2 ends within rounding of the radius.
    assert (ball.norm_of(vertex) <= ball.eps * (1 + 1e-12)).all()
    assert torch.equal(vertex, in_box(vertex, images))
    best = per_sample_dot(vertex, grad)
    for seed in range(60):
        # Random directions, and directions near the gradient, at the edge of the ball.
        away = torch.randn(images.shape, generator=generator(2 + seed), dtype=torch.float64)
        away = away + grad * (seed % 5)
        point = ball.feasible(away * (10.0 ** (seed % 3 - 1)), images)
        assert (per_sample_dot(point, grad) <= best + 1e-12).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_box_vertex_is_the_best_point_of_a_fine_grid(norm: str) -> None:
    ball, line = ball_of(norm, 0.4), torch.linspace(-0.4, 0.4, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    inside = grid[ball.norm_of(grid) <= ball.eps + 1e-12]
    for seed in range(20):
        images = pixels(1, size=2, seed=seed)[:, :, :1]
        grad = torch.randn(1, 1, 1, 2, generator=generator(seed), dtype=torch.float64)
        overshoot = (in_box(inside, images.expand_as(inside)) - inside).abs().flatten(1).amax(1)
        legal = inside[overshoot <= 1e-12]
        best = float((legal * grad).flatten(1).sum(1).max())
        exact = float(per_sample_dot(ball.box_vertex(grad, images), grad))
        # Rounding the maximum towards zero loses at most one cell, 0.001, in either coordinate.
        assert best - 1e-11 <= exact <= best + 0.001 * float(grad.abs().sum())


# --- properties of random points --------------------------------------------------------------

# No time limit (torch's first call is slow), no data base, and the same examples in every run.
theorem = settings(deadline=None, database=None, derandomize=True, max_examples=40)

SHAPE = (2, 1, 2, 3)
NUM = math.prod(SHAPE)
RADII = st.sampled_from([0.0, 8 / 255, 0.031, 0.1, 0.5, 1.5, 12.0])
BALLS = st.builds(ball_of, st.sampled_from(NORMS), RADII)


def tensors(low: float, high: float) -> st.SearchStrategy[Tensor]:
    number = st.floats(low, high, width=32, allow_subnormal=False)
    # Many zeros and bounds: ties, flat gradients and saturated pixels are where geometry breaks.
    numbers = st.one_of(number, st.sampled_from([0.0, low, high]))
    return st.lists(numbers, min_size=NUM, max_size=NUM).map(
        lambda values: torch.tensor(values, dtype=torch.float32).view(SHAPE)
    )


DELTAS, IMAGES = tensors(-2, 2), tensors(0, 1)
# Not below 1e-6, so that squares of float32 stay normal numbers; tinier ones have their own test.
GRADS = tensors(-10, 10).map(lambda g: torch.where(g.abs() < 1e-6, 0.0, g))

ROUNDING = 1e-6
"""About ten units in the last place of float32 at 1, times what six terms add up."""


@theorem
@given(ball=BALLS, delta=DELTAS)
def test_projection_is_idempotent(ball: AbstractThreatModel, delta: Tensor) -> None:
    once = ball.project(delta)
    assert_near(ball.project(once), once, ROUNDING)
    if isinstance(ball, Linf):
        assert torch.equal(ball.project(once), once)


@theorem
@given(ball=BALLS, delta=DELTAS)
def test_projection_leaves_points_of_the_ball_where_they_are(
    ball: AbstractThreatModel, delta: Tensor
) -> None:
    inside = ball.norm_of(delta) <= ball.eps
    assert torch.equal(ball.project(delta)[inside], delta[inside])


@theorem
@given(ball=BALLS, delta=DELTAS, other=DELTAS)
def test_projection_is_no_farther_than_any_other_point_of_the_ball(
    ball: AbstractThreatModel, delta: Tensor, other: Tensor
) -> None:
    nearest = (delta - ball.project(delta)).double().flatten(1).norm(dim=1)
    for scale in (0.1, 1.0, 100.0):
        point = ball.project(scale * other.double())
        distance = (delta - point).flatten(1).norm(dim=1)
        assert (nearest <= distance + ROUNDING * max(1.0, ball.eps)).all()


@theorem
@given(delta=DELTAS, other=DELTAS, images=IMAGES, eps=RADII)
def test_feasible_point_of_linf_is_the_nearest_one_of_ball_and_box(
    delta: Tensor, other: Tensor, images: Tensor, eps: float
) -> None:
    ball = Linf(eps=eps)
    nearest = (delta - ball.feasible(delta, images)).double().flatten(1).norm(dim=1)
    distance = (delta - ball.feasible(other, images)).double().flatten(1).norm(dim=1)
    assert (nearest <= distance).all()


@theorem
@given(ball=BALLS, delta=DELTAS, images=IMAGES)
def test_feasible_points_are_in_ball_and_box(
    ball: AbstractThreatModel, delta: Tensor, images: Tensor
) -> None:
    point = ball.feasible(delta, images)
    if isinstance(ball, Linf):
        assert float(point.abs().max()) <= float(torch.tensor(ball.eps))  # exactly
    else:
        # The threshold of l1 is rounded at the size of delta, here up to 2.
        assert (ball.norm_of(point) <= ball.eps + ROUNDING * max(1.0, ball.eps)).all()
    moved = images + point
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1  # exactly


@theorem
@given(ball=BALLS, delta=DELTAS, images=IMAGES, grad=GRADS)
def test_box_gap_lies_between_zero_and_gap(
    ball: AbstractThreatModel, delta: Tensor, images: Tensor, grad: Tensor
) -> None:
    point = ball.feasible(delta, images)
    rounding = ROUNDING * (1 + ball.eps) * (1 + float(grad.abs().sum()))
    gap, box_gap = ball.gap(point, grad), ball.box_gap(point, grad, images)
    assert float(box_gap.min()) >= -rounding
    assert (box_gap <= gap + rounding).all()
    assert (gap <= 2 * ball.eps * ball.dual_norm(grad) + rounding).all()
    if isinstance(ball, Linf):
        assert float(gap.min()) >= 0 and float(box_gap.min()) >= -rounding


@theorem
@given(ball=BALLS, delta=DELTAS, other=DELTAS, images=IMAGES, grad=GRADS)
def test_no_feasible_point_gains_more_than_the_gap(
    ball: AbstractThreatModel, delta: Tensor, other: Tensor, images: Tensor, grad: Tensor
) -> None:
    here = ball.feasible(delta, images)
    rounding = ROUNDING * (1 + ball.eps) * (1 + float(grad.abs().sum()))
    gap, box_gap = ball.gap(here, grad), ball.box_gap(here, grad, images)
    for scale in (0.1, 1.0, 100.0):
        inside = ball.project(scale * other.double())
        legal = ball.feasible(scale * other.double(), images.double())
        assert (per_sample_dot(inside - here, grad) <= gap + rounding).all()
        assert (per_sample_dot(legal - here, grad) <= box_gap + rounding).all()


@theorem
@given(ball=BALLS, grad=GRADS)
def test_steepest_attains_the_dual_norm_inside_the_unit_ball(
    ball: AbstractThreatModel, grad: Tensor
) -> None:
    step = ball.steepest(grad)
    assert (ball.norm_of(step) <= 1 + ROUNDING).all()
    assert_near(per_sample_dot(step, grad), ball.dual_norm(grad), ROUNDING)


@theorem
@given(ball=BALLS, delta=DELTAS, images=IMAGES)
def test_zero_gradient_gives_a_zero_step(
    ball: AbstractThreatModel, delta: Tensor, images: Tensor
) -> None:
    flat, point = torch.zeros_like(images), ball.feasible(delta, images)
    assert not ball.steepest(flat).any()
    assert not ball.direction(flat, point, images).any()
    assert not ball.gap(point, flat).any() and not ball.box_gap(point, flat, images).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-22, 1e-15, 1e15])
def test_steepest_does_not_depend_on_the_scale_of_the_loss(norm: str, scale: float) -> None:
    # The gradient of a confident network is tiny: with a margin of 50 nats it is 1e-22.
    grad, ball = torch.tensor([3.0, -4.0, 0.5, 1.0]).view(1, 1, 2, 2), ball_of(norm)
    # 1e-6: the scaled numbers are rounded to float32 once more.
    assert_near(ball.steepest(scale * grad), ball.steepest(grad), 1e-6)


@theorem
@given(
    delta=DELTAS,
    images=IMAGES,
    grad=GRADS,
    spread=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_l1_direction_never_moves_a_blocked_pixel(
    delta: Tensor, images: Tensor, grad: Tensor, spread: float
) -> None:
    ball = L1(eps=1.0, spread=spread)
    point = ball.feasible(delta, images)
    step = ball.direction(grad, point, images)
    moved = images + point
    assert not (((moved >= 1) & (step > 0)) | ((moved <= 0) & (step < 0))).any()
    assert (ball.norm_of(step) <= 1 + ROUNDING).all()
    assert (step * grad >= 0).all()


def test_l1_direction_shares_the_step_among_the_largest_gradients() -> None:
    grad = torch.arange(1.0, 41.0).view(1, 1, 5, 8)
    grey = torch.full_like(grad, 0.5)
    step = L1(eps=1.0, spread=0.1).direction(grad, torch.zeros_like(grad), grey)
    assert torch.equal(step.flatten(), torch.where(grad.flatten() > 36, 0.25, 0.0))


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_noise_stays_in_the_ball_of_its_radius(
    norm: str, radius: float, dtype: torch.dtype
) -> None:
    like, ball = torch.zeros(2000, 1, 4, 4, dtype=dtype), ball_of(norm)
    noise = ball.noise(like, rng_of(2000), "start", radius)
    assert noise.dtype == dtype
    bound = torch.tensor(radius * ball.eps, dtype=dtype)
    rounding = 0 if norm == "linf" else 1e-6  # sums of 16 float32 terms; l-inf has no sum
    assert float(ball.norm_of(noise).max()) <= float(bound) * (1 + rounding)


UNIFORM_LAW: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda noise: (noise.flatten() / EPS["linf"] + 1) / 2,
    "l2": lambda noise: noise.flatten(1).norm(dim=1) / EPS["l2"],
    "l1": lambda noise: noise.flatten(1).abs().sum(1) / EPS["l1"],
}


@pytest.mark.parametrize("norm", NORMS)
def test_noise_of_linf_is_uniform_and_the_length_of_the_others_too(norm: str) -> None:
    noise = ball_of(norm).noise(torch.zeros(4000, 1, 4, 4), rng_of(4000), "start")
    unit = UNIFORM_LAW[norm](noise).double().sort().values
    law = torch.linspace(0, 1, len(unit), dtype=torch.float64)
    # Kolmogorov-Smirnov at the 1% level; the seed is fixed, so it passes always or never.
    assert float((unit - law).abs().max()) <= 1.63 / math.sqrt(len(unit))


@pytest.mark.parametrize("norm", NORMS)
def test_noise_prefers_no_direction(norm: str) -> None:
    noise = ball_of(norm).noise(torch.zeros(4000, 1, 2, 2), rng_of(4000), "start").flatten(1)
    spread = noise.std(0)
    # Four standard errors of a mean, and of a standard deviation, of 4000 numbers.
    assert (noise.mean(0).abs() <= 4 * spread / math.sqrt(4000)).all()
    assert float(spread.max() / spread.min()) <= 1 + 8 / math.sqrt(2 * 4000)
    correlation = torch.corrcoef(noise.T) - torch.eye(4)
    assert float(correlation.abs().max()) <= 4 / math.sqrt(4000)
