"""Attack to the end, then update: the composition behind natural, FGSM, PGD and dynamic training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from raytrain.algorithms.base import AbstractAlgorithm, AbstractRecipe, Card, Outcome, TrainState
from raytrain.attacks import ProjectedAscent
from raytrain.balls import AbstractBall
from raytrain.objectives import AbstractObjective, CrossEntropy, Objective
from raytrain.oracle import Oracle
from raytrain.outer import AbstractOuter
from raytrain.types import Batch


@final
@dataclass(frozen=True)
class Nested(AbstractAlgorithm):
    """delta <- attack(theta);  theta <- outer(theta, delta)."""

    ball: AbstractBall
    attack: ProjectedAscent
    outer: AbstractOuter
    objective: AbstractObjective = CrossEntropy()

    @property
    def remembers(self) -> bool:
        return self.attack.start.remembers

    def step(self, state: TrainState, batch: Batch) -> Outcome:
        oracle = Oracle(
            state.model,
            self.objective,
            batch,
            state.meter,
            wrapper=state.wrapper,
            attack_bn=self.attack.bn,
            precision=state.precision,
        )
        start = self.attack.start.delta(self.ball, batch, state.store)
        found = self.attack.maximise(oracle, self.ball, start, state.progress)
        losses = self.outer.update(oracle, found.delta, state.optimizer)
        if state.store is not None:
            state.store.write(batch, found.delta)
        return Outcome(losses, found.delta, found.steps)


@final
class NestedRecipe(AbstractRecipe):
    """A combination of your own: the parts written out."""

    card: ClassVar[Card] = Card(
        paper="none: for combinations that no paper names",
        rule="delta <- attack(theta);  theta <- outer(theta, delta)",
        cost="2 FE per inner step and 3 for the update",
        memory="4 bytes per pixel and channel with start=remembered, otherwise none",
    )

    name: Literal["nested"] = "nested"
    attack: ProjectedAscent
    objective: Objective = CrossEntropy()

    def build(self, ball: AbstractBall, outer: AbstractOuter) -> Nested:
        return Nested(ball, self.attack, outer, self.objective)
