"""Conformance tests of stopping rules."""

from __future__ import annotations

import pytest
import torch

from raytrain.attacks import AbstractStopping, AttackResult, ProjectedAscent
from raytrain.core.cost import Meter
from raytrain.core.losses import CrossEntropy
from raytrain.core.oracle import Oracle
from raytrain.core.types import Progress
from raytrain.testing.toys import ball_of, batch_of, tiny_net

STEPS = 8
SHARES = [0.0, 0.5, 1.0]
"""Shares of training at which a rule is tried."""


class StoppingConformance:
    """Subclass it in a test module and define the fixture `stopping`."""

    @pytest.mark.parametrize("share", SHARES)
    def test_leaving_the_batch_changes_the_cost_and_nothing_else(
        self, stopping: AbstractStopping, share: float
    ) -> None:
        (one, fewer), (other, all_steps) = (
            attacked(stopping, compact, share) for compact in (True, False)
        )
        # 1e-12: convolutions of another batch size sum in another order.
        assert float((one.delta - other.delta).abs().max()) <= 1e-12
        assert torch.equal(one.steps, other.steps)
        assert fewer.fe == 2 * int((one.steps + 1).clamp_max(STEPS).sum())
        assert all_steps.fe == 2 * STEPS * 16

    @pytest.mark.parametrize("share", SHARES)
    def test_stops_only_if_it_says_that_it_may(
        self, stopping: AbstractStopping, share: float
    ) -> None:
        found, _ = attacked(stopping, True, share)
        assert stopping.may_stop or bool((found.steps == STEPS).all())

    def test_refuses_batch_statistics_for_rows_that_leave(
        self, stopping: AbstractStopping
    ) -> None:
        if stopping.needs_independent_rows:
            with pytest.raises(ValueError, match="compact"):
                ProjectedAscent(steps=2, step_size="eps/4", stop=stopping, bn="train")

    def test_survives_a_trip_through_its_own_record(self, stopping: AbstractStopping) -> None:
        assert type(stopping).model_validate_json(stopping.model_dump_json()) == stopping


def attacked(
    stopping: AbstractStopping, compact: bool, share: float
) -> tuple[AttackResult, Meter]:
    """Return the result of an attack on sixteen images at a share of training, and its cost."""
    batch, ball, meter = batch_of(16), ball_of("linf"), Meter()
    attack = ProjectedAscent(
        steps=STEPS, step_size="eps/4", stop=stopping, bn="eval", compact=compact
    )
    oracle = Oracle(tiny_net(), CrossEntropy(), batch, meter, attack_bn="eval")
    start = attack.start.delta(ball, batch)
    return attack.maximise(oracle, ball, start, Progress(share, share)), meter
