"""Stopping rules: decide for each sample whether its attack ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from raytrain.core.registry import OneOf, Registry
from raytrain.core.schedules import SHAPES, AbstractShape, Power
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import (
    Batch,
    Delta,
    Images,
    Labels,
    Mask,
    Number,
    PerSample,
    Progress,
    Spec,
    per_sample_dot,
)

StoppingState = tuple[Tensor, ...]
"""State of a rule during one attack: tensors with one row per sample."""


@dataclass(frozen=True)
class Probe:
    """The samples that are still attacked, before their next step. Row i belongs to sample i."""

    threat: AbstractThreatModel
    images: Images
    labels: Labels
    delta: Delta
    start: Delta  # where the attack began
    losses: PerSample  # inner losses at delta
    grad: Delta  # their gradients, which the next step uses
    logits: Tensor  # at delta, (n, classes)
    steps: int  # steps of the attack so far
    progress: Progress  # of training

    @property
    def correct(self) -> Mask:
        """Whether each sample is classified as its label at delta."""
        return self.logits.argmax(1) == self.labels


class AbstractStopping(Spec):
    """Decide for each sample, before each step, from the pass that the step needs anyway.

    A sample that stops after s steps has cost s + 1 gradients; after the last step there is no decision.
    """

    needs_independent_rows: ClassVar[bool] = True
    """Whether a sample's decision must not depend on the other samples of the batch: a compacted batch
    then needs running BatchNorm statistics."""

    reads_labels: ClassVar[bool] = False
    """Whether a decision depends on the label of the image."""

    kind: Any = None

    @property
    def may_stop(self) -> bool:
        """Whether an attack may take fewer than its largest number of steps."""
        return True

    def replay_key(self, progress: Progress) -> Hashable:
        """All that `update` takes from the progress of training; see `AbstractAlgorithm.replay_key`."""
        return progress

    def init(self, batch: Batch) -> StoppingState:
        """The state before the first step, a row for each sample of the batch."""
        del batch
        return ()

    @abstractmethod
    def update(self, state: StoppingState, probe: Probe) -> tuple[StoppingState, Mask | None]:
        """The state after this probe, and the samples that stop here; None: none does.

        None avoids a synchronisation with the device.
        """


@final
class Never(AbstractStopping):
    """Take all the steps."""

    needs_independent_rows: ClassVar[bool] = False

    kind: Literal["never"] = "never"

    @property
    def may_stop(self) -> bool:
        return False

    def replay_key(self, progress: Progress) -> Hashable:
        return ()

    def update(self, state: StoppingState, probe: Probe) -> tuple[StoppingState, None]:
        del probe
        return state, None


@final
class Gap(AbstractStopping):
    """Stop where FOSC(delta_i) <= c_t, with c_t = c_max * decay(t), after the first step at the earliest.

    Wang et al. 2019 (arXiv 2112.08304), section 4. The decay defaults to the paper's linear fall. A
    negative `c_max` is not decayed: since FOSC >= 0, such a rule never stops, and the attack is PGD.
    The released code measures the displacement in FOSC from the random start u instead of from the
    natural image (`anchor=start`): that adds <u, g>, may be negative, and has a random sign near zero.
    """

    kind: Literal["gap"] = "gap"
    c_max: Annotated[
        Number, Field(description="threshold at the start of training, in nats; negative: never")
    ]
    decay: Annotated[
        AbstractShape, OneOf(SHAPES, "power"), Field(description="how the threshold falls")
    ] = Power()
    over: Annotated[
        Literal["ball", "ball_box"],
        Field(
            description="the set FOSC is taken over: the ball (paper), or its part with legal pixels"
        ),
    ] = "ball"
    anchor: Annotated[
        Literal["natural", "start"],
        Field(description="FOSC of the displacement from the image (paper) or from the start"),
    ] = "natural"
    per: Annotated[
        Literal["epoch", "step"], Field(description="how often the threshold falls (paper: epoch)")
    ] = "epoch"

    @property
    def may_stop(self) -> bool:
        return self.c_max >= 0 or self.anchor == "start"

    def threshold(self, progress: float) -> float:
        """c_t, in nats, at a share of training."""
        left = self.decay.at(progress)
        if self.c_max < 0:
            return self.c_max
        return self.c_max * left if left else 0.0  # inf * 0 is not a number

    def update(self, state: StoppingState, probe: Probe) -> tuple[StoppingState, Mask | None]:
        if probe.steps == 0 or not self.may_stop:
            return state, None
        threat, delta, grad = probe.threat, probe.delta, probe.grad
        whole = self.over == "ball"
        gap = threat.gap(delta, grad) if whole else threat.box_gap(delta, grad, probe.images)
        if self.anchor == "start":
            gap = gap + per_sample_dot(probe.start, grad)
        return state, gap <= self.replay_key(probe.progress)

    def replay_key(self, progress: Progress) -> float:
        """The threshold c_t, in nats."""
        return self.threshold(progress.epoch if self.per == "epoch" else progress.step)


NEVER = Never()

STOPPINGS = Registry(AbstractStopping, "kind")
STOPPINGS.register(Never, Gap)

Stopping = Annotated[
    AbstractStopping, OneOf(STOPPINGS), Field(description="when a sample's attack ends")
]
