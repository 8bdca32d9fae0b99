"""An attack with more room or steps must not find less, and with all the room nearly everything.

Carlini et al. 2019 (On evaluating adversarial robustness, arXiv 1902.06705, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import nn

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Batch, BatchRandom, Images, Labels, mix
from raytrain.evaluation.checks.gradients import Connected
from raytrain.evaluation.checks.probe import (
    ONE_CLASS,
    Finding,
    logits_of,
    one_class,
    percent,
    still,
)
from raytrain.evaluation.confidence import Flags, holm, mcnemar
from raytrain.evaluation.validation import Evaluation, validate

LADDER = (0.5, 1.0, 2.0, 4.0)  # radii, in multiples of eps

EFFORTS = ((1, "1.25*eps"), (10, "eps/4"), (40, "eps/10"))
"""Steps and their size: one that crosses the ball (Wong et al. 2020), then more and finer ones."""

LEVEL = 0.01
"""A rise is one that chance makes with at most this probability, over all pairs compared."""

FLOOR, ALLOWED_IMAGES = 0.02, 2  # that may survive any perturbation, whatever the classes


def falls_with_eps(
    model: nn.Module, images: Images, labels: Labels, ball: AbstractThreatModel, seed: int
) -> Finding:
    """`falls_with_eps`: a larger ball holds the smaller one, so that PGD-10 must not find less.

    Every two radii of the ladder are compared image by image. Fails if the accuracy rises from one to
    a larger one by more than chance; where it stays the same, it passes. `value` is the largest rise.
    """
    evaluations = [Evaluation(steps=10, eps=factor * ball.eps) for factor in LADDER]
    flags = survivors(model, images, labels, ball, evaluations, seed)
    return _not_rising(
        "falls_with_eps",
        flags,
        [f"at {one.eps:.4g}" for one in evaluations],
        "Accuracy under PGD-10 does not rise with eps, beyond chance: {listed}.",
        "Accuracy under PGD-10 rises with eps ({listed}), though more room can only help an attacker: "
        "gradients lead it astray; trust attacks without gradients only (Square).",
    )


def large_eps(
    model: nn.Module, images: Images, labels: Labels, ball: AbstractThreatModel, seed: int
) -> Finding:
    """`large_eps`: in a ball that holds plain grey for every image, accuracy under PGD-20 is below half of
    chance.

    The radius is 1/2 in l-inf, half the diameter of the pixel box in l2 and l1. `value` is
    that accuracy.
    """
    eps = max(ball.eps, float(ball.norm_of(torch.full_like(images[:1], 0.5))))
    evaluation = Evaluation(steps=20, restarts=2, eps=eps)
    (flags,) = survivors(model, images, labels, ball, [evaluation], seed)
    with still(model, seed, images.device):
        logits = logits_of(model, images)
    left = float(flags.mean())
    if flags.sum() <= max(ALLOWED_IMAGES, max(FLOOR, 0.5 / logits.shape[1]) * len(flags)):
        sentence = (
            f"Accuracy falls to {percent(left)} at eps {eps:.4g}, where any image can be grey."
        )
        return Finding("large_eps", True, sentence, left)
    if one_class(logits.argmax(1), labels):
        return Finding("large_eps", True, ONE_CLASS, left)
    sentence = (
        f"{percent(left)} of the images survive PGD-20 at eps {eps:.4g}, where an attacker can turn "
        "any image into plain grey: the attack is blocked, and its accuracies are too high at "
        "every eps; trust attacks without gradients only (Square)."
    )
    return Finding("large_eps", False, sentence, left)


def more_steps(
    model: nn.Module, images: Images, labels: Labels, ball: AbstractThreatModel, seed: int
) -> Finding:
    """`more_steps`: PGD-10 and PGD-40 find no less than one step, nor PGD-40 than PGD-10.

    Fails if the accuracy rises with the steps by more than chance; where it stays the same, it passes.
    `value` is the largest rise.
    """
    evaluations = [Evaluation(steps=steps, step_size=size) for steps, size in EFFORTS]
    flags = survivors(model, images, labels, ball, evaluations, seed)
    return _not_rising(
        "more_steps",
        flags,
        [f"after {one.steps}" for one in evaluations],
        "Accuracy does not rise with PGD's steps, beyond chance: {listed}.",
        "Accuracy rises with PGD's steps ({listed}): one long step beats many short ones only where "
        "gradients mislead; trust attacks without gradients only (Square).",
    )


def _not_rising(
    check: str, flags: Sequence[Flags], labels: Sequence[str], passed: str, failed: str
) -> Finding:
    """Whether no accuracy exceeds an earlier one by more than chance; `flags` from weak to strong."""
    rise, real = largest_rise(flags)
    shares = zip(flags, labels, strict=True)
    listed = ", ".join(f"{percent(float(flag.mean()))} {label}" for flag, label in shares)
    return Finding(check, not real, (failed if real else passed).format(listed=listed), rise)


def survivors(
    model: nn.Module,
    images: Images,
    labels: Labels,
    ball: AbstractThreatModel,
    evaluations: Sequence[Evaluation],
    seed: int,
) -> list[Flags]:
    """Which images survive each attack; all attacks start from the same draws."""
    rng = BatchRandom(mix(seed, "checks"), len(images), slice(None), images.device)
    index = torch.arange(len(images), device=images.device)
    everything = Batch(images, labels, index, rng)
    found: list[Flags] = []
    for evaluation in evaluations:
        with still(model, seed, images.device):
            context = DistributedContext(images.device)
            _, flags = validate(Connected(model), [everything], ball, evaluation, context)
        found.append(flags.robust.cpu().numpy())
    return found


def largest_rise(flags: Sequence[Flags]) -> tuple[float, bool]:
    """The largest rise of the accuracy from one row of flags to a later one, and whether any rise is
    more than chance.

    McNemar's test of every pair, adjusted by Holm's rule.
    """
    pairs = list(combinations(flags, 2))
    rises = [float(later.mean() - earlier.mean()) for earlier, later in pairs]
    chances = holm(
        [
            mcnemar(int((earlier & ~later).sum()), int((later & ~earlier).sum()))
            for earlier, later in pairs
        ]
    )
    real = any(rise > 0 and p < LEVEL for rise, p in zip(rises, chances, strict=True))
    return max(0.0, *rises), real
