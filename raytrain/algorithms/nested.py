"""A whole attack, then an update: the algorithm of natural, FGSM, PGD, TRADES, MART and Dynamic AT."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

from pydantic import Field

from raytrain.algorithms.base import REMEMBERS, AbstractAlgorithm, AbstractRecipe
from raytrain.attacks import ProjectedAscent
from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card
from raytrain.core.cost import CostSetting
from raytrain.core.losses import AbstractLoss, CrossEntropy, Loss
from raytrain.core.sample_store import SampleStore
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import Batch
from raytrain.outer import AbstractOuter


@final
@dataclass(frozen=True)
class Nested(AbstractAlgorithm):
    """delta <- attack(theta);  theta <- outer(theta, delta).

    With `own_loss`, sample i is weighted by its own loss at delta, from the second epoch on.
    """

    ball: AbstractThreatModel
    attack: ProjectedAscent
    outer: AbstractOuter
    objective: AbstractLoss = CrossEntropy()
    own_loss: bool = False

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        parts = self.outer.memory(setup)
        if self.attack.start.remembers:
            parts["delta"] = SampleStore.of_perturbations(setup, self.ball.eps)
        return parts

    def fe_per_image(self, setting: CostSetting) -> float:
        attack, loss = self.attack.fe_per_image(self.objective), self.objective
        if self.own_loss and setting.epoch > 0:
            attack = attack or loss.reference_forwards
            attack += loss.inner_forwards
        has_gradient = self.attack.steps > 0
        return attack + self.outer.update_fe(loss, setting, has_gradient=has_gradient)

    def why_not_mixed(self) -> str | None:
        if self.attack.start.remembers:
            return REMEMBERS
        if self.attack.stop.reads_labels:
            return "its attack stops where an image is misclassified, and a mixed image has two labels"
        return self.objective.why_not_mixed()

    @property
    def cost_varies(self) -> bool:
        return self.attack.stop.may_stop and self.attack.compact

    def replay_key(self, state: TrainState) -> Hashable:
        weighted = self.own_loss and state.epoch > 0
        return weighted, self.attack.replay_key(state.progress), self.outer.replay_key(state)

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        oracle = state.oracle(batch, self.objective, self.attack.bn)
        store = state.part("delta", SampleStore) if self.attack.start.remembers else None
        start = self.attack.start.delta(self.ball, batch, store, state.progress)
        found = self.attack.maximise(oracle, self.ball, start, state.progress)
        weighted = self.own_loss and state.epoch > 0
        given = oracle.losses(found.delta) if weighted else None
        losses = self.outer.update(state, oracle, found.delta, given)
        if store is not None:
            store.write(batch, found.delta)
        return StepResult(losses, found.delta, found.steps)


@final
class NestedRecipe(AbstractRecipe):
    """A combination of your own: the parts written out."""

    card: ClassVar[Card] = Card(
        paper="none: for combinations that no paper names",
        rule="delta <- attack(theta);  theta <- outer(theta, delta)",
        cost="2 FE per inner step and 3 for the update; with trades 1 and 3 more, with mart 3 more",
        memory="4 bytes per pixel and channel with start=remembered, otherwise none",
    )

    name: Literal["nested"] = "nested"
    attack: Annotated[ProjectedAscent, Field(description="how the perturbation is found")]
    objective: Annotated[Loss, Field(description="what attack and update are about")] = (
        CrossEntropy()
    )

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        return Nested(ball, self.attack, outer, self.objective)
