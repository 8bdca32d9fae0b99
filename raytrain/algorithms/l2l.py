"""L2L: the inner maximiser is a recurrent network, trained together with the classifier."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch.optim import Adam

from raytrain.algorithms.base import AbstractAlgorithm, Smoothed
from raytrain.attacks import (
    AttackerSpec,
    AttackResult,
    Gaussian,
    Init,
    LearnedAscent,
    ProjectedAscent,
    Uniform,
)
from raytrain.attacks.learned import Attacker
from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card, Options, Range
from raytrain.core.cost import CostSetting, Meter
from raytrain.core.losses import AbstractLoss, Trades
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import SCHEDULABLE, AttackBatchNorm, Batch, BatchNorm, mix
from raytrain.outer import AbstractOuter


@final
@dataclass(frozen=True)
class Learned(AbstractAlgorithm):
    """delta <- attacker;  attacker <- Adam ascent on its own iterates;  theta <- outer(theta, delta)."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: AbstractLoss
    start: Init
    ascent: LearnedAscent
    warm_ascent: ProjectedAscent
    recipe: L2l

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        attacker = Attacker.seeded(self.recipe, mix(setup.seed, "attacker"))
        attacker = attacker.to(setup.context.device, setup.dtype)
        # Adam refuses to be recorded unless it is capturable.
        optimizer = Adam(attacker.parameters(), lr=self.recipe.phi_lr, fused=True, capturable=True)
        parts: dict[str, Stateful] = {"attacker": attacker, "attacker_optimizer": optimizer}
        return {**self.outer.memory(setup), **parts}

    def fe_per_image(self, setting: CostSetting) -> float:
        loss, recipe = self.objective, self.recipe
        if setting.epoch < recipe.warm:
            attack = self.warm_ascent.fe_per_image(loss)
        else:
            # A step that trains the attacker takes the gradient at its last perturbation too.
            gradients = recipe.steps + 1 / recipe.phi_every
            attack = loss.reference_forwards + 2 * loss.inner_forwards * gradients
        return attack + self.outer.update_fe(loss, setting, has_gradient=True)

    def replay_key(self, state: TrainState) -> Hashable:
        learns = state.step % self.recipe.phi_every == 0
        return state.epoch < self.recipe.warm, learns, self.outer.replay_key(state)

    def why_not_mixed(self) -> str | None:
        return self.objective.why_not_mixed()

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        oracle = state.oracle(batch, self.objective, self.ascent.bn)
        found = self._attack(state, oracle, batch)
        losses = self.outer.update(state, oracle, found.delta)
        return StepResult(losses, found.delta, found.steps)

    def measures(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Losses of the attacker and of PGD from one start: a weak attacker overstates robustness."""
        attacker, ball = state.part("attacker", Attacker), self.ball
        # Measuring must not update the running statistics.
        bn: BatchNorm = "batch_nostat" if self.ascent.bn == "train" else self.ascent.bn
        losses = []
        for learned in (True, False):
            oracle = Oracle(
                state.model,
                self.objective,
                batch,
                Meter(),
                attack_bn=bn,
                precision=state.precision,
            )
            start = self.start.delta(ball, batch, None)
            if learned:
                found = self.ascent.maximise(oracle, ball, start, attacker, learn=False)
            else:
                found = self.warm_ascent.maximise(oracle, ball, start, state.progress)
            losses.append(oracle.losses(found.delta).double().mean())
        means = torch.stack(losses) / state.context.world
        attack, pgd = state.context.total(means).tolist()
        return {**super().measures(state, batch), "l2l/attack_loss": attack, "l2l/pgd_loss": pgd}

    def _attack(self, state: TrainState, oracle: Oracle, batch: Batch) -> AttackResult:
        start = self.start.delta(self.ball, batch, None)
        if state.epoch < self.recipe.warm:
            return self.warm_ascent.maximise(oracle, self.ball, start, state.progress)
        attacker = state.part("attacker", Attacker)
        optimizer = state.part("attacker_optimizer", Adam)
        learns = state.step % self.recipe.phi_every == 0
        optimizer.zero_grad(set_to_none=True)
        found = self.ascent.maximise(oracle, self.ball, start, attacker, learns)
        if learns:
            state.context.average_grads(attacker)
            if self.recipe.phi_clip > 0:
                torch.nn.utils.clip_grad_value_(attacker.parameters(), self.recipe.phi_clip)
            with warnings.catch_warnings():
                # Steps that are not recorded take as long.
                warnings.filterwarnings("ignore", "This instance was constructed with capturable")
                optimizer.step()
        return found


@final
class L2l(Smoothed, AttackerSpec):
    """delta <- P(delta + scale tanh m_phi(grad_delta f, memory)), `steps` times;
    phi <- phi + Adam grad_phi sum_t w_t f(delta_t);  theta <- theta - lr grad_theta f(delta).

    Learning to learn the inner maximiser, arXiv 2004.12227: RNN-Adv (loss=adv) and RNN-TRADES
    (loss=trades). **A reconstruction**: of the paper the abstract and the opening were at hand, and no
    public code exists. Known from there: a recurrent network supplies the update direction and step of
    the attack and is trained together with the classifier. Cell, features, weights of the steps, the
    optimiser and every default are chosen here, after the paper's siblings. It is not the work of
    Jiang et al. 2021 that is called L2L too.

    One small network for all coordinates; its memory starts anew with every batch. The same delta
    serves both updates. The meta-gradient holds the classifier's gradients fixed: it is then that of
    sum_t w_t <g_t, delta_t>, whose g_t the attack computes anyway, so it needs no pass of the classifier
    and no second derivative. Cost per image: 2 (steps + 1) + 3 FE and the small network; with trades 5
    more for clean logits and the second branch of the loss. No per-sample state; while attacking, about
    95 MiB per step for 128 CIFAR-10 images, which `truncate` cuts. The attacker's gradient is averaged
    over the workers before its optimiser moves; attacker and optimiser are in the checkpoint.

    init=pgd with features=sign is PGD with step size `scale` bit for bit, for any cell (with tanh it
    then stays PGD: squash=hardtanh learns on). A hard projection has no slope where a pixel is at its
    bound, which after a strong step is nearly everywhere: projection=straight_through has slope 1
    there. In l2 a step of all pixels together is `scale` long. Compare
    l2l/attack_loss with l2l/pgd_loss: a weak attacker raises clean accuracy.
    """

    card: ClassVar[Card] = Card(
        paper="Improved adversarial training via learned optimizer, Xiong and Hsieh 2020, "
        "arXiv 2004.12227 (a reconstruction from its abstract)",
        rule="delta <- P(delta + scale tanh m_phi(g)), m_phi recurrent, trained by ascent on sum_t w_t f",
        cost="2 (steps + 1) + 3 FE (10 steps: 25), trades 29; the small network is not counted",
        norms=("linf", "l2"),
        ranges={
            "loss": Options(("adv", "trades")),
            "cell": Options(("lstm", "gru", "rnn", "linear")),
            "hidden": Options((5, 10, 20)),
            "features": Options(("rms", "linf", "sign", "logsign")),
            "scale": Range(0.1, 0.5, unit="eps"),
            "phi_lr": Range(0.0001, 0.03, log=True),
            "steps": Range(5, 12),
            "step_weights": Options(("t", "uniform", "last")),
            "projection": Options(("hard", "straight_through")),
            "warm": Range(0, 5, unit="epochs"),
            "beta": Range(0.5, 15, log=True, when={"loss": "trades"}),
        },
    )

    name: Literal["l2l"] = "l2l"
    loss: Annotated[Literal["adv", "trades"], Field(description="RNN-Adv or RNN-TRADES")] = "adv"
    beta: Annotated[
        NonNegativeFloat, SCHEDULABLE, Field(description="weight of the KL (loss=trades)")
    ] = 6.0
    steps: Annotated[PositiveInt, SCHEDULABLE, Field(description="T, inner steps")] = 10
    step_weights: Annotated[
        Literal["t", "uniform", "last"], Field(description="w_t in what the attacker climbs")
    ] = "t"
    truncate: Annotated[
        PositiveInt | None, Field(description="steps a gradient reaches back; default: all")
    ] = None
    projection: Annotated[
        Literal["hard", "straight_through"], Field(description="its slope, for the attacker")
    ] = "hard"
    phi_lr: Annotated[
        NonNegativeFloat, Field(description="the attacker's Adam; 0 leaves it as it is")
    ] = 1e-3
    phi_clip: Annotated[
        NonNegativeFloat, Field(description="bound on each of its gradients; 0: none")
    ] = 1.0
    phi_every: Annotated[PositiveInt, Field(description="batches per step of the attacker")] = 1
    warm: Annotated[NonNegativeInt, Field(description="epochs with PGD before it begins")] = 0
    start: Annotated[
        Init | None, Field(description="default: uniform, with loss=trades gaussian")
    ] = None
    attack_bn: AttackBatchNorm = "eval"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Learned:
        if self.start is not None and self.start.remembers:
            raise ValueError(
                "algorithm.start: l2l keeps no perturbation per image; expected uniform, gaussian or zero"
            )
        trades = self.loss == "trades"
        return Learned(
            ball,
            outer,
            Trades(beta=self.beta, label_smoothing=self.label_smoothing)
            if trades
            else self.cross_entropy(),
            self.start or (Gaussian() if trades else Uniform()),
            LearnedAscent(
                steps=self.steps,
                bn=self.attack_bn,
                weighting=self.step_weights,
                projection=self.projection,
                truncate=self.truncate,
            ),
            ProjectedAscent(steps=self.steps, step_size=self.scale, bn=self.attack_bn),
            self,
        )

    def why_not_in(self, norm: str) -> str:
        return (
            f": the steps of a network that sees one pixel at a time say nothing about which few pixels "
            f"an {norm} budget is best spent on"
        )
