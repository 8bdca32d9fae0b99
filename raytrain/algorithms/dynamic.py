"""Dynamic adversarial training: the convergence of attacks, measured by FOSC, increases during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from raytrain.algorithms.base import Iterated, Smoothed
from raytrain.algorithms.nested import Nested
from raytrain.attacks import Gap
from raytrain.core.card import Card, Options, Range
from raytrain.core.registry import OneOf
from raytrain.core.schedules import SHAPES, AbstractShape, Power
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import SCHEDULABLE, Number
from raytrain.outer import AbstractOuter

_PAPER = {
    "steps": 10,
    "step_size": "eps/4",
    "c_max": 0.5,
    "decay": {"kind": "power", "end": 100 / 120, "exponent": 1.0},
    "over": "ball",
    "anchor": "natural",
    "weighting": "none",
    "per": "epoch",
    "start": "uniform",
    "attack_bn": "eval",
    "compact": True,
}


@final
class Dynamic(Smoothed, Iterated):
    """PGD that stops for sample i once FOSC(delta_i) <= c_t;  c_t = c_max (1 - t/T')^+ falls to 0.

    Wang et al. 2019 (arXiv 2112.08304), algorithm 1 and section 4. Every sample takes at least one
    step. Cost: a sample that stops after s of K steps needs min(s + 1, K) gradients, because its
    FOSC is computed from the gradient that its next step would use. No per-sample state.

    Two presets, each a set of defaults for 120 epochs with T' = 100. `paper` is the algorithm as
    printed: FOSC anchored at the natural image, stopped samples are removed from the batch, mean
    cross-entropy. `official` is what the released code computes: FOSC anchored at the random start
    (of random sign near zero), and from the second epoch on every sample weighted by its own adversarial
    loss, which makes the gradient that of half the mean squared loss. The released code also computes
    stopped samples to the end and has no early exit of its loop, so that it costs more than PGD;
    compact=false does the former, the latter affects the cost alone. Its weight decay on kernels only and
    its per-iteration rate decay belong to the optimiser and are not part of the preset.

    Deviations of `official` from the released code: there the start x + u is not clipped to the pixel
    box, so that where pixels are saturated the first gradient is taken outside [0, 1] and FOSC is
    measured from there; here both are at the clipped start. There logarithms are cut: 1e-20 beside
    p_y in the attack, 1e-12 in the weights (at most 27.6), and p_y clipped to [1e-7, 1 - 1e-7] in the
    training loss, whose gradient is zero beyond 16.1 nats; here they are exact, and the worst samples
    train with the largest weights. Its eps is 0.031.

    Beyond the paper: other shapes of the fall, a threshold that falls with every step (`per`), FOSC
    over the legal pixels only (needed where images have saturated pixels, whose share of FOSC no
    attack can remove), and l2 and l1 by Hoelder's inequality.
    """

    card: ClassVar[Card] = Card(
        paper="On the convergence and robustness of adversarial training, Wang et al. 2019, "
        "arXiv 2112.08304",
        rule="PGD; sample i stops once FOSC(delta_i) <= c_max decay(t)",
        cost="2 min(s + 1, K) + 3 FE for a sample that stops after s of K steps (K=10: 7 to 23); "
        "weighting=own_ce: 1 more",
        ranges={
            "c_max": Range(0.05, 2, log=True, unit="nats"),
            "decay.kind": Options(("constant", "power", "cosine")),
            "decay.end": Range(0.5, 1.0, unit="of training"),
            "decay.exponent": Range(
                0.5, 2, log=True, when={"decay.kind": "power"}, note="1 is the paper's"
            ),
            "steps": Range(5, 20),
            "step_size": Range(
                1 / 8, 1 / 2, log=True, unit="eps", note="steps * step_size >= eps"
            ),
            "start": Options(("uniform", "zero")),
            "over": Options(("ball", "ball_box")),
            "weighting": Options(("none", "own_ce")),
        },
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": _PAPER,
        "official": {**_PAPER, "anchor": "start", "weighting": "own_ce", "compact": False},
    }

    name: Literal["dynamic"] = "dynamic"
    preset: Annotated[
        Literal["paper", "official"] | None, Field(description="defaults for all other fields")
    ] = None
    steps: Annotated[PositiveInt, SCHEDULABLE, Field(description="K, the most inner steps")] = 10
    c_max: Annotated[
        Number,
        SCHEDULABLE,
        Field(description="FOSC threshold at the start, in nats; negative: PGD"),
    ] = 0.5
    decay: Annotated[
        AbstractShape, OneOf(SHAPES, "power"), Field(description="how the threshold falls")
    ] = Power(end=0.8)
    per: Annotated[
        Literal["epoch", "step"],
        Field(description="the threshold falls every epoch, or every step"),
    ] = "epoch"
    over: Annotated[
        Literal["ball", "ball_box"],
        Field(
            description="FOSC over the ball (paper) or its legal pixels (for MNIST-like images)"
        ),
    ] = "ball"
    anchor: Annotated[
        Literal["natural", "start"],
        Field(description="FOSC of the displacement from the image, or from the random start"),
    ] = "natural"
    weighting: Annotated[
        Literal["none", "own_ce"],
        Field(description="own_ce: samples count with their own loss, from the second epoch on"),
    ] = "none"
    compact: Annotated[
        bool, Field(description="stopped samples leave the batch; needs attack_bn=eval")
    ] = True

    def assemble(self, ball: AbstractThreatModel, outer: AbstractOuter) -> Nested:
        stop = Gap(
            c_max=self.c_max, decay=self.decay, over=self.over, anchor=self.anchor, per=self.per
        )
        attack, weighted = self.attack(stop, self.compact), self.weighting == "own_ce"
        return Nested(ball, attack, outer, self.cross_entropy(), own_loss=weighted)
