"""Projected steepest ascent; FGSM, N-FGSM, PGD and the dynamic attack are instances of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from raytrain.attacks.init import Init, Uniform
from raytrain.attacks.step import ascend
from raytrain.attacks.stopping import NEVER, Probe, Stopping
from raytrain.core.errors import NotReplayable
from raytrain.core.losses import AbstractLoss
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel, in_box
from raytrain.core.types import AttackBatchNorm, Batch, Delta, Progress, Spec, StepSize, in_pixels


@dataclass(frozen=True)
class AttackResult:
    """Final perturbation of an attack, and the number of steps of each sample."""

    delta: Delta
    steps: Int[Tensor, " n"]


class ProjectedAscent(Spec):
    """delta <- P(delta + step_size * direction(g)), `steps` times, or until `stop` ends it for a sample.

    P is the projection on ball and pixel box; the direction is the norm's steepest one (sign,
    g/|g|, largest pixels). A sample that stops after s steps has cost s + 1 gradients, one that never
    stops costs `steps`. With `compact` stopped rows are removed from the batch, otherwise they are
    computed and not moved: the results are the same, the cost is not.
    """

    start: Init = Uniform()
    steps: Annotated[NonNegativeInt, Field(description="inner steps")]
    step_size: StepSize
    stop: Stopping = NEVER
    bn: AttackBatchNorm  # no default: it decides results, and public codes disagree
    confined: Annotated[
        bool, Field(description="project on the ball; false clips to the pixel box only (N-FGSM)")
    ] = True
    compact: Annotated[
        bool, Field(description="stopped samples leave the batch; needs bn=eval")
    ] = True

    @model_validator(mode="after")
    def _rows_are_independent(self) -> ProjectedAscent:
        if self.stop.needs_independent_rows and self.compact and self.bn != "eval":
            raise ValueError(
                "compact=true needs attack_bn=eval: with batch statistics a sample's gradient depends on "
                "which others are still in the batch"
            )
        return self

    def fe_per_image(self, loss: AbstractLoss) -> float:
        """Forward-equivalents of an attack whose samples take all the steps."""
        if self.steps == 0:
            return 0.0
        return loss.reference_forwards + 2.0 * loss.inner_forwards * self.steps

    def replay_key(self, progress: Progress) -> Hashable:
        """All that an attack decides on the host; see `AbstractAlgorithm.replay_key`.

        Raises:
            NotReplayable: if samples that stop are removed from the batch.
        """
        if self.stop.may_stop and self.compact:
            raise NotReplayable("samples that stop are removed from the batch")
        return self.start.replay_key(progress), self.stop.replay_key(progress)

    def maximise(
        self, oracle: Oracle, threat: AbstractThreatModel, delta: Delta, progress: Progress
    ) -> AttackResult:
        """Ascend from `delta` at the weights of `oracle`; reads host values only if samples may stop."""
        batch, step_size = oracle.batch, in_pixels(self.step_size, threat.eps)
        rows = torch.arange(len(batch), device=delta.device)
        taken = torch.zeros_like(rows)
        start, delta = delta, delta.clone()
        state = self.stop.init(batch)
        with oracle.attacking():
            for step in range(self.steps):
                everything = len(rows) == len(batch)
                active = batch if everything else batch[rows]
                here = delta if everything else delta[rows]
                losses, grad = oracle.delta_grad(here, None if everything else rows)
                probe = Probe(
                    threat=threat,
                    images=active.images,
                    labels=active.labels,
                    delta=here,
                    start=start if everything else start[rows],
                    losses=losses,
                    grad=grad,
                    logits=oracle.logits,
                    steps=step,
                    progress=progress,
                )
                state, stopped = self.stop.update(state, probe)
                moved = self._moved(threat, here, grad, active, step_size)
                if stopped is None and everything:
                    delta, taken = moved, taken + 1
                elif stopped is None:
                    delta[rows], taken[rows] = moved, taken[rows] + 1
                elif self.compact:
                    going = ~stopped
                    rows, state = rows[going], tuple(part[going] for part in state)
                    if len(rows) == 0:
                        break
                    delta[rows], taken[rows] = moved[going], taken[rows] + 1
                else:
                    # With batch statistics a stopped row may move again, as in the released code.
                    delta = torch.where(stopped.view(-1, 1, 1, 1), delta, moved)
                    taken = taken + (~stopped).long()
        return AttackResult(delta, taken)

    def _moved(
        self,
        threat: AbstractThreatModel,
        delta: Delta,
        grad: Delta,
        batch: Batch,
        step_size: float,
    ) -> Delta:
        there = ascend(threat, delta, grad, batch.images, step_size, "steepest")
        return (
            threat.feasible(there, batch.images) if self.confined else in_box(there, batch.images)
        )
