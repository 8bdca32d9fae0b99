"""Threat models: sets of allowed perturbations, their projections, steepest directions and FOSC.

Every ball is intersected with the pixel box: x + delta stays in [0, 1]. Formulas per norm, q the
dual exponent:

    steepest(g)  = argmax_{|v|_p <= 1} <v, g>          dual_norm(g) = |g|_q = <steepest(g), g>
    gap(d, g)    = max_{|z|_p <= eps} <z - d, g> = eps |g|_q - <d, g>         (FOSC, Wang et al.
    2019) box_gap      = the same maximum over the ball intersected with the pixel box

The gap is the Frank-Wolfe gap of the loss at d: it bounds, to first order and in nats, what an
attack can still gain. It is zero exactly at a constrained stationary point, for the box gap also
where pixels are saturated.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from raytrain.core.registry import OneOf, Registry
from raytrain.core.types import (
    BatchRandom,
    Delta,
    Images,
    PerSample,
    Pixels,
    Spec,
    over_pixels,
    per_sample_dot,
)


class AbstractThreatModel(Spec):
    """All perturbations of one image with norm at most `eps` that keep its pixels in [0, 1]."""

    autoattack: ClassVar[str | None] = None
    """The word of AutoAttack's code for the norm; None where AutoAttack is not defined."""

    norm: Any  # a literal in each subclass
    eps: Annotated[Pixels, Field(ge=0, description="radius, in pixels of [0, 1]")]

    @abstractmethod
    def norm_of(self, delta: Delta) -> PerSample:
        """|delta_i|_p."""

    @abstractmethod
    def project(self, delta: Delta) -> Delta:
        """The nearest point of the ball (Euclidean), ignoring the box."""

    @abstractmethod
    def steepest(self, grad: Delta) -> Delta:
        """argmax <v, grad_i> over the unit ball; zero where the gradient is zero."""

    @abstractmethod
    def dual_norm(self, grad: Delta) -> PerSample:
        """max <v, grad_i> over the unit ball."""

    @abstractmethod
    def noise(self, like: Images, rng: BatchRandom, purpose: str, radius: float = 1.0) -> Delta:
        """A random perturbation of norm at most `radius * eps`, ignoring the box."""

    @abstractmethod
    def box_vertex(self, grad: Delta, images: Images) -> Delta:
        """argmax <z, grad_i> over the ball intersected with the pixel box."""

    def direction(self, grad: Delta, delta: Delta, images: Images) -> Delta:
        """The unit step of an ascent at `delta`: `steepest` unless a norm overrides it."""
        del delta, images
        return self.steepest(grad)

    def feasible(self, delta: Delta, images: Images) -> Delta:
        """`delta` moved into the ball and then into the pixel box.

        Clipping to the box never lengthens a coordinate, since zero lies in the box: the result is
        in both. For l-inf it is the nearest such point; for l2 and l1 it is a feasible one.
        """
        return in_box(self.project(delta), images)

    @abstractmethod
    def norm_grad(self, delta: Delta) -> Delta:
        """A direction in which |delta_i| grows: a subgradient of the norm, or of every coordinate's own."""

    @abstractmethod
    def diameter(self, num_pixels: int) -> float:
        """The largest norm of a difference of two images of [0, 1]^num_pixels."""

    def per_pixel(self, length: float, num_pixels: int) -> float:
        """The move of each pixel if all move equally and the whole move has norm `length`."""
        return length / self.diameter(num_pixels)

    def gap(self, delta: Delta, grad: Delta) -> PerSample:
        """FOSC on the ball: eps |g|_q - <delta, g>, in nats, >= 0 for feasible delta."""
        return self.eps * self.dual_norm(grad) - per_sample_dot(delta, grad)

    def box_gap(self, delta: Delta, grad: Delta, images: Images) -> PerSample:
        """FOSC on the ball intersected with the pixel box: 0 <= box_gap <= gap."""
        return per_sample_dot(self.box_vertex(grad, images) - delta, grad)


def in_box(delta: Delta, images: Images) -> Delta:
    """`delta` clipped so that images + delta lies in [0, 1].

    The bounds are applied to delta, never recovered from images + delta: (x + d) - x overshoots in
    the last bit.

    >>> in_box(torch.tensor([[[[0.3, -0.3]]]]), torch.tensor([[[[0.75, 0.25]]]])).flatten()
    tensor([ 0.2500, -0.2500])
    """
    return torch.maximum(torch.minimum(delta, 1 - images), -images)


@final
class Linf(AbstractThreatModel):
    """Every pixel moves by at most eps.

    >>> ball = Linf(eps=0.1)
    >>> image, step = torch.tensor([[[[0.05, 0.5, 0.95]]]]), torch.tensor([[[[-1.0, -1.0, 1.0]]]])
    >>> ball.feasible(step, image).flatten()
    tensor([-0.0500, -0.1000,  0.0500])
    >>> ball.gap(torch.zeros_like(image), step), ball.gap(0.1 * step, step)
    (tensor([0.3000]), tensor([0.]))
    """

    autoattack: ClassVar[str | None] = "Linf"

    norm: Literal["linf"] = "linf"

    def norm_of(self, delta: Delta) -> PerSample:
        return delta.flatten(1).abs().amax(1)

    def project(self, delta: Delta) -> Delta:
        return delta.clamp(-self.eps, self.eps)

    def steepest(self, grad: Delta) -> Delta:
        return grad.sign()

    def dual_norm(self, grad: Delta) -> PerSample:
        return grad.flatten(1).abs().sum(1)

    def gap(self, delta: Delta, grad: Delta) -> PerSample:
        # Term by term: every term is >= 0, so rounding cannot make the sum negative.
        return (self.eps * grad.abs() - delta * grad).flatten(1).sum(1)

    def noise(self, like: Images, rng: BatchRandom, purpose: str, radius: float = 1.0) -> Delta:
        unit = 2 * rng.uniform(purpose, *like.shape[1:]).to(like.dtype) - 1
        return radius * self.eps * unit

    def box_vertex(self, grad: Delta, images: Images) -> Delta:
        return in_box(self.eps * grad.sign(), images)

    def norm_grad(self, delta: Delta) -> Delta:
        return delta.sign()  # that of a bound on every pixel, not on the largest alone

    def diameter(self, num_pixels: int) -> float:
        del num_pixels
        return 1.0


@final
class L2(AbstractThreatModel):
    """The Euclidean length of the change is at most eps (128/255 is customary for CIFAR-10).

    >>> L2(eps=1).project(torch.tensor([[[[3.0, 4.0]]]])).flatten()
    tensor([0.6000, 0.8000])
    """

    autoattack: ClassVar[str | None] = "L2"

    norm: Literal["l2"] = "l2"

    def norm_of(self, delta: Delta) -> PerSample:
        return delta.flatten(1).norm(dim=1)

    def project(self, delta: Delta) -> Delta:
        length = self.norm_of(delta)
        outside, one = length > self.eps, torch.ones_like(length)
        # The unused branch divides by one: its derivative must stay finite too.
        scale = torch.where(outside, self.eps / torch.where(outside, length, one), one)
        return delta * over_pixels(scale)

    def steepest(self, grad: Delta) -> Delta:
        # Scaled first: the squares of a confident network's gradients vanish in float32.
        largest = over_pixels(grad.flatten(1).abs().amax(1))
        scaled = torch.where(largest > 0, grad / largest, torch.zeros_like(grad))
        return scaled / over_pixels(self.norm_of(scaled)).clamp_min(1e-30)

    def dual_norm(self, grad: Delta) -> PerSample:
        return self.norm_of(grad)

    def noise(self, like: Images, rng: BatchRandom, purpose: str, radius: float = 1.0) -> Delta:
        # Direction uniform, length uniform (not volume-uniform): the usual random start of l2
        # attacks.
        away = self.steepest(rng.normal(purpose, *like.shape[1:]).to(like.dtype))
        length = rng.uniform(purpose + "/length").to(like.dtype)
        return radius * self.eps * away * over_pixels(length)

    def box_vertex(self, grad: Delta, images: Images) -> Delta:
        """clip(mu g, -x, 1 - x) for the largest mu whose image is no longer than eps, by bisection
        on log mu.

        Optimality: a coordinate is either at its bound or moved in proportion to its gradient
        (KKT).
        """
        wide, pixels = grad.double(), images.double()
        low = wide.new_full((len(grad),), -20.0)  # log10 mu
        high = -low
        for _ in range(70):  # 40 / 2^70 is below one ulp of a float64 near 20
            middle = (low + high) / 2
            fits = self.norm_of(in_box(wide * over_pixels(10**middle), pixels)) <= self.eps
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return in_box(wide * over_pixels(10**low), pixels).to(grad.dtype)

    def norm_grad(self, delta: Delta) -> Delta:
        return delta / (over_pixels(self.norm_of(delta)) + 1e-12)

    def diameter(self, num_pixels: int) -> float:
        return num_pixels**0.5


@final
class L1(AbstractThreatModel):
    """The absolute changes of all pixels add up to at most eps (12 is customary for CIFAR-10).

    >>> L1(eps=2).project(torch.tensor([[[[3.0, -2.0, 0.5]]]])).flatten()
    tensor([ 1.5000, -0.5000,  0.0000])
    """

    autoattack: ClassVar[str | None] = "L1"

    norm: Literal["l1"] = "l1"
    spread: Annotated[
        NonNegativeFloat,
        Field(
            le=1,
            description="share of the pixels that an ascent step moves at once; 0 moves the single best one",
        ),
    ] = 0.05

    def norm_of(self, delta: Delta) -> PerSample:
        return delta.flatten(1).abs().sum(1)

    def project(self, delta: Delta) -> Delta:
        """Soft-thresholding at the level that brings the norm to eps (Duchi et al. 2008, by sorting)."""
        size = delta.flatten(1).abs()
        ordered = size.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - self.eps
        rank = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
        support = (ordered * rank > excess).sum(1, keepdim=True).clamp_min(1)
        level = (excess.gather(1, support - 1) / support).clamp_min(0)
        level = torch.where(size.sum(1, keepdim=True) > self.eps, level, torch.zeros_like(level))
        return (delta.flatten(1).sign() * (size - level).clamp_min(0)).view_as(delta)

    def steepest(self, grad: Delta) -> Delta:
        return _top(grad, 1)

    def dual_norm(self, grad: Delta) -> PerSample:
        return grad.flatten(1).abs().amax(1)

    def direction(self, grad: Delta, delta: Delta, images: Images) -> Delta:
        """Equal moves of the `spread` share of pixels with the largest gradient that can move within
        the box.

        The exact steepest step is one pixel, which is soon at the box; distributing the step over
        several pixels makes l1 attacks effective (Tramer and Boneh 2019, arXiv 1904.13000). Drawback:
        an attack ends on several pixels where the maximum is on few, so FOSC does not fall to 0.
        """
        moved = images + delta
        blocked = ((moved >= 1) & (grad > 0)) | ((moved <= 0) & (grad < 0))
        count = max(1, round(self.spread * grad[0].numel()))
        return _top(grad.masked_fill(blocked, 0), count)

    def noise(self, like: Images, rng: BatchRandom, purpose: str, radius: float = 1.0) -> Delta:
        shape = like.shape[1:]
        size = -torch.log1p(-rng.uniform(purpose, *shape).to(like.dtype))  # exponential
        sign = torch.where(rng.uniform(purpose + "/sign", *shape) < 0.5, -1.0, 1.0).to(like.dtype)
        length = rng.uniform(purpose + "/length").to(like.dtype)
        total = self.norm_of(size).clamp_min(1e-30)
        return radius * self.eps * sign * size * over_pixels(length / total)

    def box_vertex(self, grad: Delta, images: Images) -> Delta:
        """Spend eps on the pixels in order of |gradient|, each as far as the box allows (a knapsack)."""
        flat, pixels = grad.flatten(1), images.flatten(1)
        room = torch.where(flat > 0, 1 - pixels, pixels)
        order = flat.abs().argsort(dim=1, descending=True)
        ordered = room.gather(1, order)
        before = ordered.cumsum(1) - ordered
        spent = torch.minimum(ordered, (self.eps - before).clamp_min(0))
        size = torch.zeros_like(flat).scatter(1, order, spent)
        return (size * flat.sign()).view_as(grad)

    def norm_grad(self, delta: Delta) -> Delta:
        return delta.sign()

    def diameter(self, num_pixels: int) -> float:
        return float(num_pixels)


def _top(grad: Tensor, count: int) -> Tensor:
    """+-1/count on the `count` coordinates of largest magnitude of each row."""
    flat = grad.flatten(1)
    top = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / count).view_as(grad)


THREAT_MODELS = Registry(AbstractThreatModel, "norm")
THREAT_MODELS.register(Linf, L2, L1)

ThreatModel = Annotated[AbstractThreatModel, OneOf(THREAT_MODELS, "linf")]
