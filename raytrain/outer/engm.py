"""ENGM: bounds on the weight-gradient norm of every example of a batch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from raytrain.core.algorithm_state import Stateful, TrainingSetup
from raytrain.core.card import Card, Options, Range
from raytrain.core.cost import CostSetting
from raytrain.core.losses import AbstractLoss
from raytrain.core.oracle import Oracle, Weigh
from raytrain.core.train_state import TrainState
from raytrain.core.types import Delta, Number, PerSample
from raytrain.outer.base import AbstractOuter

_FLOOR = 1e-6  # a fitted line with a negative intercept would predict negative norms
_KEEP = 0.9  # of the running quantile, from one batch to the next

_FITTED = {"estimator": ("affine", "loss")}

Scalar = Float[Tensor, ""]


class EngmMemory:
    """Fit of weight-gradient norms and running threshold: the same on every worker."""

    def __init__(self, device: torch.device) -> None:
        self.counts = {"updates": 0, "samples": 0}  # the latter of this epoch
        self.values: dict[str, Scalar] = {}  # gamma1, gamma0, alpha, once they are known
        self.clipped = torch.zeros((), dtype=torch.float64, device=device)  # samples, this epoch

    def state_dict(self) -> dict[str, Any]:
        values = {name: value.clone() for name, value in self.values.items()}
        return {"updates": self.counts["updates"], **values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts["updates"] = state["updates"]
        device = self.clipped.device
        self.values = {k: v.to(device).clone() for k, v in state.items() if k != "updates"}

    def blend(self, name: str, new: Scalar, keep: float) -> Scalar:
        """Move a running average towards `new`; the first value is `new` itself."""
        old = self.values.get(name)
        return self.put(name, new if old is None else keep * old + (1 - keep) * new)

    def put(self, name: str, value: Scalar) -> Scalar:
        """Set a value, in place if there is one."""
        self.values.setdefault(name, torch.empty_like(value)).copy_(value)
        return self.values[name]


@final
class Engm(AbstractOuter):
    """w_i = min(1, alpha / s_i), s_i = |grad_theta f_i|;
    theta <- optimizer(theta, mean_i w_i grad f_i).

    Example-normalised gradient descent with momentum, Dabouei et al. 2022, arXiv 2209.01199. **A
    reconstruction**: the full text was not at hand. The abstract states that every example's
    contribution to the mean gradient is regularised and that the correlation of weight-gradient and
    input-gradient norms saves the cost. The clipped form above, the affine estimate and all defaults
    are chosen here; `mode=normalise` is the other reading, w_i = alpha / s_i.

    f_i is the whole per-sample training loss, without weight decay; the norm is one l2 norm over all
    weights. sum_i w_i grad f_i is the gradient of sum_i w_i f_i with w_i held fixed, so no
    per-sample gradient has to be kept: `chunk` of them exist at a time, and only while norms are
    measured. How s_i is found (`estimator`):

    - exact: every sample's gradient, one forward and backward more, 3 FE;
    - affine (A-ENGM): s_i = gamma1 r_i + gamma0 from the input-gradient norm r_i, the line fitted to
      exact norms every `tau` updates and blended with the one before by `mu`. The least squares are
      over all workers' samples. A negative slope falls back to a line through the origin. No estimate
      is below 1e-6, as a line with a negative intercept would have it; with mode=normalise none on a
      line goes below the smallest of the last exact norms;
    - input (N-ENGM): s_i = kappa r_i, nothing fitted;
    - loss: as affine, with the loss itself for r_i: it costs nothing between fits.

    r_i is taken where the weight gradient is (`gradient=fresh`), or is the attack's last input
    gradient (`reuse`): free, one step stale, and of the attack's objective. It is the gradient for the
    perturbed image: the clean branch of trades and mart and the penalty of gradalign do not enter,
    while s_i is of the whole loss. mode=normalise divides by s_i + 1e-12. Norms are measured in
    eval mode, where samples are independent; probe_bn=train measures both norms through the batch's own
    statistics, where the exact one costs a whole backward per sample and the input gradient only its
    backward. A small alpha at an unchanged learning rate mostly lowers the learning rate: search
    both, or set `renorm`, which brings the mean weight back to one.
    """

    card: ClassVar[Card] = Card(
        paper="Revisiting outer optimization in adversarial training, Dabouei et al. 2022, "
        "arXiv 2209.01199 (a reconstruction from its abstract)",
        rule="w_i = min(1, alpha / s_i), s_i = |grad f_i|;  theta <- optimizer(theta, mean w_i grad f_i)",
        cost="exact: +3 FE; affine: +2 FE and 3 / tau (reuse or loss: 3 / tau); input: +2 FE (reuse: 0); "
        "with trades and mart 6 for 3 and 3 for 2",
        memory="none per image; a few numbers",
        ranges={
            "alpha": Range(0.3, 50, log=True, note="together with optimizer.lr"),
            "quantile": Range(0.3, 0.95, note="instead of alpha"),
            "mode": Options(("clip", "normalise")),
            "renorm": Options((True, False), when={"mode": "clip"}),
            "estimator": Options(("exact", "affine", "input", "loss")),
            "tau": Range(1, 500, log=True, when=_FITTED),
            "mu": Range(0, 0.95, when=_FITTED),
            "fit": Options(("affine", "loglog"), when=_FITTED),
        },
    )

    name: Literal["engm"] = "engm"
    alpha: Annotated[
        Number, Field(gt=0, description="largest norm an example may have; inf: plain sgd")
    ] = 5.0
    quantile: Annotated[
        float | None,
        Field(gt=0, lt=1, description="alpha follows this quantile of the norms instead"),
    ] = None
    mode: Annotated[
        Literal["clip", "normalise"], Field(description="min(1, alpha / s), or alpha / s for all")
    ] = "clip"
    renorm: Annotated[bool, Field(description="scale the weights to mean one")] = False
    estimator: Annotated[
        Literal["exact", "affine", "input", "loss"], Field(description="how norms are found")
    ] = "affine"
    fit: Annotated[
        Literal["affine", "loglog"],
        Field(description="a line for the norms, or for their logarithms (better at small alpha)"),
    ] = "affine"
    tau: Annotated[PositiveInt, Field(description="updates between exact measurements")] = 50
    mu: Annotated[
        float, Field(ge=0, lt=1, description="share of the old fit that is kept at a new one")
    ] = 0.7
    kappa: Annotated[PositiveFloat, Field(description="norm per input norm (estimator=input)")] = (
        1.0
    )
    gradient: Annotated[
        Literal["fresh", "reuse"],
        Field(
            description="the input gradient: where training is, or the attack's last, if it has one"
        ),
    ] = "fresh"
    probes: Annotated[
        PositiveInt | None,
        Field(description="samples of the global batch measured exactly; default: all"),
    ] = None
    chunk: Annotated[
        PositiveInt, Field(description="per-sample gradients held at a time; 1: no vmap")
    ] = 16
    probe_bn: Annotated[
        Literal["eval", "train"], Field(description="BatchNorm while norms are measured")
    ] = "eval"

    @model_validator(mode="after")
    def _has_a_threshold(self) -> Engm:
        if self.mode == "normalise" and self.alpha == float("inf") and self.quantile is None:
            raise ValueError("mode=normalise needs a finite alpha")
        if self.mode == "normalise" and self.renorm:
            raise ValueError(
                "renorm needs mode=clip: the mean of alpha / s is that of the smallest norm"
            )
        return self

    @property
    def weighs_samples(self) -> bool:
        return True

    def memory(self, setup: TrainingSetup) -> dict[str, Stateful]:
        return {"engm": EngmMemory(setup.context.device)}

    def replay_key(self, state: TrainState, updates: int = 1) -> Hashable:
        memory = state.part("engm", EngmMemory)
        wait = -memory.counts["updates"] % self.tau  # updates before the next exact measurement
        return wait if wait < updates else None, tuple(memory.values)

    def weights(
        self, state: TrainState, oracle: Oracle, delta: Delta, given: PerSample | None = None
    ) -> PerSample | Weigh | None:
        bn = "eval" if self.probe_bn == "eval" else "batch_nostat"

        def from_norms(predictor: PerSample) -> PerSample:
            norms = self._fitted(state, oracle, delta, predictor)
            return self._of(norms, state, given)

        if self.estimator == "exact":
            return self._of(self._exact(oracle, delta, len(delta)), state, given)
        if self.estimator == "loss":
            return lambda losses, input_grads: from_norms(losses)
        if self.gradient == "reuse" and oracle.latest is not None:
            return from_norms(_norms(oracle.latest))
        if bn == "eval":
            return from_norms(_norms(oracle.outer_grad(delta, bn)[1]))
        # The training pass computes the input gradient too: no forward more.
        return lambda losses, input_grads: from_norms(_norms(input_grads()))

    def weights_fe(
        self,
        loss: AbstractLoss,
        setting: CostSetting,
        *,
        has_gradient: bool,
        input_gradient: float = 1.0,
    ) -> float:
        if self.estimator == "exact":
            return self._exact_fe(loss, setting, setting.batch_size // setting.workers)
        if self.estimator == "loss" or (self.gradient == "reuse" and has_gradient):
            predictor = 0.0
        elif self.probe_bn == "eval":
            predictor = loss.outer_forwards + loss.nested_gradients + 1.0
        else:
            predictor = input_gradient
        if self.estimator == "input":
            return predictor
        probes = self._probes(setting.batch_size // setting.workers, setting.workers)
        return predictor + self._exact_fe(loss, setting, probes) / self.tau

    def _exact_fe(self, loss: AbstractLoss, setting: CostSetting, probes: int) -> float:
        """Per image, of a measurement of the norms of so many samples of one worker."""
        if self.probe_bn == "eval":
            return loss.update_fe * probes * setting.workers / setting.batch_size
        backward = 2.0 * (loss.outer_forwards + loss.nested_gradients)
        return loss.outer_forwards + loss.nested_gradients + backward * probes

    def _probes(self, batch: int, workers: int) -> int:
        """Samples of one worker's batch that are measured."""
        return batch if self.probes is None else min(batch, -(-self.probes // workers))

    def measures(self, state: TrainState) -> dict[str, float]:
        memory = state.part("engm", EngmMemory)
        count = memory.clipped.new_full((), memory.counts["samples"])
        clipped, count = state.context.total(torch.stack([memory.clipped, count])).tolist()
        memory.clipped.zero_()
        memory.counts["samples"] = 0
        found = {f"engm/{name}": float(value) for name, value in memory.values.items()}
        found.pop("engm/floor", None)
        return {"engm/clipped": clipped / max(1.0, count), **found}

    def _of(self, norms: PerSample, state: TrainState, given: PerSample | None) -> PerSample:
        """The weights for these norms of the unweighted losses."""
        memory, context = state.part("engm", EngmMemory), state.context
        norms = norms if given is None else norms * given
        alpha = norms.new_full((), self.alpha)
        if self.quantile is not None:
            now = context.gather(norms).double().quantile(self.quantile)
            alpha = memory.blend("alpha", now, _KEEP).to(norms.dtype)
        if self.mode == "clip":
            weights = (alpha / norms).clamp(max=1)
            weights = torch.where(norms > 0, weights, torch.ones_like(weights))
            memory.clipped += (weights < 1).sum()
        else:
            weights = alpha / (norms + 1e-12)
        memory.counts["samples"] += len(norms)
        if self.renorm:
            count = weights.new_full((), len(weights))
            sums = context.total(torch.stack([weights.sum(), count]))
            weights = weights * sums[1] / sums[0]
        return weights if given is None else weights * given

    def _fitted(
        self, state: TrainState, oracle: Oracle, delta: Delta, predictor: PerSample
    ) -> PerSample:
        """Predict norms of the weight gradients from one number per sample."""
        if self.estimator == "input":
            return self.kappa * predictor
        memory = state.part("engm", EngmMemory)
        if memory.counts["updates"] % self.tau == 0:
            self._refit(memory, state, oracle, delta, predictor)
        memory.counts["updates"] += 1
        slope, intercept = memory.values["gamma1"], memory.values["gamma0"]
        predicted = slope * self._scale(predictor) + intercept
        norms = predicted.exp() if self.fit == "loglog" else predicted
        if self.mode == "normalise" and self.fit == "affine" and "floor" in memory.values:
            norms = norms.clamp_min(memory.values["floor"])
        return norms.clamp_min(_FLOOR).to(predictor.dtype)

    def _refit(
        self,
        memory: EngmMemory,
        state: TrainState,
        oracle: Oracle,
        delta: Delta,
        predictor: PerSample,
    ) -> None:
        """Least squares of exact norms on the predictor, over all workers' probes: a collective."""
        norms = self._exact(oracle, delta, self._probes(len(delta), state.context.world))
        memory.put("floor", state.context.gather(norms).double().min())
        s = self._scale(norms)
        r = self._scale(predictor[: len(s)])
        ones = torch.ones_like(r)
        sums = torch.stack([one.sum() for one in (ones, r, s, r * s, r * r)])
        count, sum_r, sum_s, sum_rs, sum_rr = state.context.total(sums).unbind()
        spread = count * sum_rr - sum_r**2
        slope = (count * sum_rs - sum_r * sum_s) / spread
        good = (spread > 1e-12 * count * sum_rr) & (slope > 0)
        if self.fit == "affine":
            fallback, through = sum_rs / sum_rr.clamp_min(1e-30), torch.zeros_like(slope)
        else:
            fallback, through = torch.ones_like(slope), (sum_s - sum_r) / count
        gamma1 = torch.where(good, slope, fallback)
        gamma0 = torch.where(good, (sum_s - gamma1 * sum_r) / count, through)
        memory.blend("gamma1", gamma1, self.mu)
        memory.blend("gamma0", gamma0, self.mu)

    def _scale(self, values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        exact = values.double()
        return exact.clamp_min(1e-12).log() if self.fit == "loglog" else exact

    def _exact(self, oracle: Oracle, delta: Delta, count: int) -> Float[Tensor, " k"]:
        bn = "eval" if self.probe_bn == "eval" else "batch_nostat"
        chunks = oracle.sample_grads(delta, bn, self.chunk, count)
        # By map, which frees a chunk before the next is computed.
        return torch.cat(list(map(_joint_norms, chunks)))


def _joint_norms(grads: list[Tensor]) -> PerSample:
    """The l2 norm over all weights of each sample's gradient."""
    return torch.stack([_norms(grad) for grad in grads], dim=1).norm(dim=1)


def _norms(values: Tensor) -> PerSample:
    return values.reshape(len(values), -1).norm(dim=1)
