"""Projected ascent: exact maxima, stopping by FOSC, what is frozen and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    EPS,
    Affine,
    assert_near,
    ball_of,
    batch_of,
    generator,
    state_of,
    tiny_net,
    views_of,
)
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.algorithms import Nested
from raytrain.attacks import (
    AbstractInit,
    AbstractStopping,
    AttackResult,
    Gap,
    ProjectedAscent,
    Remembered,
    Uniform,
    Zero,
)
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.losses import AbstractLoss, CrossEntropy, Reference
from raytrain.core.oracle import Oracle
from raytrain.core.sample_store import SampleStore, cut, paste
from raytrain.core.schedules import Constant, Power
from raytrain.core.threat_models import L1, L2, AbstractThreatModel, Linf, in_box
from raytrain.core.types import Batch, Delta, PerSample, Predict, Progress, per_sample_dot
from raytrain.outer import Plain

NORMS = ["linf", "l2", "l1"]


class Score(AbstractLoss):
    """<slope, x + delta> itself: a loss linear in delta, whose FOSC is a closed form."""

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return predict(batch.images + delta)[:, 1]

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return self.inner(predict, batch, delta, reference)


def run(
    attack: ProjectedAscent,
    model: nn.Module,
    ball: AbstractThreatModel,
    batch: Batch,
    *,
    meter: Meter | None = None,
    objective: AbstractLoss | None = None,
    start: Tensor | None = None,
    progress: float = 0.0,
) -> AttackResult:
    oracle = Oracle(
        model, objective or CrossEntropy(), batch, meter or Meter(), attack_bn=attack.bn
    )
    first = attack.start.delta(ball, batch, None) if start is None else start
    return attack.maximise(oracle, ball, first, Progress(progress, progress))


def pgd(steps: int, **fields: Any) -> ProjectedAscent:
    return ProjectedAscent(**{"steps": steps, "step_size": "eps/4", "bn": "eval", **fields})


def until(c_max: float, steps: int = 10, **fields: Any) -> ProjectedAscent:
    """PGD that stops at FOSC <= c_max, at every time of training."""
    return pgd(steps, stop=Gap(c_max=c_max, decay=Constant()), **fields)


def gradient(model: nn.Module, batch: Batch, delta: Tensor) -> Tensor:
    return Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval").delta_grad(delta)[1]


def slope(seed: int = 3) -> Tensor:
    return torch.randn(1, 8, 8, generator=generator(seed), dtype=torch.float64)


def grey(num: int) -> Batch:
    """Images so far from 0 and 1 that no ball of `EPS` reaches the box."""
    batch = batch_of(num, classes=1)  # label 0: the loss of `Affine` grows with its score
    return Batch(torch.full_like(batch.images, 0.5), batch.labels, batch.index, batch.rng)


# --- affine models ----------------------------------------------------------------------------


def test_pgd_reaches_the_exact_maximum_of_an_affine_model_in_linf() -> None:
    batch, ball, model = batch_of(16, classes=1), ball_of("linf"), Affine(slope())
    # From a random start the farthest vertex is 2 eps away: eight steps of eps/4.
    found = run(pgd(8), model, ball, batch)
    best = in_box(ball.eps * slope().sign().expand_as(batch.images), batch.images)
    assert_near(found.delta, best, 1e-15)  # one rounding of eight sums
    grad = gradient(model, batch, found.delta)
    assert float(ball.box_gap(found.delta, grad, batch.images).max()) <= 1e-14


def test_pgd_reaches_the_exact_maximum_of_an_affine_model_in_l2() -> None:
    batch, ball, model = grey(16), ball_of("l2"), Affine(slope())
    # A step of eps at least halves the angle to the gradient: 60 of them leave 2^-60.
    found = run(pgd(60, step_size="eps"), model, ball, batch)
    best = ball.eps * slope() / slope().norm()
    assert_near(found.delta, best.expand_as(found.delta), 1e-14)


def test_pgd_reaches_the_exact_maximum_of_an_affine_model_in_l1() -> None:
    # One pixel of slope 3 among ones, so that the best vertex is unique and far ahead.
    sharp = torch.ones(1, 8, 8, dtype=torch.float64)
    sharp[0, 2, 5] = -3
    ball, batch, model = L1(eps=0.4, spread=0), grey(4), Affine(sharp)
    # Every step of eps/4 takes eps/4 from the rest of a start of norm <= eps, spread over 64
    # pixels: after 64 steps nothing of it is left.
    found = run(pgd(80), model, ball, batch)
    best = torch.zeros_like(sharp)
    best[0, 2, 5] = -0.4
    assert_near(found.delta, best.expand_as(found.delta), 1e-14)


@pytest.mark.parametrize(
    "ball", [Linf(eps=EPS["linf"]), L2(eps=EPS["l2"]), L1(eps=0.4, spread=0)], ids=lambda b: b.norm
)
def test_pgd_drives_fosc_to_zero_on_an_affine_model(ball: AbstractThreatModel) -> None:
    batch, model = grey(6), Affine(slope())
    start = pgd(0).start.delta(ball, batch, None)
    found = run(pgd(120, step_size="eps/2"), model, ball, batch)
    first, last = (
        ball.gap(delta, gradient(model, batch, delta)) for delta in (start, found.delta)
    )
    assert float(first.min()) > 1e-3
    assert float(last.abs().max()) <= 1e-14  # sums of 64 float64 products


@pytest.mark.parametrize("norm", NORMS)
def test_every_point_on_the_way_is_feasible(norm: str) -> None:
    ball, batch, model = ball_of(norm), batch_of(12), tiny_net()
    for steps in range(6):
        found = run(pgd(steps, step_size="1.5*eps"), model, ball, batch).delta
        # 1e-12: the rescaling of l2 and the threshold of l1; l-inf is exact.
        assert float(ball.norm_of(found).max()) <= ball.eps * (1 + (norm != "linf") * 1e-12)
        assert torch.equal(found, in_box(found, batch.images))


@pytest.mark.parametrize("norm", NORMS)
def test_attack_raises_the_loss_of_a_network(norm: str) -> None:
    ball, batch, model = ball_of(norm), batch_of(32), tiny_net()
    oracle = Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval")
    clean = oracle.losses(torch.zeros_like(batch.images))
    found = run(pgd(10), model, ball, batch)
    assert float((oracle.losses(found.delta) > clean).double().mean()) >= 0.9
    assert float(oracle.losses(found.delta).mean()) > 1.1 * float(clean.mean())


def test_zero_steps_return_the_start_and_cost_nothing() -> None:
    ball, batch, meter = ball_of("linf"), batch_of(4), Meter()
    start = Uniform().delta(ball, batch, None)
    found = run(pgd(0), tiny_net(), ball, batch, meter=meter)
    assert torch.equal(found.delta, start) and not found.steps.any() and meter == Meter()


def test_attack_does_not_write_into_its_start() -> None:
    ball, batch = ball_of("linf"), batch_of(4)
    start = Uniform().delta(ball, batch, None)
    before = start.clone()
    run(pgd(3), tiny_net(), ball, batch, start=start)
    assert torch.equal(start, before)


@pytest.mark.parametrize("norm", NORMS)
def test_attack_of_a_part_is_the_part_of_the_attack(norm: str) -> None:
    ball, batch, rows = ball_of(norm), batch_of(8), torch.tensor([6, 1, 3])
    model = tiny_net(batch_norm=True)
    start = Uniform().delta(ball, batch, None)
    whole = run(until(0.2), model, ball, batch, start=start)
    part = run(until(0.2), model, ball, batch[rows], start=start[rows])
    assert_near(part.delta, whole.delta[rows], 1e-12)  # sums in another order, ten steps deep
    assert torch.equal(part.steps, whole.steps[rows])


# --- stopping ---------------------------------------------------------------------------------

# eps |slope|_1 = 2 exactly, and all numbers below are sums of powers of two.
DYADIC = torch.tensor([[[3.0, -4.0], [0.5, 0.5]]], dtype=torch.float64)
QUARTER = Linf(eps=0.25)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    "threshold", [0.0, 0.001, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 9.0]
)
def test_steps_on_a_linear_loss_are_what_fosc_leaves_to_do(
    threshold: float, compact: bool
) -> None:
    # From zero, k steps of eps/4 leave FOSC = eps |slope|_1 (1 - k/4).
    images = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    batch = batch_of(3, size=2)
    batch = Batch(images, batch.labels, batch.index, batch.rng)
    attack = until(threshold, start=Zero(), compact=compact)
    found = run(attack, Affine(DYADIC), QUARTER, batch, objective=Score())
    steps = max(1, math.ceil(4 * (1 - threshold / 2)))
    assert found.steps.tolist() == [steps] * 3
    assert torch.equal(found.delta, (steps / 16 * DYADIC.sign()).expand_as(images))


def test_fosc_of_a_linear_loss_falls_linearly_with_the_steps() -> None:
    images = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    batch = Batch(images, torch.zeros(1, dtype=torch.int64), torch.arange(1), batch_of(1).rng)
    gaps = []
    for steps in range(6):
        attack = pgd(steps, start=Zero())
        found = run(attack, Affine(DYADIC), QUARTER, batch, objective=Score())
        gaps.append(float(QUARTER.gap(found.delta, DYADIC[None])))
    assert gaps == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("over", ["ball", "ball_box"])
def test_a_sample_stops_at_its_first_point_of_small_fosc_and_stays_there(
    norm: str, over: str
) -> None:
    ball, batch, model = ball_of(norm), batch_of(24), tiny_net()
    stop = Gap(c_max=0.12, decay=Constant(), over=over)  # pyright: ignore[reportArgumentType]
    found = run(pgd(10, stop=stop), model, ball, batch)
    # The path without stopping, and FOSC along it.
    path = [run(pgd(k), model, ball, batch).delta for k in range(11)]
    grads = [gradient(model, batch, delta) for delta in path]
    if over == "ball":
        gaps = [ball.gap(d, g) for d, g in zip(path, grads, strict=True)]
    else:
        gaps = [ball.box_gap(d, g, batch.images) for d, g in zip(path, grads, strict=True)]
    for i in range(24):
        small = [k for k in range(1, 10) if float(gaps[k][i]) <= 0.12]
        steps = small[0] if small else 10
        assert int(found.steps[i]) == steps
        # 1e-12: a smaller batch sums in another order.
        assert_near(found.delta[i], path[steps][i], 1e-12)
    assert len(found.steps.unique()) > 1  # the test did see several lengths


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("c_max", [0.05, 0.2, 0.5])
def test_compacting_changes_the_cost_and_nothing_else(norm: str, c_max: float) -> None:
    ball, batch, model = ball_of(norm), batch_of(24), tiny_net(batch_norm=True)
    costs = {True: Meter(), False: Meter()}
    found = {
        compact: run(until(c_max, compact=compact), model, ball, batch, meter=meter)
        for compact, meter in costs.items()
    }
    assert torch.equal(found[True].steps, found[False].steps)
    assert_near(found[True].delta, found[False].delta, 1e-12)  # sums in another order
    taken = found[True].steps
    gradients = int((taken + 1).clamp_max(10).sum())
    assert costs[True] == Meter(forwards=gradients, input_backwards=gradients)
    assert costs[False] == Meter(forwards=240, input_backwards=240)


@pytest.mark.parametrize("compact", [True, False])
def test_frozen_rows_are_bit_identical_after_further_iterations(compact: bool) -> None:
    ball, batch, model = ball_of("linf"), batch_of(24), tiny_net()
    short, long = (run(until(0.15, steps=k, compact=compact), model, ball, batch) for k in (4, 12))
    frozen = long.steps < 4
    assert 0 < int(frozen.sum()) < 24
    assert torch.equal(short.delta[frozen], long.delta[frozen])
    assert torch.equal(short.steps[frozen], long.steps[frozen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("compact", [True, False])
def test_a_negative_threshold_is_pgd_bit_for_bit(
    norm: str, dtype: torch.dtype, compact: bool
) -> None:
    ball, batch, model = ball_of(norm), batch_of(12, dtype=dtype), tiny_net(dtype)
    plain = run(pgd(10), model, ball, batch)
    for c_max in (-1.0, -math.inf):
        stop = Gap(c_max=c_max, decay=Power(end=0.8))
        found = run(pgd(10, stop=stop, compact=compact), model, ball, batch, progress=0.9)
        assert torch.equal(found.delta, plain.delta)
        assert torch.equal(found.steps, plain.steps) and found.steps.tolist() == [10] * 12


@pytest.mark.parametrize("c_max", [1e9, math.inf])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("start", [Zero(), Uniform()], ids=repr)
def test_every_sample_takes_the_first_step_and_a_large_threshold_only_that(
    c_max: float, compact: bool, start: Zero | Uniform
) -> None:
    ball, batch, model = ball_of("linf"), batch_of(12), tiny_net()
    meter = Meter()
    attack = until(c_max, compact=compact, start=start)
    found = run(attack, model, ball, batch, meter=meter)
    assert found.steps.tolist() == [1] * 12
    assert torch.equal(found.delta, run(pgd(1, start=start), model, ball, batch).delta)
    assert meter.input_backwards == (24 if compact else 120)


def test_the_threshold_follows_progress() -> None:
    ball, batch, model = ball_of("linf"), batch_of(24), tiny_net()
    attack = pgd(10, stop=Gap(c_max=0.4, decay=Power(end=0.8)))
    steps = [run(attack, model, ball, batch, progress=t).steps for t in (0.0, 0.4, 0.8, 1.0)]
    for early, late in zip(steps, steps[1:], strict=False):
        assert (early <= late).all()
    assert float(steps[0].double().mean()) < float(steps[2].double().mean())
    assert torch.equal(steps[2], steps[3])


@pytest.mark.parametrize("bn", ["train", "batch_nostat"])
def test_rows_may_leave_the_batch_only_if_statistics_are_running_ones(bn: str) -> None:
    stop = Gap(c_max=0.5)
    with pytest.raises(ValidationError, match="compact=true needs .*bn=eval"):
        pgd(10, stop=stop, bn=bn)
    assert pgd(10, stop=stop, bn=bn, compact=False).bn == bn
    assert pgd(10, bn=bn).compact  # without a stop nobody leaves


def test_the_batchnorm_mode_of_an_attack_has_no_default() -> None:
    with pytest.raises(ValidationError, match="bn"):
        ProjectedAscent.model_validate({"steps": 1, "step_size": "eps"})


@pytest.mark.parametrize("stop", ["never", {"kind": "gap", "c_max": "1/2"}], ids=repr)
def test_a_stop_may_be_named_or_written_out(stop: Any) -> None:
    attack = pgd(3, stop=stop, start="zero")
    kinds: tuple[AbstractStopping, AbstractInit] = (attack.stop, attack.start)
    assert kinds[0].kind == (stop if isinstance(stop, str) else "gap") and kinds[1] == Zero()


# --- starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_is_feasible_and_differs_between_samples_and_batches(norm: str) -> None:
    ball, batch = ball_of(norm), batch_of(8)
    start = Uniform().delta(ball, batch, None)
    assert float(ball.norm_of(start).max()) <= ball.eps * (1 + 1e-6)  # drawn in float32
    assert torch.equal(start, in_box(start, batch.images))
    assert not torch.equal(start[0], start[1])
    assert torch.equal(start, Uniform().delta(ball, batch, None))
    assert not torch.equal(start, Uniform().delta(ball, batch_of(8, seed=9), None))


@pytest.mark.parametrize(("k", "share"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (4.0, 0.5)])
def test_unconfined_step_from_wide_noise_stays_in_its_own_bound(k: float, share: float) -> None:
    ball, batch, model = ball_of("linf"), batch_of(32), tiny_net()
    attack = ProjectedAscent(
        start=Uniform(radius=k), steps=1, step_size=f"{share}*eps", bn="eval", confined=False
    )
    delta = run(attack, model, ball, batch).delta
    largest = float(delta.abs().max())
    # 1e-12: one rounding of a sum.
    assert largest <= (k + share) * ball.eps * (1 + 1e-12)
    assert torch.equal(delta, in_box(delta, batch.images))
    if k + share > 1:
        assert largest > 1.2 * ball.eps  # it does leave the ball
    else:
        assert largest <= ball.eps


def remembering(ball: AbstractThreatModel, steps: int) -> Nested:
    attack = ProjectedAscent(start=Remembered(), steps=steps, step_size="eps/4", bn="eval")
    return Nested(ball, attack, Plain())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_remembered_start_is_what_the_last_visit_ended_with_moved_with_crop_and_flip(
    norm: str, mirrored: bool
) -> None:
    ball, plain, pad = ball_of(norm), batch_of(6), 2
    store = SampleStore(6, (1, 8, 8), DistributedContext())
    state = state_of(tiny_net())
    state.parts["delta"] = store
    # First visit: crops, the same flip for all. Memory is empty, so the attack starts at zero.
    first_view = views_of(6, pad, seed=1, mirrored=mirrored)
    first = Batch(cut(plain.images, first_view), plain.labels, plain.index, plain.rng, first_view)
    assert not Remembered().delta(ball, first, store).any()
    ended = remembering(ball, 3).step(state, first).delta
    assert bool(ended.flatten(1).abs().amax(1).min() > 0)
    # Second visit: other crops, in another order of images, the other flip.
    rows = torch.tensor([5, 0, 3])
    view = views_of(3, pad, seed=2, mirrored=not mirrored)
    second = Batch(cut(plain.images[rows], view), plain.labels[rows], rows, plain.rng, view)
    whole = paste(ended.float().double(), first_view, torch.zeros_like(ended))[rows]
    wanted = ball.feasible(cut(whole, view), second.images)
    assert torch.equal(Remembered().delta(ball, second, store), wanted)
    assert wanted.abs().sum() > 0
    # Zero steps end where they start: cells outside the second crop keep the first visit's.
    remembering(ball, 0).step(state, second)
    again = paste(wanted, view, onto=whole)
    read = store.read(Batch(plain.images[rows], plain.labels[rows], rows, plain.rng))
    assert_near(read, again, 1e-7)  # kept in float32


def test_a_remembered_start_continues_the_ascent_of_the_visit_before() -> None:
    batch, ball, model = grey(4), ball_of("linf"), Affine(slope())
    state = state_of(model, lr=0.0)
    state.parts["delta"] = SampleStore(4, (1, 8, 8), DistributedContext())
    fosc = []
    for _ in range(5):
        delta = remembering(ball, 1).step(state, batch).delta
        fosc.append(float(per_sample_dot(delta, slope().expand_as(delta)).min()))
    total = ball.eps * float(slope().abs().sum())
    # One step of eps/4 per visit reaches the vertex at the fourth; kept in float32.
    assert fosc == pytest.approx([total * k for k in (0.25, 0.5, 0.75, 1, 1)], rel=1e-6)
