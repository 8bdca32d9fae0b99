"""SAM: sharpness-aware minimisation, with the gradient at perturbed weights applied at the present ones."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from raytrain.core.card import Card, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import AbstractLoss
from raytrain.core.network import shifted
from raytrain.core.oracle import Oracle
from raytrain.core.train_state import TrainState
from raytrain.core.types import Delta, PerSample
from raytrain.outer.displaced import DisplacedOuter


@final
class Sam(DisplacedOuter):
    """e = rho d / |d|, d = grad_w mean_i f_i(w, delta_i);
    w <- optimizer(w, grad_w mean_i f_i(w + e, delta_i)).

    Foret et al. 2021 (Sharpness-aware minimization for efficiently improving generalization, arXiv
    2010.01412), algorithm 1, at the perturbations of an attack that ran at w. |d| is the norm over all
    trained weights together. Momentum and weight decay act at w, unlike those of awp, which moves every
    tensor in proportion to its own norm. With rho = 0 it is the update `then`, which may also be clip
    or engm: their norms and weights are then those at w + e.

    Deviations: d is the gradient of the whole batch over all workers; the paper takes each
    accelerator's own. The ascent pass uses batch statistics and does not update the running ones.
    1e-12 beside |d| makes e zero if d is zero.
    """

    card: ClassVar[Card] = Card(
        paper="Sharpness-aware minimization for efficiently improving generalization, Foret et al. "
        "2021, arXiv 2010.01412",
        rule="w <- optimizer(w, grad at w + rho d / |d|), d the mean gradient at w",
        cost="one training pass more: 3 FE, with trades and mart 6",
        memory="none per image; a copy of the weights",
        ranges={"rho": Range(0.01, 0.5, log=True)},
    )

    name: Literal["sam"] = "sam"
    rho: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="l2 length of the step to w + e")
    ] = 0.05

    def update(
        self,
        state: TrainState,
        oracle: Oracle,
        delta: Delta,
        given: PerSample | None = None,
        rate: float = 1.0,
    ) -> PerSample:
        if self.rho == 0:
            return self.then.update(state, oracle, delta, given, rate)
        with shifted(state.model, self.offsets(state, oracle, delta)):
            state.optimizer.zero_grad(set_to_none=True)
            weights = self.then.weights(state, oracle, delta, given)
            losses = oracle.theta_grad(delta, weights)
        self.then.step(state, rate)
        return losses

    def update_fe(self, loss: AbstractLoss, setting: CostSetting, *, has_gradient: bool) -> float:
        ascent = loss.update_fe if self.rho > 0 else 0.0
        return ascent + self.then.update_fe(loss, setting, has_gradient=has_gradient)

    def offsets(self, state: TrainState, oracle: Oracle, delta: Delta) -> dict[str, Tensor]:
        """e, by the names of the trained weights: a collective."""
        names = [name for name, p in state.model.named_parameters() if p.requires_grad]
        grads = state.context.average(oracle.mean_grads(delta))
        length = torch.stack([grad.norm() for grad in grads]).norm() + 1e-12
        return {name: self.rho / length * grad for name, grad in zip(names, grads, strict=True)}
