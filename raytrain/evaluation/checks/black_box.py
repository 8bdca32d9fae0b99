"""Black-box check: attacks without gradients must not break images that attacks with gradients cannot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from raytrain.core.errors import RequestError
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import BatchRandom, Images, Labels, mix
from raytrain.evaluation.checks.probe import Finding, logits_of, percent, still
from raytrain.evaluation.confidence import Flags

SHARE, IMAGES = 0.002, 2
"""As in practice: Square alone breaks a handful of ten thousand images of an honest model."""


def black_box(white: Flags, black: Mapping[str, Flags]) -> Finding:
    """`black_box`: what survives the attacks with gradients survives those without.

    All flags are of the same images in the same order, true where an image survived; an image that
    a black-box attack was not tried on counts as survived there. Fails if these attacks break more
    than 0.2 % of the images, and at least two, that the others left. `value` is the share.

    Raises RequestError if the flags are of different images.
    """
    if any(len(flags) != len(white) for flags in black.values()) or len(white) == 0:
        lengths = ", ".join(str(len(flags)) for flags in (white, *black.values()))
        raise RequestError(f"flags: expected the same images for all attacks, found {lengths}")
    broken = {name: white & ~flags for name, flags in black.items()}
    count = int((white & ~np.logical_and.reduce([white, *black.values()])).sum())
    share = count / len(white)
    listed = ", ".join(f"{name} {int(flags.sum())}" for name, flags in broken.items())
    if count < IMAGES or share <= SHARE:
        sentence = f"Attacks without gradients add next to nothing: {count} images ({listed})."
        return Finding("black_box", True, sentence, share)
    sentence = (
        f"Attacks without gradients break {percent(share)} of the images ({listed}) that attacks with "
        "gradients leave: the latter were too weak, or the gradients mislead; take more steps or "
        "AutoAttack, or adapt the attack to the defence."
    )
    return Finding("black_box", False, sentence, share)


def under_noise(
    model: nn.Module,
    images: Images,
    labels: Labels,
    ball: AbstractThreatModel,
    seed: int,
    draws: int = 20,
) -> Flags:
    """Which images survive `draws` random perturbations of the ball: the weakest black box, (n,)."""
    rng = BatchRandom(mix(seed, "noise"), len(images), slice(None), images.device)
    with still(model, seed, images.device):
        left = logits_of(model, images).argmax(1) == labels
        for draw in range(draws):
            noise = ball.feasible(ball.noise(images, rng, f"noise/{draw}", 2.0), images)
            left = left & (logits_of(model, images + noise).argmax(1) == labels)
    return left.cpu().numpy()
