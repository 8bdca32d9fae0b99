"""Per-sample losses, inner (maximised by attacks) and outer (minimised by training), never reduced."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raytrain.core.registry import OneOf, Registry
from raytrain.core.types import Batch, Delta, PerSample, Predict, Spec

Reference = tuple[Tensor, ...]
"""Tensors that a loss computes once per batch and does not differentiate, one row per sample."""


class AbstractLoss(Spec):
    """f_i(theta, delta_i), in nats; higher is worse for the model.

    `predict` maps pixels to logits. `rows` of `reference` belong to the rows of the batch.
    """

    name: Any = None

    takes_mixed_labels: ClassVar[bool] = False
    """Whether it is defined for images with two labels, `Batch.mixed`."""
    reference_forwards: ClassVar[int] = 0
    """Passes of the network in `reference`."""
    inner_forwards: ClassVar[int] = 1
    """Passes of the network in `inner`, the last of them at delta."""
    outer_forwards: ClassVar[int] = 1
    """Passes of the network in `outer`."""
    nested_gradients: ClassVar[int] = 0
    """Input gradients inside one sample's `outer`, which are differentiated again."""

    @property
    def update_fe(self) -> float:
        """Forward-equivalents per image of `outer` and its weight gradient."""
        return 3.0 * (self.outer_forwards + self.nested_gradients)

    def why_not_mixed(self) -> str | None:
        """Why images that are mixed of two have no loss; None if they have."""
        return None if self.takes_mixed_labels else "its loss is not defined for two labels"

    def reference(self, predict: Predict, batch: Batch) -> Reference:
        """Return the tensors that do not depend on delta, once per batch before the attack."""
        del predict, batch
        return ()

    @abstractmethod
    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        """Return the loss that the attack maximises."""

    @abstractmethod
    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        """Return the loss that training minimises."""


Smoothing = Annotated[
    float,
    Field(ge=0, lt=1, description="share of the label spread over all classes, in training only"),
]


class AttackedByCrossEntropy(AbstractLoss):
    """A loss whose inner part is the cross-entropy -log p_y(x + delta)."""

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        return label_loss(predict(batch.images + delta), batch)


@final
class CrossEntropy(AttackedByCrossEntropy):
    """-log p_y(x + delta), both for the attack and for training (Madry et al. 2018).

    With label smoothing s, training minimises (1 - s) times it plus s times the mean over all
    classes; the attack uses the plain label (Pang et al. 2021, arXiv 2010.00467). The public code
    of Pang et al. spreads its share s' over the C - 1 other classes only: the same loss at
    s = s' C / (C - 1), so that its 0.1 is 1/9 here for ten classes.
    """

    takes_mixed_labels: ClassVar[bool] = True

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Smoothing = 0.0

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        return label_loss(predict(batch.images + delta), batch, self.label_smoothing)


@final
class Trades(AbstractLoss):
    """Training: CE(p(x), y) + beta KL(p(x) | p(x + delta)).  Attack: the KL, with p(x) held fixed.

    Zhang et al. 2019 (TRADES, arXiv 1901.08573), equation 5. Both branches of the outer KL are
    differentiated. Errors of the public code avoided: clean logits are computed once per batch for
    the attack and not at every inner step, the KL is summed over classes for each sample, and its
    gradient is finite where a probability rounds to zero (that of torch's kl_div for p is NaN there).

    The network runs twice in train mode, on the clean images and then on the perturbed ones; the
    public code runs three times (clean, perturbed, clean). With running statistics
    r <- (1 - mu) r + mu s, the perturbed images have in the long run the share 1 / (2 - mu) of r here,
    53 % at torch's mu = 0.1, and (1 - mu) / (1 + (1 - mu) + (1 - mu)^2) there, 33 %. The gradients for
    the weights are the same.

    Mixed labels (CutMix) enter the natural part. The code of Rebuffi et al. 2021 then also attacks their
    cross-entropy in place of the KL; here the attack is the same for all images.
    """

    takes_mixed_labels: ClassVar[bool] = True
    reference_forwards: ClassVar[int] = 1
    outer_forwards: ClassVar[int] = 2

    name: Literal["trades"] = "trades"
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of the KL")] = 6.0
    label_smoothing: Smoothing = 0.0

    def reference(self, predict: Predict, batch: Batch) -> Reference:
        return (predict(batch.images),)

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        (clean,) = reference
        return kl_divergence(clean, predict(batch.images + delta))

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        clean, moved = predict(batch.images), predict(batch.images + delta)
        natural = label_loss(clean, batch, self.label_smoothing)
        return natural + self.beta * kl_divergence(clean, moved)


@final
class Mart(AttackedByCrossEntropy):
    """Training: BCE(p(x'), y) + beta KL(p(x) | p(x')) (1 - p_y(x)), x' = x + delta;
    BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x')).  Attack: cross-entropy.

    Wang et al. 2020 (MART), equation 11. BCE and the weight have the constants of the public code,
    log(1.0001 - max_{k != y} p_k(x') + 1e-12) and 1.0000001 - p_y(x), which vanish in half precision:
    everything after the logits is float32 or wider. The runner-up is a masked maximum instead of a
    sort; the weight is differentiated, as in the public code; a batch of one works.

    The KL has no constant: it is computed from log-softmax, which is finite by itself. The public
    code's is sum_k p_k log(p_k / (q_k + 1e-12)), p = p(x) and q = p(x'). Ours is larger by
    sum_k p_k log(1 + 1e-12 / q_k), which is negligible unless some q_k is near 1e-12 or below. There
    the public KL is bounded (27.6 nats per unit of p_k) and its derivative by log q_k, -p_k here, has
    the factor q_k / (q_k + 1e-12): such samples count more here.
    """

    outer_forwards: ClassVar[int] = 2

    name: Literal["mart"] = "mart"
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False, description="weight of the KL")] = 5.0

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        clean, moved = wide(predict(batch.images)), wide(predict(batch.images + delta))
        own = torch.arange(clean.shape[1], device=clean.device) == batch.labels[:, None]
        runner_up = moved.softmax(1).masked_fill(own, 0).amax(1)
        boosted = cross_entropy(moved, batch.labels) - torch.log(1.0001 - runner_up + 1e-12)
        sure = clean.softmax(1).masked_fill(~own, 0).sum(1)
        return boosted + self.beta * kl_divergence(clean, moved) * (1.0000001 - sure)


@final
class Margin(AbstractLoss):
    """max_{k != y} z_k(x + delta) - z_y(x + delta): positive where the image is misclassified.

    The loss of Carlini & Wagner 2017 (arXiv 1608.04644, f_6 without the cut at zero) for PGD. Its
    gradient does not vanish where the softmax saturates. The public code of Madry et al. 2018 cuts
    it at 50: an image whose margin is larger has no gradient there, and has one here.
    """

    name: Literal["margin"] = "margin"

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        del reference
        logits = wide(predict(batch.images + delta))
        own = torch.arange(logits.shape[1], device=logits.device) == batch.labels[:, None]
        others = logits.masked_fill(own, -torch.inf).amax(1)
        return others - logits.gather(1, batch.labels[:, None]).squeeze(1)

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return self.inner(predict, batch, delta, reference)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> PerSample:
    """Per-sample cross-entropy, in at least float32 whatever precision the network ran in.

    >>> cross_entropy(torch.zeros(2, 10), torch.tensor([3, 7]))
    tensor([2.3026, 2.3026])
    """
    return F.cross_entropy(wide(logits), labels, reduction="none", label_smoothing=smoothing)


def label_loss(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> PerSample:
    """Cross-entropy with the labels of a batch; lambda CE(y) + (1 - lambda) CE(y') of mixed ones."""
    loss = cross_entropy(logits, batch.labels, smoothing)
    if batch.mixed is None:
        return loss
    other, share = cross_entropy(logits, batch.mixed.other, smoothing), batch.mixed.share
    return share * loss + (1 - share) * other


def kl_divergence(clean: Tensor, moved: Tensor) -> PerSample:
    """KL(p | q) of two rows of logits, in nats, summed over the classes, in at least float32.

    >>> row = torch.tensor([[1.0, 2.0]])
    >>> kl_divergence(row, row + 5)
    tensor([0.])
    """
    log_p, log_q = wide(clean).log_softmax(1), wide(moved).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def wide(logits: Tensor) -> Tensor:
    """Convert to float32, or float64 if the network ran in it: logarithms need more than half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


LOSSES = Registry(AbstractLoss, "name", group="raytrain.losses")
LOSSES.register(CrossEntropy, Trades, Mart)

Loss = Annotated[AbstractLoss, OneOf(LOSSES, "cross_entropy")]
