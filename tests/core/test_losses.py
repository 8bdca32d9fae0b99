"""Every loss keeps the promises of the conformance suite."""

from __future__ import annotations

import pytest

from raytrain.core.losses import AbstractLoss, CrossEntropy, Margin, Mart, Trades
from raytrain.testing import LossConformance

LOSSES: dict[str, AbstractLoss] = {
    "cross_entropy": CrossEntropy(),
    "smoothed": CrossEntropy(label_smoothing=0.1),
    "trades": Trades(),
    "mart": Mart(),
    "margin": Margin(),
}


class TestEveryLoss(LossConformance):
    @pytest.fixture(params=LOSSES)
    def loss(self, request: pytest.FixtureRequest) -> AbstractLoss:
        return LOSSES[request.param]
