"""SI-HG: alternating descent in the weights and ascent in the perturbations, one of them extrapolated."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from raytrain.algorithms.base import ONE_PASS, REMEMBERS, AbstractAlgorithm, Smoothed
from raytrain.attacks import Ascent, ascend
from raytrain.core.algorithm_state import Stateful, TrainingSetup, Weights
from raytrain.core.card import Card, Options, Range
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable, RequestError
from raytrain.core.losses import AbstractLoss
from raytrain.core.network import shifted, trainable
from raytrain.core.oracle import Oracle
from raytrain.core.sample_store import GradientTable, Keep, SampleStore, SlotStore
from raytrain.core.threat_models import AbstractThreatModel, in_box
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import (
    SCHEDULABLE,
    AttackBatchNorm,
    Batch,
    Delta,
    PerSample,
    StepSize,
    in_pixels,
)
from raytrain.outer import AbstractOuter

_TABLE_LIMIT = 2 * 2**30  # bytes


@final
@dataclass(frozen=True)
class SemiImplicit(AbstractAlgorithm):
    """One ascent on delta and one descent on theta per batch, in the order of `recipe.mode`."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: AbstractLoss
    recipe: SiHg

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        parts, recipe = self.outer.memory(setup), self.recipe
        if recipe.store == "per_sample":
            parts["delta"] = self._bank(setup)
        if recipe.store == "batch_slot":
            parts["slots"] = SlotStore(setup)
        if recipe.mode == "A":
            parts["before"] = Weights(setup.model)
        if recipe.mode == "B":
            parts["delta_before"] = self._bank(setup)
        if recipe.mode == "T":
            parts["table"] = self._table(setup)
        return parts

    def fe_per_image(self, setting: CostSetting) -> float:
        recipe, loss, outer = self.recipe, self.objective, self.outer
        ascent = 2.0 * loss.inner_forwards
        if recipe.mode in "AN":
            update = outer.update_fe(loss, setting, has_gradient=True)
            visit = recipe.m * ascent + update
        elif recipe.mode == "B":
            visit = recipe.m * ascent + outer.update_fe(loss, setting, has_gradient=False)
        elif recipe.mode == "C":
            first = loss.update_fe if recipe.theta else ascent
            visit = first + (recipe.m - 1) * ascent + loss.update_fe
        elif recipe.mode == "J":
            visit = loss.update_fe + outer.weights_fe(loss, setting, has_gradient=False)
        else:
            visit = loss.inner_forwards + recipe.m * ascent + loss.update_fe
        return recipe.replays * visit

    def why_not_mixed(self) -> str | None:
        if self.recipe.mode == "T":
            return "its table holds a gradient of every image, and a mixed image is another one each time"
        return REMEMBERS if self.recipe.store == "per_sample" else self.objective.why_not_mixed()

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        recipe, theta = self.recipe, self._theta(state)
        move = {
            "A": self._look_ahead,
            "B": self._extrapolate_delta,
            "C": self._extrapolate_gradient,
            "N": self._alternate,
            "J": self._together,
            "T": self._with_table,
        }[recipe.mode]
        first = delta = None
        for replay in range(recipe.replays):
            delta = self._read(state, batch, replay)
            losses, delta = move(state, batch, delta, theta)
            first = losses if first is None else first
            self._write(state, batch, delta)
        assert first is not None and delta is not None
        steps = torch.full_like(batch.labels, recipe.m * recipe.replays)
        return StepResult(first, delta, steps)

    def replay_key(self, state: TrainState) -> Hashable:
        if self.recipe.mode == "T":
            raise NotReplayable("mode T measures every sample's gradient")
        return self._theta(state), self.outer.replay_key(state, self.recipe.replays)

    def _theta(self, state: TrainState) -> float:
        recipe = self.recipe
        return recipe.theta * min(1.0, (state.epoch + 1) / max(1, recipe.theta_warmup))

    # ---------------------------------------------------------------- the modes

    def _look_ahead(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """A: ascend at w + theta (w - w_prev), descend at the new delta."""
        oracle, before = self._oracle(state, batch), state.part("before", Weights)
        now = {name: p.detach() for name, p in state.model.named_parameters()}
        # At theta = 0 the weights are exactly the present ones.
        ahead = {n: theta * (now[n] - old) for n, old in before.values.items()} if theta else {}
        with shifted(state.model, ahead):
            delta = self._ascent(oracle, batch, delta, self.recipe.m)
        for name, value in before.values.items():
            value.copy_(now[name])
        return self.outer.update(state, oracle, delta), delta

    def _alternate(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """N: ascend, then descend at the new delta."""
        del theta
        oracle = self._oracle(state, batch)
        delta = self._ascent(oracle, batch, delta, self.recipe.m)
        return self.outer.update(state, oracle, delta), delta

    def _extrapolate_delta(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """B: descend at delta + theta (delta - delta_prev), ascend at the new weights."""
        store = state.part("delta_before", SampleStore)
        ahead = delta + theta * (delta - store.read(batch)) if theta else delta
        if self.recipe.project_bar:
            ahead = self.ball.feasible(ahead, batch.images)
        losses = self.outer.update(state, self._oracle(state, batch), ahead)
        store.write(batch, delta)
        return losses, self._ascent(self._oracle(state, batch), batch, delta, self.recipe.m)

    def _extrapolate_gradient(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """C: descend along (1 + theta) g_w(delta') - theta g_w(delta)."""
        oracle = self._oracle(state, batch)
        state.optimizer.zero_grad(set_to_none=True)
        if theta:
            grad = oracle.local_grads(delta, -theta)
        else:
            _, grad = oracle.delta_grad(delta)
        delta = self._moved(batch, delta, grad)
        delta = self._ascent(oracle, batch, delta, self.recipe.m - 1)
        ahead = delta.new_full((len(delta),), 1 + theta) if theta else None
        losses = oracle.theta_grad(delta, ahead)
        self.outer.step(state)
        return losses, delta

    def _together(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """J: both gradients at the old point, from one pass."""
        del theta
        oracle = self._oracle(state, batch)
        state.optimizer.zero_grad(set_to_none=True)
        losses, grad = oracle.both_grads(delta, self.outer.weights(state, oracle, delta))
        self.outer.step(state)
        return losses, self._moved(batch, delta, grad)

    def _with_table(
        self, state: TrainState, batch: Batch, delta: Delta, theta: float
    ) -> tuple[PerSample, Delta]:
        """T: descend along z_bar, ascend at the new weights, put the new gradients into the table."""
        table, oracle = state.part("table", GradientTable), self._oracle(state, batch)
        losses = oracle.losses(delta)
        for parameter, grad in zip(trainable(state.model), table.direction(), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(grad)  # in its order in memory
        self.outer.step(state)
        delta = self._ascent(oracle, batch, delta, self.recipe.m)
        grads = [
            torch.cat([grad.reshape(len(grad), -1) for grad in chunk], dim=1)
            for chunk in oracle.sample_grads(delta, "eval", self.recipe.chunk)
        ]
        table.learn(batch, torch.cat(grads), theta)
        return losses, delta

    # ---------------------------------------------------------------- delta

    def _oracle(self, state: TrainState, batch: Batch) -> Oracle:
        return state.oracle(batch, self.objective, self.recipe.attack_bn)

    def _ascent(self, oracle: Oracle, batch: Batch, delta: Delta, steps: int) -> Delta:
        for _ in range(steps):
            _, grad = oracle.delta_grad(delta)
            delta = self._moved(batch, delta, grad)
        return delta

    def _moved(self, batch: Batch, delta: Delta, grad: Delta) -> Delta:
        size = in_pixels(self.recipe.step_size, self.ball.eps)
        moved = ascend(self.ball, delta, grad, batch.images, size, self.recipe.ascent)
        return self.ball.feasible(moved, batch.images)

    def _read(self, state: TrainState, batch: Batch, replay: int) -> Delta:
        recipe = self.recipe
        if recipe.store == "per_sample":
            remembered = state.part("delta", SampleStore).read(batch)
            return self.ball.feasible(recipe.shrink * remembered, batch.images)
        if recipe.store == "batch_slot":
            return self.ball.feasible(state.part("slots", SlotStore).values, batch.images)
        if recipe.init == "zero":
            return torch.zeros_like(batch.images)
        purpose = "start" if replay == 0 else f"start/{replay}"
        return in_box(self.ball.noise(batch.images, batch.rng, purpose), batch.images)

    def _write(self, state: TrainState, batch: Batch, delta: Delta) -> None:
        if self.recipe.store == "per_sample":
            state.part("delta", SampleStore).write(batch, delta)
        elif self.recipe.store == "batch_slot":
            state.part("slots", SlotStore).values.copy_(delta)

    def _bank(self, setup: TrainingSetup) -> SampleStore:
        recipe = self.recipe
        aligned = recipe.bank_align == "canonical"
        return SampleStore.of_perturbations(
            setup, self.ball.eps, recipe.bank_dtype, aligned=aligned
        )

    def _table(self, setup: TrainingSetup) -> GradientTable:
        num_weights = sum(p.numel() for p in trainable(setup.model))
        size = setup.num_images * num_weights * setup.dtype.itemsize
        if size > _TABLE_LIMIT:
            raise RequestError(
                f"algorithm.mode: T keeps a gradient of {num_weights:,} weights for each of "
                f"{setup.num_images:,} images ({size / 2**30:,.0f} GiB): it is a reference for exact "
                "problems; expected A, B, C, N or J"
            )
        return GradientTable(setup)


@final
class SiHg(Smoothed):
    """A (default):  w_bar = w + theta (w - w_prev);  delta_i <- P(delta_i + sigma dir grad_delta
    f_i(w_bar, delta_i)), m times;  w <- w - lr mean_i grad_w f_i(w, delta_i).

    Semi-implicit hybrid gradients, Kim and Seo, arXiv 2202.10523 (AISTATS 2022). **A reconstruction**:
    of the paper only the abstract and the first page were at hand, and no public code exists. Known
    from there: a minimax over one vector of perturbations for the whole data set, a generalisation of
    SPDHG (stochastic primal-dual hybrid gradients), a rate of O(1/K) where dynamic training and YOPO
    have O(1/K^(1/2)), and a practical variant for networks. Passes, what is carried over, and every
    default are chosen here. Other modes, theta = 1 being the value of PDHG:

    - B: w descends at P(delta + theta (delta - delta_prev)), then delta ascends at the new w; two
      perturbations per image.
    - C: w descends along (1 + theta) g_w(delta') - theta g_w(delta), delta' the ascended one. With
      store=none and a zero start the loss is (1 + theta) f(x + delta') - theta f(x): a *negative*
      weight on the clean loss. Its first ascent step shares the pass of g_w(delta): batch statistics,
      and the smoothed label if there is one.
    - N (theta = 0): plain alternation. J: both gradients at the old point, from one pass.
    - T: SPDHG itself, with a table of every image's last weight gradient: n P numbers, a reference for
      exact problems. Only its variance reduction removes the noise of sampling; do not expect O(1/K)
      of the others.

    On L = w delta with lr sigma = p, the modes A, B and C have the eigenvalues of
    x^2 - (2 - p (1 + theta)) x + (1 - p theta): contraction by sqrt(1 - p) at theta = 1, cycles at
    theta = 0, growth by sqrt(1 + p) in J.

    Cost per image: A, B, N: 2 m + 3 FE; C: 2 m + 4; J: 3; T: 2 m + 4. Memory per image (store=per_sample):
    a perturbation (CIFAR-10: 12,288 bytes in fp32, 6,144 in fp16, 3,072 in int8), in B two; A keeps
    one more copy of the weights, and a second while it looks ahead. Perturbations are stored in the
    frame of the un-augmented image (in that of the batch with bank_align=none). sigma is in pixels for
    ascent=steepest and in pixel^2 per nat, of the per-sample gradient, for raw. Its default is eps/2 for
    m = 1 and eps/4 for more with a memory; 1.25 eps and 2.5 eps / m without one.
    """

    card: ClassVar[Card] = Card(
        paper="Semi-implicit hybrid gradient methods with application to adversarial robustness, Kim and "
        "Seo 2022, arXiv 2202.10523 (a reconstruction: the full text was not at hand)",
        rule="delta_i ascends at w + theta (w - w_prev), remembered per image;  w descends at the new delta",
        cost="A, B, N: 2 m + 3 FE (m=1: 5); C: 2 m + 4; J: 3; T: 2 m + 4",
        memory="a perturbation per image (fp32 4, fp16 2, int8 1 byte per pixel and channel), in B two",
        ranges={
            "mode": Options(("A", "C", "N"), note="B, J as ablations"),
            "theta": Range(0.0, 1.5),
            "m": Options((1, 2, 3, 5)),
            "store": Options(("none", "per_sample")),
            "sigma": (
                Range(1 / 8, 1.5, log=True, unit="eps", when={"ascent": "steepest"}),
                Range(0.001, 10, log=True, unit="pixel^2/nat", when={"ascent": "raw"}),
            ),
            "init": Options(("zero", "uniform"), when={"store": "none"}),
            "shrink": Range(0.5, 1.0, when={"store": "per_sample"}),
            "theta_warmup": Options((0, 1, 3), note="epochs"),
            "attack_bn": Options(("batch_nostat", "eval")),
        },
    )

    name: Literal["si_hg"] = "si_hg"
    mode: Annotated[
        Literal["A", "B", "C", "N", "J", "T"], Field(description="who looks ahead; see the rule")
    ] = "A"
    theta: Annotated[
        float,
        SCHEDULABLE,
        Field(ge=0, allow_inf_nan=False, description="extrapolation; 1 is PDHG's, 0 is N"),
    ] = 1.0
    theta_warmup: Annotated[
        NonNegativeInt, Field(description="epochs over which theta grows to its value")
    ] = 1
    m: Annotated[PositiveInt, Field(description="ascent steps per batch")] = 1
    sigma: Annotated[
        StepSize | None,
        SCHEDULABLE,
        Field(description="ascent step; default: by m and store, see the rule"),
    ] = None
    ascent: Ascent = "steepest"
    store: Annotated[
        Literal["per_sample", "batch_slot", "none"],
        Field(description="what delta is carried over: each image's, each slot's, nothing"),
    ] = "per_sample"
    init: Annotated[
        Literal["zero", "uniform"], Field(description="delta without a store; zero with one")
    ] = "uniform"
    shrink: Annotated[
        float, Field(gt=0, le=1, description="factor on a remembered perturbation when it is read")
    ] = 1.0
    bank_dtype: Annotated[Keep, Field(description="how perturbations are kept")] = "fp16"
    bank_align: Annotated[
        Literal["canonical", "none"],
        Field(description="canonical: perturbations follow crop and flip of their image"),
    ] = "canonical"
    project_bar: Annotated[bool, Field(description="project the extrapolated delta (B)")] = True
    replays: Annotated[PositiveInt, Field(description="updates per batch")] = 1
    attack_bn: AttackBatchNorm = "batch_nostat"
    chunk: Annotated[PositiveInt, Field(description="per-sample gradients at a time (T)")] = 16

    @model_validator(mode="after")
    def _consistent(self) -> SiHg:
        if self.mode == "B" and self.store != "per_sample":
            raise ValueError(
                "mode=B extrapolates remembered perturbations: it needs store=per_sample"
            )
        if self.mode == "J" and self.m != 1:
            raise ValueError("mode=J moves delta once per pass: it needs m=1")
        if self.ascent == "raw" and isinstance(self.sigma, str):
            raise ValueError("sigma is in pixel^2 per nat with ascent=raw: expected a number")
        return self

    @property
    def step_size(self) -> StepSize:
        """sigma, or its default."""
        if self.sigma is not None:
            return self.sigma
        if self.ascent == "raw":
            return 0.1
        if self.store == "none":
            return "1.25*eps" if self.m == 1 else f"2.5*eps/{self.m}"
        return "eps/2" if self.m == 1 else "eps/4"

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> SemiImplicit:
        return SemiImplicit(ball, outer, self.cross_entropy(), self)

    def why_not_displaced(self) -> str | None:
        if self.mode in "CJ":
            return ONE_PASS
        return "its table holds gradients of the weights themselves" if self.mode == "T" else None

    def why_not_weighted(self) -> str | None:
        if self.mode == "C":
            return "an extrapolated gradient is not a mean over samples"
        return "its table holds the samples' own gradients" if self.mode == "T" else None

    def why_not_repeated(self) -> str | None:
        return "its table is a mean over equally frequent images" if self.mode == "T" else None
