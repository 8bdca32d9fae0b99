"""ATTA: attacks that start from the final perturbation of the last attack on the same image."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from raytrain.algorithms.base import Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import AbstractInit, Gaussian, ProjectedAscent, Remembered
from raytrain.core.card import Card, Options, Range
from raytrain.core.sample_store import SampleStore
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import (
    BEGINNING,
    SCHEDULABLE,
    AttackBatchNorm,
    Batch,
    Delta,
    Pixels,
    Progress,
    StepSize,
)
from raytrain.outer import AbstractOuter


@final
class Accumulated(AbstractInit):
    """The last perturbation of the image; in every `reset_every`-th epoch, the first included, noise."""

    kind: Literal["accumulated"] = "accumulated"
    reset_every: PositiveInt | None
    std: Pixels

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        start = Gaussian(std=self.std) if self.replay_key(progress) else Remembered()
        return start.delta(threat, batch, store, progress)

    @property
    def remembers(self) -> bool:
        return True

    def replay_key(self, progress: Progress) -> bool:
        """Whether perturbations begin anew in this epoch."""
        return progress.epochs % self.reset_every == 0 if self.reset_every else not progress.epochs


@final
class Atta(Smoothed):
    """delta_i <- P(delta_i + step_size * sign g(delta_i)), `steps` times, from the delta_i of the epoch
    before, moved with crop and flip; theta <- theta - lr grad(delta).

    Zheng et al. 2020 (Efficient adversarial training with transferable adversarial examples, arXiv
    1912.11969). Perturbations accumulate over epochs, so that one or a few steps per epoch train
    against attacks of many. As in the public code they are reset to noise 0.001 N(0, 1) every
    `reset_every` epochs. Cost: 2 steps + 3 FE. Memory: one perturbation per image.

    Deviations: the public code pads images and perturbations and crops both; here the pixels
    outside a crop keep the value of an earlier epoch; inside the crop both are the same. The
    noise is clipped to ball and pixel box before the first gradient. Its loss for CIFAR-10 is TRADES';
    here it is the cross-entropy, so that the method is compared by its attack alone. The step size is
    chosen here: that of the paper depends on the number of steps.
    """

    card: ClassVar[Card] = Card(
        paper="Efficient adversarial training with transferable adversarial examples, Zheng et al. "
        "2020, arXiv 1912.11969",
        rule="PGD of few steps from the last perturbation of the same image, reset now and then",
        cost="2 steps + 3 FE (1 step: 5)",
        memory="a perturbation per image: 4 bytes per pixel and channel",
        ranges={
            "steps": Range(1, 4),
            "step_size": Range(1 / 8, 1, log=True, unit="eps"),
            "reset_every": Options((3, 5, 10, None), note="epochs"),
        },
    )

    name: Literal["atta"] = "atta"
    steps: Annotated[PositiveInt, SCHEDULABLE, Field(description="inner steps per visit")] = 1
    step_size: Annotated[StepSize, SCHEDULABLE] = "eps/2"
    reset_every: Annotated[
        PositiveInt | None,
        Field(description="epochs after which all perturbations begin anew; null: never"),
    ] = 10
    std: Annotated[
        Pixels, Field(gt=0, description="standard deviation of the first perturbation, in pixels")
    ] = 0.001
    attack_bn: AttackBatchNorm = "eval"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        attack = ProjectedAscent(
            start=Accumulated(reset_every=self.reset_every, std=self.std),
            steps=self.steps,
            step_size=self.step_size,
            bn=self.attack_bn,
        )
        return Nested(ball, attack, outer, self.cross_entropy())
