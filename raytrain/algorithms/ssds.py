"""SSDS: fast saddle-point dynamics, one ascent step on each image's stored perturbation per epoch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, FiniteFloat, PositiveInt, model_validator
from torch import Tensor

from raytrain.algorithms.base import ONE_PASS, REMEMBERS, AbstractAlgorithm, Smoothed
from raytrain.attacks import Ascent, ascend
from raytrain.core.algorithm_state import Numbers, Stateful, TrainingSetup
from raytrain.core.card import Card, Options, Range
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable
from raytrain.core.losses import AbstractLoss
from raytrain.core.sample_store import Keep, SampleStore
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
    over_pixels,
)
from raytrain.outer import AbstractOuter

_MULTIPLIED = {"budget": "multiplier"}


@final
@dataclass(frozen=True)
class SaddlePoint(AbstractAlgorithm):
    """Descent in theta, ascent in the stored delta, update of the multipliers of the norm constraint."""

    ball: AbstractThreatModel
    outer: AbstractOuter
    objective: AbstractLoss
    recipe: Ssds

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        recipe = self.recipe
        parts = self.outer.memory(setup)
        aligned = recipe.bank_align == "canonical"
        parts["delta"] = SampleStore.of_perturbations(
            setup, self.ball.eps, recipe.bank_dtype, aligned=aligned
        )
        if recipe.budget != "project":
            parts["v"] = SampleStore(
                setup.num_images, (), setup.context, setup.dtype, initial=recipe.v0
            )
        if recipe.budget == "full":
            parts["epigraph"] = Numbers(lam=recipe.lam0, lam_before=recipe.lam0, t=recipe.t0)
        return parts

    def fe_per_image(self, setting: CostSetting) -> float:
        loss, outer, order = self.objective, self.outer, self.recipe.order
        if order == "jacobi":
            visit = loss.update_fe + outer.weights_fe(loss, setting, has_gradient=False)
        else:
            ascended = order == "delta_first"
            visit = outer.update_fe(loss, setting, has_gradient=ascended) + 2 * loss.inner_forwards
        return self.recipe.replays * visit

    def why_not_mixed(self) -> str | None:
        return REMEMBERS

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        first = delta = None
        for replay in range(self.recipe.replays):
            losses, delta = self._visit(state, batch, replay)
            first = losses if first is None else first
        assert first is not None and delta is not None
        return StepResult(first, delta, torch.full_like(batch.labels, self.recipe.replays))

    def replay_key(self, state: TrainState) -> Hashable:
        if self.recipe.budget == "full":
            raise NotReplayable("budget=full moves lambda and t on the host")
        recipe = self.recipe
        return recipe.decay(state.epoch), self.outer.replay_key(state, recipe.replays)

    def measures(self, state: TrainState, batch: Batch) -> dict[str, float]:
        found = super().measures(state, batch)
        if self.recipe.budget == "full":
            numbers = state.part("epigraph", Numbers)
            found |= {"ssds/lambda": numbers["lam"], "ssds/t": numbers["t"]}
        return found

    def _visit(self, state: TrainState, batch: Batch, replay: int) -> tuple[PerSample, Delta]:
        recipe, store = self.recipe, state.part("delta", SampleStore)
        oracle = state.oracle(batch, self.objective, recipe.attack_bn)
        delta = self._contained(store.read(batch), batch)
        point = self._with_noise(delta, batch, replay)
        v = None if recipe.budget == "project" else state.part("v", SampleStore).read(batch)
        decay = recipe.decay(state.epoch)
        if recipe.order == "jacobi":
            state.optimizer.zero_grad(set_to_none=True)
            losses, grad = oracle.both_grads(point, self.outer.weights(state, oracle, point))
            rate = self._multipliers(state, batch, delta, v, losses, decay)
            self.outer.step(state, rate)
            moved = self._moved(batch, delta, grad, v, decay)
        elif recipe.order == "delta_first":
            before, grad = oracle.delta_grad(point)
            moved = self._moved(batch, delta, grad, v, decay)
            rate = self._multipliers(state, batch, delta, v, before, decay)
            point = self._with_noise(moved, batch, replay)
            losses = self.outer.update(state, oracle, point, rate=rate)
        else:
            rate = self._lam(state)
            losses = self.outer.update(state, oracle, point, rate=rate)
            _, grad = oracle.delta_grad(point)
            moved = self._moved(batch, delta, grad, v, decay)
            self._multipliers(state, batch, delta, v, losses, decay)
        store.write(batch, moved)
        return losses, point

    # ---------------------------------------------------------------- delta

    def _moved(
        self, batch: Batch, delta: Delta, grad: Delta, v: Tensor | None, decay: float
    ) -> Delta:
        """delta + sigma dir(g - (v / c1) d|delta|), in the ball and the pixel box."""
        recipe = self.recipe
        if v is not None:
            grad = grad - over_pixels(v / recipe.c1) * self.ball.norm_grad(delta)
        size = decay * in_pixels(recipe.step_size, self.ball.eps)
        return self._contained(
            ascend(self.ball, delta, grad, batch.images, size, recipe.ascent), batch
        )

    def _contained(self, delta: Delta, batch: Batch) -> Delta:
        if self.recipe.clamp_delta:
            return self.ball.feasible(delta, batch.images)
        return in_box(delta, batch.images)

    def _with_noise(self, delta: Delta, batch: Batch, replay: int) -> Delta:
        if not self.recipe.noise:
            return delta
        noise = self.ball.noise(batch.images, batch.rng, f"noise/{replay}")
        return self._contained(delta + noise, batch)

    # ---------------------------------------------------------------- multipliers

    def _lam(self, state: TrainState) -> float:
        return state.part("epigraph", Numbers)["lam"] if self.recipe.budget == "full" else 1.0

    def _multipliers(
        self,
        state: TrainState,
        batch: Batch,
        delta: Delta,
        v: Tensor | None,
        losses: PerSample,
        decay: float,
    ) -> float:
        """Move v, t and lambda at the old delta; returns lambda, the factor on the learning rate."""
        if v is None:
            return 1.0
        recipe = self.recipe
        excess = self.ball.norm_of(delta) - self.ball.eps
        grown = (v + decay * recipe.alpha * excess).clamp_min(0)
        state.part("v", SampleStore).write(batch, grown)
        if recipe.budget != "full":
            return 1.0
        sums = torch.stack([losses.sum(), (grown * excess).sum(), losses.new_tensor(len(losses))])
        total, slack, count = state.context.total(sums.double()).tolist()
        numbers = state.part("epigraph", Numbers)
        numbers.update(recipe.epigraph(numbers, total / count, slack, count, decay))
        return numbers["lam"]


@final
class Ssds(Smoothed):
    """delta_i <- P(delta_i + sigma dir grad_delta f_i(w, delta_i));
    w <- w - lr mean_i grad_w f_i(w, delta_i): one step each, delta_i stored for every image.

    Esfandiari et al., a fast saddle-point dynamical system approach to robust deep learning, arXiv
    1910.08623: of the paper its abstracts and the released code with its history were at hand, not the
    tables. The saddle point is that of t + lambda (f - t - sum_i v_i (|delta_i| - eps)).

    Orders: `delta_first` alternates (5 FE per image); `w_first` likewise, the ascent at the new
    weights; `jacobi` takes both gradients at the old point. The released code is simultaneous although
    the paper stresses alternation, and computes the same point twice (6 FE); one fused pass is enough
    (3 FE, the cost of natural training).
    Budgets: `project` (the code's NOLAG) only projects. `multiplier` (NOLAM) adds v_i <- [v_i + alpha
    (|delta_i| - eps)]^+ and the drag -(v_i / c1) d|delta_i| on the gradient; in l-inf d|delta_i| is
    sign(delta_i), as in the code: that of a bound on every pixel, not on the largest alone. With
    clamp_delta the norm never exceeds eps, so v only falls and the drag vanishes. `full` adds
    t <- t + alpha (lambda - 1) and lambda <- [lambda + (alpha / c2)(f - t - S)]^+,
    S = mean_i v_i (|delta_i| - eps) over the batch (in the released code the sum); lambda multiplies
    the learning rate. `lam_mode=released` is lambda + (alpha / c2) f - t - S, as the code's operator
    precedence has it, which cycles for ever with mean 1; `plain` is the line above, which cycles more
    slowly; `extrapolated` uses 2 lambda - lambda_before in t's place and settles.

    sigma belongs to the gradient of each sample's own loss (the released code moves by alpha / B along
    the gradient of the batch's mean, so that its step depends on the batch size). In pixels for
    ascent=steepest, in pixel^2 per nat for raw. Memory per image: a perturbation (CIFAR-10 fp32: 12,288
    bytes; raw steps need fp32) and 4 bytes for v.

    The preset `released` has the code's numbers in pixel space, those of batches of 128: simultaneous,
    raw, sigma 2/128, all multipliers, its decay of sigma and alpha, and perturbations that do not
    follow the crop of their image (bank_align=none). Deviations from the code:

    - delta is clipped to the pixel box too, as in every algorithm here: x + delta is an image, and
      delta the perturbation that was trained on. The code clips delta to the ball alone and the image
      to the box, clamp(x + delta, 0, 1), inside the graph. Away from black and white both are the
      same. Where that clamp is active the pixel has no gradient in the code, only the drag moves it,
      and |delta_i| includes what is clipped from the image; here it does not, so that v_i, S, lambda and t
      take another path on saturated pixels.
    - The decay is exp(-e/1000) at e = 100, 200, ..., in force from epoch e on, counted from 0. In the
      code it comes at the end of epoch e, and stops once alpha <= 1e-4: alpha stays at 5.5e-5 from
      epoch 1401 on there, and falls further from epoch 1500 on here. In the version that was read
      (146fbe6) only the trainer's copy of the step decays, and the attacker's copy, which is the one
      that moves delta, v, t and lambda, stays at 2: sigma_decay=1 computes that.
    - The fused pass moves BatchNorm's running statistics once per batch; the code's two passes at the
      same point move them twice.
    - `noise` fills the ball. The code's noise, for MNIST, is U(-0.9 eps, 0.9 eps), and pixels whose
      delta plus noise is clipped have no gradient; here the gradient is that at the clipped point.
    - Not taken over: the code's normalised images, to which it applies eps and the clipping as if they
      were pixels; fixed minibatches whose last 80 images are never seen; the end of training once
      training accuracy rises by less than 0.001 percentage points in an epoch.
    """

    card: ClassVar[Card] = Card(
        paper="A fast saddle-point dynamical system approach to robust deep learning, Esfandiari et al. "
        "2021, arXiv 1910.08623",
        rule="one ascent on the remembered delta_i against one descent on w, per visit",
        cost="delta_first, w_first: 5 FE; jacobi: 3",
        memory="a perturbation per image (fp32: 4 bytes per pixel and channel), 4 bytes for v",
        ranges={
            "order": Options(("delta_first", "jacobi")),
            "ascent": Options(("steepest", "raw")),
            "sigma": (
                Range(1 / 32, 1, log=True, unit="eps", when={"ascent": "steepest"}),
                Range(0.001, 10, log=True, unit="pixel^2/nat", when={"ascent": "raw"}),
            ),
            "sigma_decay": Range(0.3, 1.0, unit="per 100 epochs"),
            "budget": Options(("project", "multiplier")),
            "v0": Range(0.01, 10, log=True, when=_MULTIPLIED),
            "c1": Range(1, 1000, log=True, when=_MULTIPLIED),
            "clamp_delta": Options((True, False), when=_MULTIPLIED),
            "replays": Options((1, 2, 4)),
            "bank_align": Options(("canonical", "none")),
        },
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "order": "jacobi",
            "ascent": "raw",
            "sigma": 2 / 128,
            "sigma_decay": "released",
            "budget": "full",
            "lam_mode": "released",
            "alpha": 2.0,
            "v0": 1.0,
            "lam0": 4.0,
            "t0": 1.0,
            "c1": 100 / 128,  # beside the mean gradient of 128 samples it is 100
            "c2": 100.0,
            "clamp_delta": True,
            "bank_align": "none",
            "attack_bn": "train",
        }
    }

    name: Literal["ssds"] = "ssds"
    preset: Annotated[
        Literal["released"] | None, Field(description="the released code's numbers, in pixels")
    ] = None
    order: Annotated[
        Literal["delta_first", "w_first", "jacobi"], Field(description="who moves first, or both")
    ] = "delta_first"
    sigma: Annotated[
        StepSize | None,
        SCHEDULABLE,
        Field(description="ascent step; default: eps/4, with raw 0.1 pixel^2/nat"),
    ] = None
    ascent: Ascent = "steepest"
    sigma_decay: Annotated[
        Literal["released"] | Annotated[FiniteFloat, Field(gt=0)],
        Field(
            description="factor on sigma and alpha per 100 epochs; released: exp(-e/1000) at each"
        ),
    ] = 1.0
    budget: Annotated[
        Literal["project", "multiplier", "full"], Field(description="what keeps delta in the ball")
    ] = "project"
    clamp_delta: Annotated[
        bool, Field(description="project on the ball beside the multipliers too")
    ] = True
    v0: Annotated[FiniteFloat, Field(ge=0, description="first multiplier of each image")] = 1.0
    alpha: Annotated[FiniteFloat, Field(gt=0, description="step of v, t and lambda")] = 2.0
    c1: Annotated[FiniteFloat, Field(gt=0, description="scale of the drag v / c1")] = 100.0
    c2: Annotated[FiniteFloat, Field(gt=0, description="scale of lambda's step")] = 100.0
    lam_mode: Annotated[
        Literal["released", "plain", "extrapolated"], Field(description="how lambda and t move")
    ] = "extrapolated"
    lam0: Annotated[FiniteFloat, Field(ge=0, description="lambda at the start")] = 1.0
    t0: Annotated[FiniteFloat, Field(description="t at the start")] = 0.0
    noise: Annotated[
        bool, Field(description="fresh noise of the ball at every visit, on top of delta (MNIST)")
    ] = False
    replays: Annotated[PositiveInt, Field(description="visits of each batch in a row")] = 1
    bank_dtype: Annotated[Keep, Field(description="how perturbations are kept")] = "fp32"
    bank_align: Annotated[
        Literal["canonical", "none"],
        Field(description="canonical: perturbations follow crop and flip of their image"),
    ] = "canonical"
    attack_bn: AttackBatchNorm = "batch_nostat"

    @model_validator(mode="after")
    def _consistent(self) -> Ssds:
        if self.ascent == "raw" and isinstance(self.sigma, str):
            raise ValueError("sigma is in pixel^2 per nat with ascent=raw: expected a number")
        if self.bank_dtype == "int8" and not self.clamp_delta and self.budget != "project":
            raise ValueError(
                "bank_dtype=int8 holds what is in the ball: it needs clamp_delta=true"
            )
        return self

    def decay(self, epoch: int) -> float:
        """The factor on sigma and alpha in this epoch, from 0."""
        if self.sigma_decay == "released":
            passed = range(100, epoch + 1, 100)
            return math.exp(-0.001 * sum(passed))
        return self.sigma_decay ** (epoch / 100)

    @property
    def step_size(self) -> StepSize:
        """sigma, or its default."""
        if self.sigma is not None:
            return self.sigma
        return 0.1 if self.ascent == "raw" else "eps/4"

    def epigraph(
        self, now: Mapping[str, float], loss: float, slack: float, count: float, decay: float
    ) -> dict[str, float]:
        """lambda and t after one step: `loss` is f, `slack` S over the batch of `count` samples."""
        alpha, lam, t = decay * self.alpha, now["lam"], now["t"]
        if self.lam_mode == "released":
            t = t + alpha * (lam - 1)
            new = lam + alpha / self.c2 * loss - t - slack
        else:
            towards = 2 * lam - now["lam_before"] if self.lam_mode == "extrapolated" else lam
            t = t + alpha * (towards - 1)
            new = lam + alpha / self.c2 * (loss - t - slack / count)
        return {"lam": max(0.0, new), "lam_before": lam, "t": t}

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> SaddlePoint:
        return SaddlePoint(ball, outer, self.cross_entropy(), self)

    def why_not_displaced(self) -> str | None:
        return ONE_PASS if self.order == "jacobi" else None
