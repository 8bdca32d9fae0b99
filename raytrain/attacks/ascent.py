"""Projected steepest ascent: FGSM, N-FGSM, PGD and the dynamic attack are its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from raytrain.attacks.init import Start, Uniform
from raytrain.attacks.step import ascend
from raytrain.attacks.stopping import Gap, Never, Stop
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel, in_box
from raytrain.core.types import Batch, BatchNorm, Clock, Delta, Spec, StepSize, in_pixels


@dataclass(frozen=True)
class Found:
    """Where an attack ended, and how many steps each sample took."""

    delta: Delta
    steps: Int[Tensor, " n"]


class ProjectedAscent(Spec):
    """delta <- P(delta + step_size * direction(g)), `steps` times, or until `stop` leaves a sample
    alone.

    P is the projection on ball and pixel box; the direction is the norm's steepest one (sign,
    g/|g|, largest pixels). The first step is unconditional; a sample that stops after s steps has
    cost s + 1 gradients, one that never stops costs `steps`. With `compact` the rows that stopped
    leave the batch, otherwise they are computed and not moved: the results are the same, the cost
    is not.
    """

    start: Start = Uniform()
    steps: NonNegativeInt
    step_size: StepSize
    stop: Stop = Never()
    bn: BatchNorm  # no default: it decides results, and public codes disagree
    confined: Annotated[
        bool, Field(description="project on the ball; false clips to the pixel box only (N-FGSM)")
    ] = True
    compact: bool = True

    @model_validator(mode="after")
    def _rows_are_independent(self) -> ProjectedAscent:
        if isinstance(self.stop, Gap) and self.compact and self.bn != "eval":
            raise ValueError(
                "compact=true needs attack_bn=eval: with batch statistics a sample's gradient depends on "
                "which others are still in the batch"
            )
        return self

    def maximise(
        self, oracle: Oracle, ball: AbstractThreatModel, delta: Delta, clock: Clock
    ) -> Found:
        """Ascend from `delta` at the weights of `oracle`. Reads no host value unless samples may stop."""
        batch, step_size = oracle.batch, in_pixels(self.step_size, ball.eps)
        rows = torch.arange(len(batch), device=delta.device)
        taken = torch.zeros_like(rows)
        start, delta = delta, delta.clone()
        with oracle.attacking():
            for step in range(self.steps):
                everything = len(rows) == len(batch)
                active = batch if everything else batch[rows]
                here = delta if everything else delta[rows]
                _, grad = oracle.delta_grad(here, None if everything else rows)
                moved = self._moved(ball, here, grad, active, step_size)
                stopped = (
                    self.stop.reached(ball, here, start[rows], grad, active.images, clock)
                    if step
                    else None
                )
                if stopped is None:
                    delta[rows], taken[rows] = moved, taken[rows] + 1
                elif self.compact:
                    going = ~stopped
                    rows = rows[going]
                    if len(rows) == 0:
                        break
                    delta[rows], taken[rows] = moved[going], taken[rows] + 1
                else:
                    # With statistics of the running batch a frozen row may wake again, as in the
                    # released code.
                    delta = torch.where(stopped.view(-1, 1, 1, 1), delta, moved)
                    taken = taken + (~stopped).long()
        return Found(delta, taken)

    def _moved(
        self, ball: AbstractThreatModel, delta: Delta, grad: Delta, batch: Batch, step_size: float
    ) -> Delta:
        there = ascend(ball, delta, grad, batch.images, step_size, "steepest")
        return ball.feasible(there, batch.images) if self.confined else in_box(there, batch.images)
