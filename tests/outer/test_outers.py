"""Every outer update keeps the promises of the conformance suite."""

from __future__ import annotations

import pytest

from raytrain.outer import AbstractOuter, Awp, Clip, Engm, Plain
from raytrain.testing import OuterConformance

UPDATES: dict[str, AbstractOuter] = {
    "sgd": Plain(),
    "clip": Clip(),
    "awp": Awp(),
    "awp-engm": Awp(steps=2, then=Engm(tau=4, chunk=1)),
    "engm-exact": Engm(estimator="exact", chunk=1),
    "engm-affine": Engm(tau=3, probes=4, chunk=1),
    "engm-input": Engm(estimator="input", gradient="reuse"),
    "engm-loss": Engm(estimator="loss", tau=6, chunk=1),
    "engm-train": Engm(tau=4, probes=3, probe_bn="train"),
}


class TestEveryOuterUpdate(OuterConformance):
    @pytest.fixture(params=UPDATES)
    def outer(self, request: pytest.FixtureRequest) -> AbstractOuter:
        return UPDATES[request.param]
