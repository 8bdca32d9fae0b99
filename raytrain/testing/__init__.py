"""Conformance tests for user-defined parts, and the toy networks and batches they run on.

Subclass one of the classes in a test module and define its fixture:

    class TestMyAlgorithm(AlgorithmConformance):
        @pytest.fixture
        def recipe(self):
            return MyRecipe()

Needs pytest.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"raytrain.testing.{part}" for part in ("algorithms", "losses", "outers", "stoppings"))
)

from raytrain.testing.algorithms import AlgorithmConformance  # noqa: E402
from raytrain.testing.losses import LossConformance  # noqa: E402
from raytrain.testing.outers import OuterConformance  # noqa: E402
from raytrain.testing.stoppings import StoppingConformance  # noqa: E402

__all__ = ["AlgorithmConformance", "LossConformance", "OuterConformance", "StoppingConformance"]
