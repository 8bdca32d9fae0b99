"""Check that an export gives the network's logits on test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raytrain.core.errors import TrainingFailed
from raytrain.core.types import Predict

SIZES = (1, 2, 5)
"""Batch sizes: one and several, none of them the size that a graph was traced with twice."""


@dataclass(frozen=True)
class Checked:
    """The largest difference of any logit, |a - b| / (1 + |b|), and what was allowed; 0: every bit."""

    difference: float
    tolerance: float

    def sentence(self) -> str:
        """For the card and the screen."""
        sizes = ", ".join(map(str, SIZES[:-1])) + f" and {SIZES[-1]}"
        batches = f"on test images, in batches of {sizes}"
        if self.tolerance == 0:
            return f"loads back; the same logits bit for bit {batches}"
        return (
            f"loads back; logits differ by at most {self.difference:.1g} "
            f"({self.tolerance:g} allowed) {batches}"
        )


@torch.no_grad()
def same_logits(
    file: Path, ours: Predict, theirs: Predict, images: Tensor, tolerance: float = 0.0
) -> Checked:
    """Compare the logits of `theirs`, read back from `file`, with those of `ours`.

    Raises:
        TrainingFailed: if a logit is off by more than `tolerance`, or no number.
    """
    worst = 0.0
    for size in SIZES:
        expected, found = ours(images[:size]), theirs(images[:size])
        if expected.shape != found.shape:
            raise TrainingFailed(
                f"{file.name}: gives shape {tuple(found.shape)} back for {size} images, not "
                f"{tuple(expected.shape)}"
            )
        excess = (found - expected).abs() / (1 + expected.abs())
        # NaN must not pass as equal: it is above every tolerance here.
        worst = max(worst, float(excess.nan_to_num(nan=torch.inf).max()))
    if worst > tolerance:
        raise TrainingFailed(
            f"{file.name}: does not give the network's logits back (off by {worst:.3g}, "
            f"{tolerance:g} is allowed)"
        )
    return Checked(worst, tolerance)
