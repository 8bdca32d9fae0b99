"""Batches of training images and of additional ones, such as generated images.

Gowal et al. 2021 (Improving robustness using generated data, arXiv 2110.09468) and Wang et al. 2023 (Better
diffusion models further improve adversarial training, arXiv 2302.04638): a fixed share of every batch is
additional images, and an epoch has as many batches as without them. In their code the additional images of
a batch are drawn with replacement, or from a shuffled stream; here both sources are shown in random
order, all of their images once before one of them is shown again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from itertools import tee

import torch
from jaxtyping import Int64
from torch import Tensor

from raytrain.core.regions import DATA, region
from raytrain.core.types import Batch, mix
from raytrain.data.shard import BatchRequest, SplitShard
from raytrain.data.slots import Slots


def slots_of(batch_size: int, additional: int) -> tuple[Slots, Slots]:
    """The slots of a batch for training images, and the last `additional` ones for the others.

    So every worker has both in the same proportion, up to one image.
    """
    own = batch_size - additional
    return Slots(0, own, batch_size), Slots(own, additional, batch_size)


def mixed_order(
    shards: list[SplitShard], seed: int, epoch: int, steps: int
) -> Int64[Tensor, "steps slots"]:
    """The indices of the batches of an epoch: a function of seed and epoch alone."""
    orders = []
    for number, shard in enumerate(shards):
        assert shard.slots is not None
        own_seed = mix(seed, "order of source", number)
        orders.append(shard.slots.order(shard.num_images, own_seed, epoch * steps, steps))
    return torch.cat(orders, dim=1)


def mixed_batches(shards: list[SplitShard], requests: Iterable[BatchRequest]) -> Iterator[Batch]:
    """Yield batches in order, whose slots are those of the shards, one after the other."""
    requests, *copies = tee(requests, 1 + len(shards))
    with ExitStack() as stack:
        sources = [
            stack.enter_context(closing(shard.pixels_of(_rows_of(shard, copy))))
            for shard, copy in zip(shards, copies, strict=True)
        ]
        for request in requests:
            with region(DATA):
                pixels = torch.cat([next(source) for source in sources])
                parts = [next(_rows_of(shard, [request])) for shard in shards]
                labels = torch.cat(
                    [
                        shard.labels_of(part.index)
                        for shard, part in zip(shards, parts, strict=True)
                    ]
                )
                batch = shards[0].batch_of(pixels, labels, request)
            yield batch
        for source in sources:
            next(source, None)  # so that it runs to its end


def _rows_of(shard: SplitShard, requests: Iterable[BatchRequest]) -> Iterator[BatchRequest]:
    """The part of every request that is for this shard."""
    assert shard.slots is not None
    here = shard.slots.in_batch(shard.context)
    for request in requests:
        yield request[here]
