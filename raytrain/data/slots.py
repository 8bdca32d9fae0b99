"""The slots of a batch that one source of images fills, and the order of its images in them.

Image i of a source that fills `count` slots is only ever in the slot first + i mod count, which worker
slot mod world owns in every epoch and for any number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.types import mix


@dataclass(frozen=True)
class Slots:
    """The slots first..first + count - 1 of batches of `batch_size` images.

    The index of image i, the key of per-sample state, is (i div count) * batch_size + slot: its remainder
    modulo the batch size is its slot, as in batches of one source. Indices that no image has are unused.
    """

    first: int
    count: int
    batch_size: int

    def index(self, numbers: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The indices of images, given by their numbers in the source."""
        rounds, slot = numbers // self.count, numbers % self.count
        return rounds * self.batch_size + self.first + slot

    def num_indices(self, num_images: int) -> int:
        """The first index that none of so many images has."""
        return int(self.index(torch.arange(num_images)).max()) + 1

    def owned(self, num_images: int, context: DistributedContext) -> Int64[Tensor, " owned"]:
        """The numbers of this worker's images."""
        numbers = torch.arange(num_images)
        return numbers[self.index(numbers) % context.world == context.rank]

    def in_batch(self, context: DistributedContext) -> slice:
        """Where these slots are in this worker's part of a batch."""
        first, end = (
            len(range(context.rank, slot, context.world))
            for slot in (self.first, self.first + self.count)
        )
        return slice(first, end)

    def rows(self, index: Int64[Tensor, " n"], context: DistributedContext) -> Int64[Tensor, " n"]:
        """The positions of images among this worker's."""
        here = self.in_batch(context)
        rounds, slot = index // self.batch_size, index % self.batch_size
        return rounds * (here.stop - here.start) + slot // context.world - here.start

    def order(
        self, num_images: int, seed: int, first: int, steps: int
    ) -> Int64[Tensor, "steps count"]:
        """Indices for the steps first..first + steps - 1 of a run.

        Each slot shows all of its images once, in random order, before it shows one again.
        """
        chosen = torch.empty(steps, self.count, dtype=torch.long)
        rest = num_images % self.count  # so many slots have an image more
        for slots, size in (
            (slice(0, rest), num_images // self.count + 1),
            (slice(rest, self.count), num_images // self.count),
        ):
            if slots.start < slots.stop:
                chosen[:, slots] = _cycled(size, slots.stop - slots.start, seed, first, steps)
        return chosen * self.batch_size + self.first + torch.arange(self.count)


def _cycled(
    size: int, width: int, seed: int, first: int, steps: int
) -> Int64[Tensor, "steps width"]:
    """Numbers below `size`: in every column one random permutation after the other, from `first` on."""
    parts = []
    for cycle in range(first // size, (first + steps - 1) // size + 1):
        generator = torch.Generator().manual_seed(mix(seed, size, cycle))
        begin, end = first - cycle * size, first + steps - cycle * size
        columns = [
            torch.randperm(size, generator=generator)[max(begin, 0) : min(end, size)]
            for _ in range(width)
        ]
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)
