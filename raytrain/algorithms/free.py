"""Free adversarial training: every backward pass moves the weights and the perturbation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, PositiveInt

from raytrain.algorithms.base import ONE_PASS, AbstractAlgorithm, Smoothed
from raytrain.attacks import ascend
from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import CrossEntropy
from raytrain.core.sample_store import SlotStore
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import SCHEDULABLE, Batch, StepSize, in_pixels
from raytrain.outer import AbstractOuter


@final
@dataclass(frozen=True)
class FreeTraining(AbstractAlgorithm):
    """(g_theta, g_delta) from one pass;  theta <- theta - lr g_theta;  delta <- P(delta + s sign g_delta)."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: CrossEntropy
    m: int
    step_size: StepSize

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        return {**self.outer.memory(setup), "slots": SlotStore(setup)}

    def fe_per_image(self, setting: CostSetting) -> float:
        weights = self.outer.weights_fe(self.objective, setting, has_gradient=False)
        return self.m * (weights + self.objective.update_fe)

    def why_not_mixed(self) -> str | None:
        return self.objective.why_not_mixed()

    def replay_key(self, state: TrainState) -> Hashable:
        return self.outer.replay_key(state, self.m)

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        slots, size = state.part("slots", SlotStore), in_pixels(self.step_size, self.ball.eps)
        delta = self.ball.feasible(slots.values, batch.images)
        first = None
        for _ in range(self.m):
            oracle = state.oracle(batch, self.objective, "train")
            state.optimizer.zero_grad(set_to_none=True)
            losses, grad = oracle.both_grads(delta, self.outer.weights(state, oracle, delta))
            self.outer.step(state)
            first = losses if first is None else first
            moved = ascend(self.ball, delta, grad, batch.images, size, "steepest")
            delta = self.ball.feasible(moved, batch.images)
        slots.values.copy_(delta)
        assert first is not None
        steps = torch.full_like(batch.labels, self.m)
        return StepResult(first, delta, steps)


@final
class Free(Smoothed):
    """m times per batch, from one pass: theta <- theta - lr grad_theta f(delta) and
    delta <- P(delta + step_size * sign grad_delta f(delta)).

    Shafahi et al. 2019 (Adversarial training for free!, arXiv 1904.12843), algorithm 1. Cost: 3 m FE
    per image for m weight updates, so divide the epochs by m to compare at equal cost. delta belongs
    to the *slot* of the batch and is carried over to the next, unrelated images, as in the paper; one
    perturbation per slot, nothing per image. Checkpoints hold it slot by slot, for any number
    of workers.

    Errors of public codes avoided: there is one pass (a re-implementation takes two); batches are whole,
    so every slot is updated. BatchNorm is in train mode, because every pass is a weight update. m = 1
    is neither natural training nor FGSM: its perturbation was computed for other images. One pass has
    one loss: a smoothed label reaches the perturbation too. l2 and l1 take the norm's own steepest
    step; the paper has l-inf only.

    Deviations: delta is clipped to the pixel box of its images before the first pass and after every
    step, so that x + delta is always an image and delta the perturbation that was trained on.

    - The authors' code (TensorFlow, and PyTorch for ImageNet) never clips delta to the box, neither
      within a batch nor between batches. It clips the image, clamp(x + delta, 0, 1), inside the graph:
      where that clamp is active, delta has no gradient, keeps its value until other images fill the
      slot, and is carried over to them unclipped. Here it moves back as soon as its gradient turns, and
      what is carried over is only what the box allowed.
    - The code of Wong et al. clips after every step but not before the first pass: one of the m passes
      has pixels outside [0, 1]. It also moves the learning rate with every replay; here the rate is
      that of the batch for all m.
    """

    card: ClassVar[Card] = Card(
        paper="Adversarial training for free!, Shafahi et al. 2019, arXiv 1904.12843",
        rule="m times per batch, from one pass: theta descends, delta of the slot ascends",
        cost="3 m FE for m weight updates (m=8: 24)",
        memory="none per image; one perturbation per slot of the batch",
        ranges={"m": Range(2, 12), "step_size": Range(0.5, 1.25, unit="eps")},
    )

    name: Literal["free"] = "free"
    m: Annotated[PositiveInt, Field(description="replays of each batch")] = 8
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> FreeTraining:
        return FreeTraining(ball, outer, self.cross_entropy(), self.m, self.step_size)

    def why_not_displaced(self) -> str | None:
        return ONE_PASS
