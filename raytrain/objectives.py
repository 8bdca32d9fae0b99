"""What attacks maximise and training minimises: per-sample losses, never reduced."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raytrain.types import Batch, Delta, PerSample, Predict, Spec, named


class AbstractObjective(Spec):
    """f_i(theta, delta_i), in nats; higher is worse for the model."""

    @abstractmethod
    def inner(self, predict: Predict, batch: Batch, delta: Delta) -> PerSample:
        """What the attack maximises."""

    @abstractmethod
    def outer(self, predict: Predict, batch: Batch, delta: Delta) -> PerSample:
        """What training minimises."""


@final
class CrossEntropy(AbstractObjective):
    """-log p_y(x + delta), both for the attack and for training (Madry et al. 2018)."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def inner(self, predict: Predict, batch: Batch, delta: Delta) -> PerSample:
        return cross_entropy(predict(batch.images + delta), batch.labels)

    def outer(self, predict: Predict, batch: Batch, delta: Delta) -> PerSample:
        return self.inner(predict, batch, delta)


def cross_entropy(logits: Tensor, labels: Tensor) -> PerSample:
    """Per-sample cross-entropy, in at least float32 whatever precision the network ran in."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="none")


Objective = Annotated[CrossEntropy, Field(), named("name")]
