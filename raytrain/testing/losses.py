"""Conformance tests of losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raytrain.core.cost import Meter
from raytrain.core.losses import AbstractLoss
from raytrain.core.oracle import Oracle
from raytrain.core.types import MixedLabels
from raytrain.testing.toys import batch_of, moved, tiny_net


class LossConformance:
    """Subclass it in a test module and define the fixture `loss`."""

    @pytest.mark.parametrize("side", ["inner", "outer"])
    def test_is_one_finite_number_per_sample_whatever_its_neighbours(
        self, loss: AbstractLoss, side: str
    ) -> None:
        model, batch = tiny_net().eval(), batch_of(8)
        delta, reference = moved(batch), loss.reference(model, batch)
        whole = getattr(loss, side)(model, batch, delta, reference)
        assert whole.shape == (8,) and whole.isfinite().all()
        rows = torch.tensor([5, 2, 7])
        narrowed = tuple(part[rows] for part in reference)
        part = getattr(loss, side)(model, batch[rows], delta[rows], narrowed)
        # 1e-12: sums in another order.
        assert float((part - whole[rows]).detach().abs().max()) <= 1e-12

    def test_passes_the_network_as_often_as_it_announces(self, loss: AbstractLoss) -> None:
        model, batch, inputs = tiny_net(), batch_of(4), []

        def predict(images: Tensor) -> Tensor:
            inputs.append(images)
            return model(images)

        reference = loss.reference(predict, batch)
        assert len(inputs) == loss.reference_forwards
        delta = moved(batch)
        loss.inner(predict, batch, delta, reference)
        assert len(inputs) == loss.reference_forwards + loss.inner_forwards
        assert torch.equal(inputs[-1], batch.images + delta)  # where attacks read the logits
        loss.outer(predict, batch, delta, reference)
        assert len(inputs) == loss.reference_forwards + loss.inner_forwards + loss.outer_forwards

    def test_an_update_costs_what_it_announces(self, loss: AbstractLoss) -> None:
        batch, meter = batch_of(4), Meter()
        oracle = Oracle(tiny_net(), loss, batch, meter, attack_bn="eval")
        oracle.theta_grad(moved(batch))
        assert meter.fe == 4 * loss.update_fe

    def test_two_equal_labels_are_one(self, loss: AbstractLoss) -> None:
        batch = batch_of(8)
        share = torch.linspace(0, 1, 8, dtype=torch.float64)
        mixed = replace(batch, mixed=MixedLabels(batch.labels, share))
        if loss.why_not_mixed() is not None:
            return  # a run with CutMix is refused
        model, delta = tiny_net().eval(), moved(batch)
        for side in ("inner", "outer"):
            one, other = (
                getattr(loss, side)(model, labelled, delta, loss.reference(model, labelled))
                for labelled in (batch, mixed)
            )
            # 1e-12: of rounding.
            assert float((one - other).detach().abs().max()) <= 1e-12

    def test_survives_a_trip_through_its_own_record(self, loss: AbstractLoss) -> None:
        assert type(loss).model_validate_json(loss.model_dump_json()) == loss
