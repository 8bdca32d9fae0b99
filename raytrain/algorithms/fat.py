"""FAT: friendly adversarial training, on the least adversarial of the misclassified iterates."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import AbstractStopping, Probe, StoppingState
from raytrain.core.card import Card, Range
from raytrain.core.schedules import PositiveShare
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE, Batch, Mask, Progress, StepSize
from raytrain.outer import AbstractOuter


@final
class Misclassified(AbstractStopping):
    """Stop at the (tau_t + 1)-th misclassified iterate; the start counts too.

    tau_t is the number of the shares in `grow_at` that training has passed at the beginning of the
    epoch, at most `tau`.
    """

    reads_labels: ClassVar[bool] = True

    kind: Literal["misclassified"] = "misclassified"
    tau: NonNegativeInt
    grow_at: tuple[PositiveShare, ...]

    def init(self, batch: Batch) -> StoppingState:
        return (torch.zeros_like(batch.labels),)

    def update(self, state: StoppingState, probe: Probe) -> tuple[StoppingState, Mask]:
        (count,) = state
        wrong = ~probe.correct
        return (count + wrong,), wrong & (count >= self.replay_key(probe.progress))

    def replay_key(self, progress: Progress) -> int:
        """tau_t, steps after the first misclassified iterate."""
        return min(self.tau, sum(progress.epoch >= share for share in self.grow_at))


@final
class Fat(Smoothed, Iterated):
    """PGD that takes tau_t steps more from the first misclassified iterate of an image and stops there;
    theta <- theta - lr grad(delta).

    Zhang et al. 2020 (Attacks which do not kill training make adversarial learning stronger, arXiv
    2002.11242), algorithms 1 and 2. An image that is misclassified at the random start is trained on
    there while tau_t = 0. The defaults are those of the public code: K = 10, and tau_t = 0, 1, 2 from the
    epochs 0, 50 and 90 of 120 on. Cost: an image that stops after s of K steps needs min(s + 1, K)
    gradients, the one of its last iterate included. No per-sample state between epochs. With tau >= K
    from the start it is PGD.

    Deviations from the public code: after every step it adds noise 0.001 N(0, 1) to the iterate, which
    no other attack here does. It trains on the images in the order in which they stopped, which does
    not change a mean over the batch. It computes clean logits that cross-entropy does not use. Its
    variants for TRADES and MART are not part of this recipe. Its numbers are eps 0.031 and step 0.007.
    """

    card: ClassVar[Card] = Card(
        paper="Attacks which do not kill training make adversarial learning stronger, Zhang et al. "
        "2020, arXiv 2002.11242",
        rule="PGD; image i stops tau_t steps after its first misclassified iterate, tau_t growing",
        cost="2 min(s + 1, K) + 3 FE for an image that stops after s of K steps (K=10: 5 to 23)",
        ranges={
            "tau": Range(0, 3),
            "steps": Range(5, 15),
            "step_size": Range(1 / 8, 1 / 2, log=True, unit="eps"),
        },
    )

    name: Literal["fat"] = "fat"
    steps: Annotated[PositiveInt, SCHEDULABLE, Field(description="K, the most inner steps")] = 10
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps/4"
    tau: Annotated[
        NonNegativeInt, Field(description="most steps after the first misclassified iterate")
    ] = 2
    grow_at: Annotated[
        tuple[PositiveShare, ...],
        Field(description="shares of training after which tau_t grows by one"),
    ] = (50 / 120, 90 / 120)

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        stop = Misclassified(tau=self.tau, grow_at=self.grow_at)
        return Nested(ball, self.attack(stop), outer, self.cross_entropy())
