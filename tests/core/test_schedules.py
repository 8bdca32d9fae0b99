"""Shapes over training: closed forms, drops, and what is refused."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from raytrain.attacks import Gap
from raytrain.core.registry import OneOf
from raytrain.core.schedules import (
    SHAPES,
    AbstractShape,
    Constant,
    Cosine,
    OneCycle,
    Piecewise,
    Power,
)

ANY_SHAPE: TypeAdapter[AbstractShape] = TypeAdapter(Annotated[AbstractShape, OneOf(SHAPES)])


@pytest.mark.parametrize(
    ("epoch", "threshold"), [(0, 0.5), (50, 0.25), (99, 0.005), (100, 0.0), (119, 0.0)]
)
def test_threshold_of_dynamic_training_falls_linearly_to_zero_at_its_last_epoch(
    epoch: int, threshold: float
) -> None:
    stop = Gap(c_max=0.5, decay=Power(end=100 / 120))
    # 1e-15: the rounding of 1 - t/T'; a threshold of zero is exact, or FOSC = 0 would not stop.
    assert stop.threshold(epoch / 120) == pytest.approx(threshold, abs=1e-15 if threshold else 0)


def test_a_negative_threshold_is_never_raised_by_its_decay() -> None:
    for c_max in (-1.0, -math.inf):
        assert [Gap(c_max=c_max).threshold(t) for t in (0.0, 0.5, 1.0)] == [c_max] * 3


def test_a_threshold_is_always_a_number() -> None:
    # inf * 0 is not one, and no FOSC compares with it: the attack would never stop again.
    for decay in (Power(end=0.8), Cosine(), Constant()):
        stop = Gap(c_max=math.inf, decay=decay)
        assert not any(math.isnan(stop.threshold(t)) for t in (0.0, 0.5, 0.8, 1.0))
    with pytest.raises(ValidationError):
        Gap(c_max=math.nan)


@pytest.mark.parametrize(
    ("shape", "start", "middle", "end"),
    [
        (Constant(), 1.0, 1.0, 1.0),
        (Power(), 1.0, 0.5, 0.0),
        (Power(exponent=2), 1.0, 0.25, 0.0),
        (Power(exponent=0.5), 1.0, math.sqrt(0.5), 0.0),
        (Power(end=0.8), 1.0, 0.375, 0.0),
        (Cosine(), 1.0, 0.5, 0.0),
        (Cosine(end=0.75), 1.0, 0.25, 0.0),
        (Piecewise(), 1.0, 0.1, 0.01),
        (Piecewise(milestones=(), factor=0.5), 1.0, 1.0, 1.0),
        (OneCycle(), 0.0, 5 / 6, 0.0),
        (OneCycle(peak=0.5), 0.0, 1.0, 0.0),
        (OneCycle(peak=0.8), 0.0, 0.625, 0.0),
    ],
    ids=repr,
)
def test_shape_is_its_closed_form_at_start_middle_and_end(
    shape: AbstractShape, start: float, middle: float, end: float
) -> None:
    # 1e-15: a few ulp of the cosine and of the divisions.
    found = [shape.at(t) for t in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([start, middle, end], abs=1e-15)


@pytest.mark.parametrize(
    "shape", [Power(end=0.3), Power(exponent=3), Cosine(end=0.6), Piecewise(), OneCycle()]
)
def test_factor_stays_between_zero_and_one(shape: AbstractShape) -> None:
    assert all(0 <= shape.at(t / 200) <= 1 for t in range(201))


@pytest.mark.parametrize("shape", [Constant(), Power(end=0.3), Cosine(end=0.6), Piecewise()])
def test_a_decay_never_rises(shape: AbstractShape) -> None:
    factors = [shape.at(t / 200) for t in range(201)]
    assert factors == sorted(factors, reverse=True)


def test_piecewise_drops_at_its_milestones_and_nowhere_else() -> None:
    shape = Piecewise(milestones=(0.5, 0.75), factor=0.1)
    before, after = math.nextafter(0.5, 0), math.nextafter(0.75, 0)
    assert [shape.at(t) for t in (0.0, before, 0.5, after, 0.75, 1.0)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-15
    )


@pytest.mark.parametrize("peak", [0.1, 0.4, 0.5, 0.9])
def test_onecycle_rises_linearly_to_one_at_its_peak_and_falls_linearly(peak: float) -> None:
    shape = OneCycle(peak=peak)
    assert shape.at(peak) == pytest.approx(1, abs=1e-15)
    for share in (0.25, 0.5, 0.75):
        assert shape.at(share * peak) == pytest.approx(share, abs=1e-15)
        assert shape.at(1 - share * (1 - peak)) == pytest.approx(share, abs=1e-14)


def test_a_bare_name_and_a_fraction_are_accepted() -> None:
    assert ANY_SHAPE.validate_python("cosine") == Cosine()
    assert ANY_SHAPE.validate_python({"kind": "power", "end": "4/5"}) == Power(end=0.8)
    assert (
        ANY_SHAPE.validate_python({"kind": "piecewise", "milestones": ["1/2", 0.75]})
        == Piecewise()
    )


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("triangle", "constant"),
        ({"kind": "power", "end": 0}, "greater than 0"),
        ({"kind": "power", "end": 1.5}, "less than or equal to 1"),
        ({"kind": "power", "exponent": 0}, "greater than 0"),
        ({"kind": "cosine", "end": -0.5}, "greater than 0"),
        ({"kind": "piecewise", "milestones": [0.75, 0.5]}, "milestones must increase"),
        ({"kind": "piecewise", "milestones": [0.5, 0.5]}, "milestones must increase"),
        ({"kind": "piecewise", "milestones": [100]}, "less than or equal to 1"),
        ({"kind": "piecewise", "factor": 1}, "less than 1"),
        ({"kind": "piecewise", "factor": 0}, "greater than 0"),
        ({"kind": "onecycle", "peak": 0}, "greater than 0"),
        ({"kind": "onecycle", "peak": 1}, "less than 1"),
        ({"kind": "constant", "end": 0.5}, "Extra inputs"),
    ],
    ids=repr,
)
def test_an_impossible_shape_is_refused(wrong: Any, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ANY_SHAPE.validate_python(wrong)
