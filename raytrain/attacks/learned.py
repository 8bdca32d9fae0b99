"""A learned attacker: a small recurrent network that turns input gradients into steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from raytrain.attacks.ascent import AttackResult
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import BatchNorm, Delta, Spec, StepSize, in_pixels, per_sample_dot

_CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
}
_TINY_LOG = 10.0  # p of the `logsign` features: gradients below e^-p are given by their size

Memory = list[Any]  # of one attack: each layer's hidden state


class AttackerSpec(Spec):
    """o = readout(cell(features(g))) + direct * features(g);  step = scale * squash(o).

    One network for all coordinates: the move of a pixel depends on its own gradient and its own earlier
    gradients (Andrychowicz et al. 2016, arXiv 1606.04474). `cell=linear` has no memory. init=pgd
    makes the step scale * sign(g) exactly, whatever the cell.
    """

    cell: Annotated[
        Literal["lstm", "gru", "rnn", "linear"], Field(description="linear has no memory")
    ] = "lstm"
    hidden: Annotated[PositiveInt, Field(description="units per layer and pixel")] = 10
    layers: Annotated[PositiveInt, Field(description="cells on top of one another")] = 1
    features: Annotated[
        Literal["rms", "linf", "sign", "logsign", "raw"],
        Field(description="how a gradient is presented: by its rms, its largest, its sign, ..."),
    ] = "rms"
    squash: Annotated[
        Literal["tanh", "hardtanh", "linear"],
        Field(description="what bounds a step; linear: nothing does"),
    ] = "tanh"
    scale: Annotated[StepSize, Field(description="largest move of a pixel in one step")] = "eps/4"
    init: Annotated[
        Literal["random", "pgd"], Field(description="pgd: begins as PGD; needs features=sign")
    ] = "random"
    readout_scale: Annotated[PositiveFloat, Field(description="factor on the first readout")] = 0.1

    @model_validator(mode="after")
    def _pgd_needs_signs(self) -> AttackerSpec:
        if self.init == "pgd" and self.features != "sign":
            raise ValueError("init=pgd needs features=sign")
        return self


class Attacker(nn.Module):
    """The network of an `AttackerSpec`; 531 weights and the direct one by default."""

    def __init__(self, spec: AttackerSpec) -> None:
        super().__init__()
        self.spec = spec
        width = 2 if spec.features == "logsign" else 1
        layers = spec.layers if spec.cell in _CELLS else 0
        self.cells = nn.ModuleList(
            _CELLS[spec.cell](width if layer == 0 else spec.hidden, spec.hidden)
            for layer in range(layers)
        )
        self.readout = nn.Linear(spec.hidden if layers else width, 1)
        self.direct = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.readout.weight.mul_(spec.readout_scale)
            self.readout.bias.zero_()
            if spec.init == "pgd":
                # tanh(20) is 1 to the last bit with a slope of 0: such an attacker does not learn.
                self.readout.weight.zero_()
                self.direct.fill_(20.0 if spec.squash == "tanh" else 1.0)

    @classmethod
    def seeded(cls, spec: AttackerSpec, seed: int) -> Attacker:
        """A new attacker, a function of spec and seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(spec)

    def forward(self, grad: Delta, memory: Memory) -> tuple[Delta, Memory]:
        """Steps in [-1, 1] (unbounded if linear) for input gradients, and the memory after them."""
        features = self._features(grad)
        hidden, after = features, []
        for cell, before in zip(self.cells, memory or [None] * len(self.cells), strict=True):
            after.append(cell(hidden, before))
            hidden = after[-1][0] if isinstance(cell, nn.LSTMCell) else after[-1]
        out = self.readout(hidden).squeeze(1) + features @ self.direct
        if self.spec.squash == "tanh":
            out = out.tanh()
        elif self.spec.squash == "hardtanh":
            # At exactly the bound the slope is that of the inside, unlike that of torch's clamp.
            out = torch.where(out.abs() <= 1, out, out.detach().sign())
        return out.view_as(grad), after

    def _features(self, grad: Delta) -> Float[Tensor, "coordinates width"]:
        kind, flat = self.spec.features, grad.flatten(1)
        if kind == "raw":
            return flat.reshape(-1, 1)
        if kind == "sign":
            return flat.sign().reshape(-1, 1)
        if kind == "logsign":
            size = flat.abs().clamp_min(1e-30).log() / _TINY_LOG
            tiny = size < -1
            first = torch.where(tiny, -torch.ones_like(size), size)
            second = torch.where(tiny, flat * torch.e**_TINY_LOG, flat.sign())
            return torch.stack([first, second], dim=-1).reshape(-1, 2)
        largest = flat.abs().amax(1, keepdim=True)
        scaled = flat / torch.where(largest > 0, largest, torch.ones_like(largest))
        if kind == "rms":
            rms = scaled.square().mean(1, keepdim=True).sqrt()
            scaled = scaled / torch.where(rms > 0, rms, torch.ones_like(rms))
        return scaled.reshape(-1, 1)


class LearnedAscent(Spec):
    """delta <- P(delta + scale * m(g(delta), memory)), `steps` times, m the attacker.

    While learning, the attacker ascends sum_t w_t f(delta_t). With its inputs held fixed, the gradient
    of that sum is the one of sum_t w_t <g(delta_t), delta_t>, and the next step
    needs g(delta_t) anyway: the meta-gradient costs no pass through the classifier.
    """

    steps: PositiveInt
    bn: BatchNorm
    weighting: Literal["t", "uniform", "last"]
    projection: Literal["hard", "straight_through"]
    truncate: PositiveInt | None

    def maximise(
        self,
        oracle: Oracle,
        ball: AbstractThreatModel,
        delta: Delta,
        attacker: Attacker,
        learn: bool,
    ) -> AttackResult:
        """Ascend from `delta`; with `learn`, add the descent direction of the attacker to its p.grad."""
        size = self._size(ball, delta, attacker)
        weights = self._weights()
        memory: Memory = []
        images, count = oracle.batch.images, len(delta)
        with oracle.attacking(), torch.set_grad_enabled(learn):
            _, grad = oracle.delta_grad(delta)
            gain: Tensor | None = None
            for step in range(1, self.steps + 1):
                move, memory = attacker(grad, memory)
                delta = self._projected(ball, delta + size * move, images)
                if step == self.steps and not learn:
                    break  # the last gradient is not used
                _, grad = oracle.delta_grad(delta.detach())
                if not learn:
                    continue
                term = weights[step - 1] * per_sample_dot(delta, grad).sum() / count
                gain = term if gain is None else gain + term
                if step == self.steps or (self.truncate and step % self.truncate == 0):
                    if gain.requires_grad:
                        (-gain).backward()
                    gain, delta = None, delta.detach()
                    memory = [_detached(state) for state in memory]
        taken = torch.full((count,), self.steps, device=delta.device)
        return AttackResult(delta.detach(), taken)

    def _size(self, ball: AbstractThreatModel, delta: Delta, attacker: Attacker) -> float:
        """A pixel's largest move; in l2 such that a step of all pixels together is `scale` long."""
        size = in_pixels(attacker.spec.scale, ball.eps)
        return ball.per_pixel(size, delta[0].numel())

    def _weights(self) -> list[float]:
        raw = {
            "t": [float(t) for t in range(1, self.steps + 1)],
            "uniform": [1.0] * self.steps,
            "last": [0.0] * (self.steps - 1) + [1.0],
        }[self.weighting]
        return [weight / sum(raw) for weight in raw]

    def _projected(self, ball: AbstractThreatModel, delta: Delta, images: Tensor) -> Delta:
        inside = ball.feasible(delta, images)
        if self.projection == "hard":
            return inside
        # The value of the projection with the slope of the identity.
        return inside.detach() + (delta - delta.detach())


def _detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
