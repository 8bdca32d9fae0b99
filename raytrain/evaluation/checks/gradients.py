"""Has the attack anything to follow? Gradients that vanish make every gradient attack look weak."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raytrain.core.losses import cross_entropy
from raytrain.core.types import Images, Labels, Mask, PerSample
from raytrain.evaluation.checks.probe import (
    ONE_CLASS,
    Finding,
    logits_of,
    one_class,
    percent,
    still,
)

LEAST = torch.finfo(torch.float32).tiny
"""A gradient with no component above this has underflowed in float32; attacks see zero."""

ALLOWED_SHARE, ALLOWED_IMAGES = 0.01, 1


class Connected(nn.Module):
    """The model with one more path from pixels to logits, of slope zero.

    It answers the same; and one that cuts the graph has a gradient of zero instead of none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + 0 * images.flatten(1).sum(1, keepdim=True)


def zero_gradients(model: nn.Module, images: Images, labels: Labels, seed: int) -> Finding:
    """`zero_gradients`: the cross-entropy of rightly classified images has an input gradient.

    Uesato et al. 2018 (arXiv 1802.05666) and Athalye et al. 2018 (arXiv 1802.00420) on why it may
    not. Fails if the gradient is zero, below float32's normal range, or no number, for more than
    1 % of them and at least two. `value` is the share.
    """
    with still(model, seed, images.device):
        predicted = logits_of(model, images).argmax(1)
        if one_class(predicted, labels):
            return Finding("zero_gradients", True, ONE_CLASS, 0.0)
        images, labels = images[predicted == labels], labels[predicted == labels]
        if len(images) == 0:
            sentence = "No image is classified rightly, so there is no gradient to judge."
            return Finding("zero_gradients", True, sentence, 0.0)
        gone = vanishing(model, images, labels, cross_entropy)
        kept = bool((gone & ~vanishing(model, images, labels, margin)).any())
    share = int(gone.sum()) / len(gone)
    if int(gone.sum()) <= max(ALLOWED_IMAGES, ALLOWED_SHARE * len(gone)):
        sentence = f"Input gradients do not vanish ({percent(share)} of the right images)."
        return Finding("zero_gradients", True, sentence, share)
    reason = (
        "while the margin still has one: the logits saturate the softmax; scale them down, or trust "
        "attacks on margins only (CW, DLR)."
        if kept
        else "and so is that of the margin: the model masks its gradients; differentiate through a "
        "smooth stand-in (BPDA), or trust attacks without gradients only (Square)."
    )
    sentence = (
        f"The cross-entropy's input gradient is zero for {percent(share)} of the right images, "
    )
    return Finding("zero_gradients", False, sentence + reason, share)


def vanishing(
    model: nn.Module,
    images: Images,
    labels: Labels,
    loss: Callable[[Tensor, Labels], PerSample],
) -> Mask:
    """Per image, whether its loss has no usable gradient, (n,)."""
    moved = images.detach().requires_grad_(True)
    with torch.enable_grad():
        losses = loss(Connected(model)(moved), labels)
        (grad,) = torch.autograd.grad(losses.sum(), moved)
    size = grad.flatten(1).abs().amax(1)
    return ~(size >= LEAST) | ~size.isfinite()


def margin(logits: Tensor, labels: Labels) -> PerSample:
    """The best other logit less that of the label: above 0 where the image is classified wrongly."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).amax(1)
    return others - logits.gather(1, own).squeeze(1)
