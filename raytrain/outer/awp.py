"""Adversarial weight perturbation: the gradient is measured at adversarially perturbed weights."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from raytrain.core.card import Card, Options, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import AbstractLoss
from raytrain.core.network import shifted
from raytrain.core.oracle import Oracle
from raytrain.core.train_state import TrainState
from raytrain.core.types import Delta, PerSample
from raytrain.outer.displaced import DisplacedOuter


@final
class Awp(DisplacedOuter):
    """v_l = gamma |w_l| d_l / |d_l|, d = grad_w mean_i f_i(w, delta_i);
    w <- w + [optimizer(w + v) - (w + v)].

    Wu, Xia and Wang 2020 (AWP, arXiv 2004.05884), algorithm 1. Only tensors of more than one
    dimension move: no biases, no BatchNorm. As in the public code, the ascent pass uses batch
    statistics and does not update the running ones, the whole update (momentum and weight decay too)
    is taken at w + v, nothing moves in the first `warmup` epochs, and 1e-20 beside |d_l| makes v_l
    zero where d_l is. Errors avoided: d is averaged over the workers before it is used, or the
    replicas would differ; the step is added to a saved copy of w, because subtracting v again
    rounds. The public proxy's own learning rate drops out of the formula and is not a parameter.
    `then` is the update made at w + v: sgd, clip or engm. With several ascent `steps`, each starts
    from where the one before ended, as long as gamma.

    Deviations from the public code: of the tensors of more than one dimension it moves those whose
    name contains "weight"; here the name does not matter, because networks may use any
    names. In raytrain's own networks these are the same tensors. In another one, a positional
    embedding or a class token moves here and not there, and gamma then perturbs more of the network.
    Its TRADES script numbers epochs from 1: its warm-up of 10 is warmup=9 here.
    """

    card: ClassVar[Card] = Card(
        paper="Adversarial weight perturbation helps robust generalization, Wu et al. 2020, "
        "arXiv 2004.05884",
        rule="v_l = gamma |w_l| d_l / |d_l|, d the mean gradient;  step at w + v;  then subtract v",
        cost="one training pass more per ascent step: 3 FE, with trades and mart 6",
        memory="none per image; two copies of the weights",
        ranges={
            "gamma": Range(0.001, 0.02, log=True),
            "warmup": Options((0, 5, 10)),
            "steps": Options((1, 2)),
        },
    )

    name: Literal["awp"] = "awp"
    gamma: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="size of v relative to each weight tensor"),
    ] = 0.005
    warmup: Annotated[NonNegativeInt, Field(description="epochs before it begins")] = 0
    steps: Annotated[PositiveInt, Field(description="ascent steps on the weights")] = 1

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        return state.epoch < self.warmup, super().replay_key(state, updates)

    def update(
        self,
        state: TrainState,
        oracle: Oracle,
        delta: Delta,
        given: PerSample | None = None,
        rate: float = 1.0,
    ) -> PerSample:
        if self.gamma == 0 or state.epoch < self.warmup:
            return self.then.update(state, oracle, delta, given, rate)
        offsets = self.offsets(state, oracle, delta)
        moving = [(p, offsets[n]) for n, p in state.model.named_parameters() if n in offsets]
        before = [p.detach().clone() for p, _ in moving]
        with torch.no_grad():
            for p, offset in moving:
                p.add_(offset)
        away = [p.detach().clone() for p, _ in moving]
        try:
            return self.then.update(state, oracle, delta, given, rate)
        finally:  # the weights are restored after an error too
            with torch.no_grad():
                for (p, _), here, there in zip(moving, before, away, strict=True):
                    p.copy_(here + (p - there))

    def update_fe(self, loss: AbstractLoss, setting: CostSetting, *, has_gradient: bool) -> float:
        moves = self.gamma > 0 and setting.epoch >= self.warmup
        ascent = self.steps * loss.update_fe if moves else 0.0
        return ascent + self.then.update_fe(loss, setting, has_gradient=has_gradient)

    def offsets(self, state: TrainState, oracle: Oracle, delta: Delta) -> dict[str, Tensor]:
        """v, by the names of the tensors that move: a collective."""
        named_weights = [(n, p) for n, p in state.model.named_parameters() if p.requires_grad]
        found: dict[str, Tensor] = {}
        for _ in range(self.steps):
            with shifted(state.model, found):
                grads = state.context.average(oracle.mean_grads(delta))
            found = {
                name: found.get(name, torch.zeros_like(p)) + self._scaled(p.detach(), grad)
                for (name, p), grad in zip(named_weights, grads, strict=True)
                if p.dim() > 1
            }
        return found

    def _scaled(self, weight: Tensor, grad: Tensor) -> Tensor:
        return self.gamma * weight.norm() * grad / (grad.norm() + 1e-20)
