"""Cost of training in forward-equivalents, the unit in which all algorithms are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from raytrain.core.distributed_context import DistributedContext


@dataclass(frozen=True)
class CostSetting:
    """Arguments of the cost of a step beside the algorithm's own fields."""

    epoch: int = 0  # epochs finished
    batch_size: int = 128  # images per weight update, over all workers
    workers: int = 1
    stem_share: Callable[[], float] = float  # the first layer's share of a forward


@dataclass
class Meter:
    """Cost of training so far, as the number of samples in each kind of pass.

    One forward-equivalent (FE) is the forward of one image. The gradient for the input costs one
    more, the gradient for input and weights two more: FE = forwards + input_backwards + 2
    full_backwards + stem. Differentiating an input gradient once more (GradAlign) counts as one
    more full backward.

    >>> Meter(forwards=11, input_backwards=10, full_backwards=1, samples=1).fe  # PGD-10, one image
    23
    """

    forwards: int = 0
    input_backwards: int = 0
    full_backwards: int = 0
    stem: float = 0.0  # FE spent in the first layer alone (YOPO)
    samples: int = 0  # images trained on, counted once per batch

    @property
    def fe(self) -> int:
        """Forward-equivalents in all."""
        return round(self.forwards + self.input_backwards + 2 * self.full_backwards + self.stem)

    def total(self, context: DistributedContext) -> Meter:
        """The sum over all workers: a collective."""
        counts = torch.tensor(list(asdict(self).values()), dtype=torch.float64)
        forwards, inputs, fulls, stem, samples = context.total(counts.to(context.device)).tolist()
        return Meter(int(forwards), int(inputs), int(fulls), stem, int(samples))
