"""Pixel quantities as users write them, and randomness that knows no workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CPU, batch_of, views_of
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from raytrain.core.types import BatchRandom, Number, StepSize, fraction, in_pixels, mix

NUMBER: TypeAdapter[float] = TypeAdapter(Number)
STEP: TypeAdapter[float | str] = TypeAdapter(StepSize)

# --- quantities -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("-1/4", -0.25),
        ("1.5/3", 0.5),
        ("1e-1/2", 0.05),
        (0.031, 0.031),
        (1, 1.0),
        ("0.5", 0.5),
    ],
)
def test_a_number_may_be_written_as_a_fraction(written: Any, value: float) -> None:
    assert NUMBER.validate_python(written) == value


@pytest.mark.parametrize("written", ["8/0", "8/255/2", "/255", "8/", "eight", "", "eps/4", None])
def test_what_is_not_a_number_is_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        NUMBER.validate_python(written)


def test_fraction_leaves_what_it_does_not_know_to_the_type_of_the_field() -> None:
    for value in ("1-2/3", "8/0", "eps/4", 3, None, [1]):
        assert fraction(value) == value


@pytest.mark.parametrize(
    ("written", "pixels"),
    [
        ("8/255", 8 / 255),
        (0.01, 0.01),
        (1, 1.0),
        ("eps", 0.1),
        ("eps/4", 0.1 / 4),
        ("1.25*eps", 0.125),
        ("1.25 * eps", 0.125),
        (" 3*eps/4 ", 0.1 * 3 / 4),
        ("1e-1*eps", 0.01),
    ],
)
def test_a_step_size_is_pixels_or_a_multiple_of_the_radius(written: Any, pixels: float) -> None:
    # One ulp: the order of a product and a quotient.
    assert in_pixels(STEP.validate_python(written), 0.1) == pytest.approx(pixels, rel=1e-15)


@pytest.mark.parametrize("written", ["0.01", "1e-3", "2"])
def test_a_step_size_may_be_a_number_in_a_string(written: str) -> None:
    # YAML reads 1e-3 as a string, and every other number of a run file accepts it.
    assert in_pixels(STEP.validate_python(written), 0.1) == float(written)


@pytest.mark.parametrize(
    "written",
    [
        0,
        -0.1,
        float("nan"),
        float("inf"),
        "0",
        "0/255",
        "-2/255",
        "2/0",
        "0*eps",
        "-1*eps",
        "eps/0",
        "eps/-4",
        "1e999*eps",
        "1-2*eps",
        "eps*2",
        "epsilon/4",
        "2/255/3",
        "fast",
        "",
        None,
    ],
    ids=repr,
)
def test_what_is_not_a_positive_step_size_is_refused(written: Any) -> None:
    with pytest.raises(ValidationError):
        STEP.validate_python(written)


def test_a_bad_step_size_is_refused_with_an_example() -> None:
    with pytest.raises(ValidationError, match=r"such as 2/255, or a multiple .* such as eps/4"):
        STEP.validate_python("fast")


def test_steps_vanish_with_the_radius_they_refer_to() -> None:
    assert in_pixels("eps/4", 0.0) == 0.0
    assert in_pixels(2 / 255, 0.0) == 2 / 255


# --- randomness -------------------------------------------------------------------------------


def draws(rng: BatchRandom) -> dict[str, Tensor]:
    return {
        "uniform": rng.uniform("a", 2, 3),
        "normal": rng.normal("b", 4),
        "integers": rng.integers("c", 9),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_slots_of_all_workers_interleaved_are_the_draws_of_one_worker(world: int) -> None:
    whole = draws(BatchRandom(5, 12, slice(None), CPU))
    shares = [draws(BatchRandom(5, 12, slice(rank, None, world), CPU)) for rank in range(world)]
    for name, drawn in whole.items():
        woven = torch.stack([share[name] for share in shares], 1).flatten(0, 1)
        assert torch.equal(woven, drawn)


def test_slots_may_be_picked_by_number() -> None:
    whole, some = draws(BatchRandom(5, 12, slice(None), CPU)), torch.tensor([7, 0, 3])
    for name, drawn in draws(BatchRandom(5, 12, some, CPU)).items():
        assert torch.equal(drawn, whole[name][some])


def test_draws_repeat_whatever_was_drawn_before_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    rng = BatchRandom(5, 12, slice(None), CPU)
    first = rng.uniform("start", 3)
    rng.normal("noise", 100)
    assert torch.equal(rng.uniform("start", 3), first)
    assert torch.equal(BatchRandom(5, 12, slice(None), CPU).uniform("start", 3), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_purposes_and_seeds_are_independent_streams() -> None:
    streams = [
        BatchRandom(seed, 4000, slice(None), CPU).uniform(purpose)
        for seed in (0, 1)
        for purpose in ("start", "start/length", "flip")
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    # Four standard errors of a correlation of 4000 pairs; the seeds are fixed.
    assert float(correlation.abs().max()) < 4 / 4000**0.5


def test_draws_have_the_range_they_claim() -> None:
    rng = BatchRandom(0, 4000, slice(None), CPU)
    uniform, normal, integers = rng.uniform("a"), rng.normal("b"), rng.integers("c", 3)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    # Four standard errors of the mean of 4000 numbers.
    assert abs(float(normal.mean())) < 4 / 4000**0.5
    assert torch.equal(integers.unique(), torch.arange(3))


def test_mix_is_a_constant_of_its_parts() -> None:
    # Checkpoints and records rely on these numbers: change them only on purpose.
    assert mix(0) == 2631537505891389924
    assert mix(7, "weights") == 2370708682607018381
    assert mix("batch", 0, 12) == 2132648014467560751


def test_mix_is_a_seed_that_tells_its_parts_apart() -> None:
    seeds = [mix(1, 23), mix(12, 3), mix("1", 23), mix("1", "23"), mix(1, 23, 0), mix(23, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- batches ----------------------------------------------------------------------------------


def test_a_batch_narrowed_to_rows_keeps_each_rows_image_label_index_and_view() -> None:
    whole, rows = batch_of(6), torch.tensor([4, 1])
    viewed = type(whole)(
        whole.images, whole.labels, whole.index * 10, whole.rng, views_of(6, pad=2)
    )
    part = viewed[rows]
    assert len(part) == 2 and part.view is not None and viewed.view is not None
    assert torch.equal(part.images, viewed.images[rows])
    assert torch.equal(part.labels, viewed.labels[rows])
    assert torch.equal(part.index, torch.tensor([40, 10]))
    assert torch.equal(part.view.top, viewed.view.top[rows])
    assert torch.equal(part.view.left, viewed.view.left[rows])
    assert torch.equal(part.view.mirrored, viewed.view.mirrored[rows])
    assert part.view.pad == 2
