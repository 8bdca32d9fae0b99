"""Training by epochs and by cost; numbers that change over training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.core.schedules import Ramp
from raytrain.core.types import in_pixels
from raytrain.training import progress
from raytrain.training.progress import RateLimit, StepMetrics
from raytrain.training.trainer import fit

IMAGES = 128


def run_of(**changes: Any) -> RunConfig:
    """128 digits in steps of 32, a constant rate."""
    values = {
        "data": {"name": "digits", "train_size": IMAGES, "validation": 60},
        "model": "small_cnn_nobn",
        "algorithm": {"name": "pgd", "steps": 2},
        "batch_size": 32,
        "epochs": 2,
        "evaluation": {"steps": 1},
        "optimizer": {"lr": 0.05, "schedule": "constant"},
        "device": "cpu",
    }
    return as_run({**values, **changes})


def trained(run: RunConfig) -> tuple[list[EpochMetrics], Tensor]:
    rows = list(fit(run, DistributedContext()))
    state = rows[-1][1]
    return [row for row, _ in rows], torch.cat([p.flatten() for p in state.model.parameters()])


# --- within an epoch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait", "due"), [(False, [0, 10, 21]), (True, [10, 21])], ids=["at once", "later"]
)
def test_a_rate_limit_is_due_once_in_its_seconds(
    wait: bool, due: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    limit, found = RateLimit(10, wait=wait), list[int]()
    for now[0] in (0, 1, 9, 10, 19, 21, 30):
        if limit():
            found.append(now[0])
    assert found == due


def test_metrics_within_an_epoch_are_due_once_a_minute_and_need_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    metrics = StepMetrics()
    given = [(0, 1.0), (59, 1.0), (61, None), (62, 1.5), (100, 1.0), (123, 2.0)]
    found = []
    for now[0], loss in given:
        found.append(metrics(now[0] / 1000, loss))
    assert found == [
        *[None] * 3,
        {"step/loss": 1.5, "step/share": 0.062},
        None,
        {"step/loss": 2.0, "step/share": 0.123},
    ]


# --- by epochs, by cost ------------------------------------------------------------------------


def test_the_cost_of_so_many_epochs_is_so_many_epochs() -> None:
    # PGD-2 costs 7 per image; two epochs, and the weights of both ways are the same to the last bit.
    by_epochs, wanted = trained(run_of())
    by_cost, found = trained(run_of(fe_per_image=14, epochs=99))
    assert torch.equal(found, wanted)
    assert [row.progress for row in by_cost] == [row.progress for row in by_epochs] == [0.5, 1.0]
    assert [row.final for row in by_cost] == [False, True]


@pytest.mark.parametrize(
    "algorithm",
    ["natural", "pgd", "free", "dynamic", "trades", "si_hg"],
)
@pytest.mark.slow
def test_every_algorithm_spends_the_same_to_half_a_step(algorithm: str) -> None:
    budget = 41.0
    (rows, _) = trained(run_of(algorithm=algorithm, fe_per_image=budget))
    step = rows[-1].fe / (rows[-1].samples / 32)
    assert abs(rows[-1].fe - budget * IMAGES) <= step / 2 + 1e-9
    assert [row.final for row in rows] == [False] * (len(rows) - 1) + [True]


def test_a_budget_may_end_within_an_epoch() -> None:
    rows, _ = trained(run_of(fe_per_image=7 * 1.5))
    assert [row.samples for row in rows] == [128, 192]
    assert rows[-1].epoch == 2 and rows[-1].robust is not None


def test_schedules_run_over_the_cost() -> None:
    # Half of the budget is spent when the first of two epochs is over: the rate has fallen to a half.
    run = run_of(fe_per_image=14, optimizer={"lr": 0.1, "schedule": {"kind": "power"}})
    (rows, _) = trained(run)
    middles = [(4 * epoch + 3.5) / 8 for epoch in (0, 1)]  # of the last step of each epoch
    assert [row.lr for row in rows] == pytest.approx([0.1 * (1 - m) for m in middles])


# --- curriculum --------------------------------------------------------------------------------


def test_a_ramp_that_stands_still_is_no_ramp() -> None:
    _, wanted = trained(run_of())
    still = {
        "eps": {"start": 0.1, "end": 0.1},
        "steps": {"start": 2},
        "step_size": {"start": "eps/4"},
    }
    assert torch.equal(trained(run_of(curriculum=still))[1], wanted)


def test_pgd_before_its_radius_grows_is_natural_training() -> None:
    # The radius is zero all the time but for its last moment, which no step reaches.
    none = {"eps": {"start": 0, "end": 0, "until": 1}}
    _, wanted = trained(run_of(algorithm="natural"))
    assert torch.equal(trained(run_of(curriculum=none))[1], wanted)


def test_inner_steps_follow_their_ramp() -> None:
    run = run_of(
        epochs=4, algorithm={"name": "pgd", "steps": 9}, curriculum={"steps": {"start": 1}}
    )
    rows, _ = trained(run)
    shares = [(4 * epoch + step) / 16 for epoch in range(4) for step in range(4)]
    steps = [round(1 + 8 * share) for share in shares]
    assert [row.inner_steps for row in rows] == [sum(steps[i : i + 4]) / 4 for i in (0, 4, 8, 12)]
    assert rows[-1].fe == sum(32 * (2 * k + 3) for k in steps)


@given(
    low=st.floats(0.01, 10),
    high=st.floats(0.01, 10),
    after=st.floats(0, 0.4),
    until=st.floats(0.5, 1),
    share=st.floats(0, 1),
)
def test_ramps_are_what_they_say(
    low: float, high: float, after: float, until: float, share: float
) -> None:
    def ramp(shape: str) -> Ramp:
        return Ramp.model_validate(
            {"start": low, "end": high, "after": after, "until": until, "shape": shape}
        )

    for shape in ("linear", "cosine", "geometric"):
        assert ramp(shape).at(after, 1.0, 1.0) == pytest.approx(low)
        assert ramp(shape).at(until, 1.0, 1.0) == pytest.approx(high)
    at = after + share * (until - after)
    linear, cosine, geometric = (
        float(ramp(shape).at(at, 1.0, 1.0)) for shape in ("linear", "cosine", "geometric")
    )
    assert linear == pytest.approx(low + share * (high - low), rel=1e-6)
    assert math.log(geometric) == pytest.approx(
        math.log(low) + share * (math.log(high) - math.log(low)), abs=1e-6
    )
    slow = (1 - math.cos(math.pi * share)) / 2
    assert cosine == pytest.approx(low + slow * (high - low), rel=1e-6, abs=1e-9)


def test_multiples_of_the_radius_stay_multiples() -> None:
    ramp = Ramp(start="eps/2", end="eps/8")
    assert in_pixels(ramp.at(0.5, "eps/4", 0.1), 0.4) == pytest.approx(0.4 * (1 / 2 + 1 / 8) / 2)
    mixed = Ramp(start="eps/2")
    assert mixed.at(0.5, 0.01, 0.1) == pytest.approx((0.05 + 0.01) / 2)


@pytest.mark.parametrize(
    ("curriculum", "said"),
    [
        (
            {"beta": {"start": 1}},
            "curriculum.beta: algorithm pgd has no such number to change; expected eps or steps",
        ),
        ({"epz": {"start": 1}}, "curriculum.epz: algorithm pgd has no such number"),
        ({"steps": {"start": -1}}, "curriculum.steps: Input should be greater than or equal to 0"),
        ({"steps": {"end": 2}}, "curriculum.steps.start: missing"),
        ({"eps": {"start": 0, "after": 0.5, "until": 0.2}}, "expected after < until"),
        ({"eps": {"start": 0, "shape": "geometric"}}, "both ends above 0"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(curriculum: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        run_of(curriculum=curriculum)
    assert said in str(error.value)


def test_validation_is_under_the_full_radius_or_its_own() -> None:
    never = {"curriculum": {"eps": {"start": 0, "end": 0}}, "epochs": 8, "model": "small_cnn"}
    full, _ = trained(run_of(**never))
    none, _ = trained(run_of(**never, evaluation={"eps": 0, "steps": 1}))
    clean, robust = full[-1].clean, full[-1].robust
    assert clean == none[-1].clean == none[-1].robust
    assert clean is not None and robust is not None and robust < clean
    assert run_of(evaluation={"eps": 0.05, "steps": 3}).evaluation.name == "pgd3-eps0.05"
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"evaluation": {"eps": -1}})
