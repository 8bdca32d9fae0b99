"""Checks that need no gradient: is this a deterministic map from pixels in [0, 1] to logits?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from raytrain.core.types import Images
from raytrain.evaluation.checks.probe import Finding, logits_of, percent, still

SAME = 1e-4
"""Changes below this share of an image's logit range are rounding in the same kernels."""

SAME_AMONG_OTHERS = 1e-2
"""The like for a batch of another size, which may run in other kernels: TF32 keeps three digits."""

ONE = 1e-3
"""How far from one the sum of a row of probabilities may round, also in half precision."""

REPEATS = 4


def pixel_range(images: Images) -> Finding:
    """`range`: pixels lie in [0, 1], the unit of eps. `value` is how far the worst one lies outside."""
    low, high = float(images.min()), float(images.max())
    found = f"Pixels lie in [{low:.4g}, {high:.4g}]"
    outside = max(-low, high - 1, 0.0)
    if not bool(images.isfinite().all()):
        passed, sentence = (
            False,
            "Some pixels are not finite numbers; look for a division by zero.",
        )
    elif low < 0:
        passed = False
        sentence = (
            f"{found}, as if normalised; give [0, 1] and put the normaliser inside the model."
        )
    elif high > 1:
        passed, sentence = False, f"{found} instead of [0, 1]; divide 0..255 by 255."
    elif 0 < high <= 1.001 / 255:
        passed, sentence = False, f"{found}, as if divided by 255 twice; divide once."
    else:
        passed, sentence = True, f"{found}."
    return Finding("range", passed, sentence, outside)


def modes(model: nn.Module) -> Finding:
    """`modes`: the model as handed over is in evaluation mode. `value` counts the layers that are not."""
    left = [name or type(m).__name__ for name, m in model.named_modules() if _trains(m)]
    if not left:
        return Finding("modes", True, "BatchNorm and dropout are in evaluation mode.", 0.0)
    sentence = (
        f"{len(left)} BatchNorm or dropout layers are in training mode, the first is {left[0]}; "
        "call model.eval() before anything is measured."
    )
    return Finding("modes", False, sentence, float(len(left)))


def randomised(model: nn.Module, images: Images, seed: int) -> Finding:
    """`randomised`: the same images have the same logits, call after call, in eval mode.

    `value` is the largest change, as a share of the image's logit range.
    """
    with still(model, seed, images.device):
        first = logits_of(model, images)
        change = max(_change(first, logits_of(model, images)) for _ in range(REPEATS))
    if change <= SAME:
        return Finding("randomised", True, "The same images have the same logits.", change)
    sentence = (
        f"The same images have other logits at the next call (by up to {percent(change)} of their "
        "range): attacks chase noise and accuracies come out too high; switch the randomness off, "
        "or attack the mean over its draws (EOT)."
    )
    return Finding("randomised", False, sentence, change)


def batch(model: nn.Module, images: Images, seed: int) -> Finding:
    """`batch`: the logits of an image do not depend on the others of its batch, in eval mode.

    The rest of the batch is replaced by the negatives of the images. `value` is the largest change
    of a logit, as a share of the image's logit range.
    """
    with still(model, seed, images.device):
        alone = logits_of(model, images)
    with still(model, seed, images.device):
        among = logits_of(model, torch.cat([1 - images, images]))[len(images) :]
    change = _change(alone, among)
    if change <= SAME_AMONG_OTHERS:
        return Finding("batch", True, "An image's logits do not depend on its batch.", change)
    sentence = (
        "An image's logits depend on the other images of its batch (they move by up to "
        f"{percent(change)} of their range), so accuracies depend on the batch size and attacks on "
        "their neighbours; use fixed statistics, such as BatchNorm's running ones."
    )
    return Finding("batch", False, sentence, change)


def probabilities(model: nn.Module, images: Images, seed: int) -> Finding:
    """`probabilities`: the model answers logits, not softmax or log-softmax of them.

    `value` is the largest distance of a row's sum (of its exponentials' sum) from one.
    """
    with still(model, seed, images.device):
        rows = logits_of(model, images).double()
    off = float((rows.sum(1) - 1).abs().max())
    log_off = float((rows.exp().sum(1) - 1).abs().max())
    if off <= ONE and bool(((rows >= -ONE) & (rows <= 1 + ONE)).all()):
        sentence = (
            "The model answers probabilities: the cross-entropy would take the softmax of a softmax, "
            "whose small gradients hide attacks; return the logits before the softmax."
        )
        return Finding("probabilities", False, sentence, off)
    if log_off <= ONE and bool((rows <= ONE).all()):
        sentence = (
            "The model answers log-probabilities: cross-entropy and margins come out the same, up to "
            "rounding, yet every other use expects logits; return them before the log-softmax."
        )
        return Finding("probabilities", False, sentence, log_off)
    return Finding("probabilities", True, "The model answers logits.", min(off, log_off))


def _trains(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, _InstanceNorm):  # without running statistics it has no modes
        return module.training and module.track_running_stats
    return module.training and isinstance(module, (_BatchNorm, nn.RReLU))


def _change(one: Tensor, other: Tensor) -> float:
    """The largest change of a logit as a share of its row's range; infinite if it is not a number."""
    size = (one.amax(1) - one.amin(1)).clamp_min(torch.finfo(one.dtype).tiny)
    change = (one - other).abs().amax(1) / size
    return float(change.nan_to_num(nan=torch.inf).max())
