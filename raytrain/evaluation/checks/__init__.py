"""Checks of whether an accuracy under attack is valid, or the attack was blocked.

Each is a function on a bare network that maps pixels in [0, 1] to logits, ours or any other, and
restores its state. A failed check hides no number; its sentence states that the number is not
reliable, why, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from raytrain.core.errors import RequestError
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Images, Labels, Rows, mix
from raytrain.evaluation.checks.attacked import falls_with_eps, large_eps, more_steps
from raytrain.evaluation.checks.black_box import black_box, under_noise
from raytrain.evaluation.checks.forward import (
    batch,
    modes,
    pixel_range,
    probabilities,
    randomised,
)
from raytrain.evaluation.checks.gradients import zero_gradients
from raytrain.evaluation.checks.probe import Finding
from raytrain.evaluation.confidence import Flags

MOST = 128
"""Images that `before_belief` looks at: about 150 passes, forward and backward, of one batch."""


def before_belief(
    model: nn.Module, images: Images, labels: Labels, ball: AbstractThreatModel, seed: int
) -> list[Finding]:
    """Every check that needs no flags, on at most 128 of the images, drawn by `seed`.

    `modes` checks the model in the mode it is given in; all others run in eval mode, as evaluation
    does. For images out of range the other checks are skipped, and for a randomised model that of
    the batch: neither would be meaningful. Raises RequestError if there is no image, or if the model
    does not return one row of logits for each.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise RequestError(
            "images: expected at least one, and a label for each, "
            f"found {len(images)} and {len(labels)}"
        )
    findings = [pixel_range(images), modes(model)]
    if not findings[0].passed:
        return findings
    rows = _some(len(images), seed).to(images.device)
    images, labels = images[rows], labels[rows]
    return [
        *findings,
        *of_answers(model, images, seed),
        zero_gradients(model, images, labels, seed),
        falls_with_eps(model, images, labels, ball, seed),
        large_eps(model, images, labels, ball, seed),
        more_steps(model, images, labels, ball, seed),
    ]


def of_answers(model: nn.Module, images: Images, seed: int) -> list[Finding]:
    """The checks that need neither labels nor gradients, and no trained weights.

    For a randomised model the check of the batch is skipped.
    """
    findings = [randomised(model, images, seed)]
    if findings[0].passed:
        findings.append(batch(model, images, seed))
    return [*findings, probabilities(model, images, seed)]


def after(white: Flags, black: Mapping[str, Flags]) -> list[Finding]:
    """The checks that need flags: `white` survived all attacks with gradients, `black` each without."""
    return [black_box(white, black)]


def _some(count: int, seed: int) -> Rows:
    """At most 128 of `count` images, drawn because test sets may be sorted by class."""
    generator = torch.Generator().manual_seed(mix(seed, "checked images"))
    return torch.randperm(count, generator=generator)[:MOST].sort().values


__all__ = [
    "Finding",
    "after",
    "batch",
    "before_belief",
    "black_box",
    "falls_with_eps",
    "large_eps",
    "modes",
    "more_steps",
    "of_answers",
    "pixel_range",
    "probabilities",
    "randomised",
    "under_noise",
    "zero_gradients",
]
