"""Every stopping rule keeps the promises of the conformance suite."""

from __future__ import annotations

import pytest

from raytrain.attacks import AbstractStopping, Gap, Never
from raytrain.core.schedules import Constant
from raytrain.testing import StoppingConformance

RULES: dict[str, AbstractStopping] = {
    "never": Never(),
    "gap": Gap(c_max=0.2),
    "gap-constant": Gap(c_max=0.2, decay=Constant(), over="ball_box"),
    "gap-start": Gap(c_max=0.1, anchor="start"),
    "gap-negative": Gap(c_max=-1),
}


class TestEveryStoppingRule(StoppingConformance):
    @pytest.fixture(params=RULES)
    def stopping(self, request: pytest.FixtureRequest) -> AbstractStopping:
        return RULES[request.param]
