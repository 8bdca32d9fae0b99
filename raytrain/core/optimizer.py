"""Stochastic gradient descent and the shape of its learning rate."""

from __future__ import annotations

from inspect import unwrap
from typing import Annotated, Literal, final

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from raytrain.core.registry import OneOf
from raytrain.core.schedules import SHAPES, AbstractShape, OneCycle
from raytrain.core.types import Spec


class EagerSGD(torch.optim.SGD):
    """torch.optim.SGD without the wrappers that keep torch.compile out of its methods.

    They import the compiler, which takes longer than a short training; no optimiser is compiled here.
    """

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    state_dict = unwrap(torch.optim.SGD.state_dict)
    load_state_dict = unwrap(torch.optim.SGD.load_state_dict)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


@final
class Sgd(Spec):
    """v <- momentum v + g + weight_decay theta;  theta <- theta - lr * schedule(t) * v."""

    name: Annotated[Literal["sgd"], Field(description="the only optimiser")] = "sgd"
    lr: Annotated[PositiveFloat, Field(allow_inf_nan=False, description="peak learning rate")] = (
        0.1
    )
    momentum: Annotated[
        float, Field(ge=0, lt=1, description="share of the velocity that a step keeps")
    ] = 0.9
    weight_decay: Annotated[
        NonNegativeFloat,
        Field(allow_inf_nan=False, description="factor of the weights in their gradient"),
    ] = 5e-4
    nesterov: Annotated[
        bool, Field(description="gradient at the weights ahead; needs momentum")
    ] = False
    schedule: Annotated[
        AbstractShape,
        OneOf(SHAPES, "onecycle"),
        Field(description="factor on lr, per step: onecycle, piecewise, cosine, ..."),
    ] = OneCycle()

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Sgd:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs momentum > 0")
        return self

    def build(self, model: nn.Module) -> torch.optim.SGD:
        """The optimiser over all parameters of `model`; on a GPU fused, with a tensor as learning rate."""
        device = next(model.parameters()).device
        on_gpu = device.type == "cuda"
        return EagerSGD(
            model.parameters(),
            lr=torch.tensor(self.lr, device=device) if on_gpu else self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True if on_gpu else None,
        )

    def set_rate(self, optimizer: torch.optim.Optimizer, progress: float) -> float:
        """Set the learning rate of the optimiser at `progress` and return it."""
        rate = self.lr * self.schedule.at(progress)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate
