"""A step on many GPUs: the passes of the network, and one ring all-reduce of its weight gradients.

Nothing is overlapped: gradients are reduced in turn with the passes, so that shares of the collective are
upper limits. Attack gradients are of the images of one GPU and need no collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from raytrain.core.network import forward_flops
from raytrain.models import ModelSpec


@dataclass(frozen=True)
class Link:
    """What a ring is made of: seconds per hop, and bytes per second in each direction."""

    latency: float
    bandwidth: float


# ---- assumptions: what cannot be measured without the machines ---------------------------------

PEAK = 989e12  # operations per second of a GPU: H100 SXM, bf16, dense, by its data sheet
UTILISATION = 0.3  # share of the peak that passes reach
LEAST = 16  # images on a GPU below which a pass takes no less time
PER_NODE = 8  # GPUs
NVLINK = Link(5e-6, 360e9)  # per GPU: 450 GB/s by the data sheet, 80 % of it
BETWEEN = {  # per node
    "InfiniBand": Link(10e-6, 8 * 40e9),  # 8 x 400 Gb/s, 80 % of it
    "Ethernet": Link(30e-6, 10e9),  # 100 Gb/s, 80 % of it
}
BYTES = 4  # of a gradient: float32

# -------------------------------------------------------------------------------------------------

NETWORKS = ("resnet18", "wideresnet-28-10", "wideresnet-28-16", "wideresnet-70-16")
FE = {"natural": 3.0, "pgd": 23.0}  # forward-equivalents per image of a step; PGD with 10 steps
WEAK, STRONG = 128, 1024  # images: on each GPU, and on all of them


@dataclass(frozen=True)
class Size:
    """A network for 32x32 pixels."""

    weights: int
    flops: int  # of a forward pass of one image

    @property
    def bytes(self) -> int:
        """What is reduced."""
        return BYTES * self.weights


@cache
def size_of(network: str) -> Size:
    """Counted on tensors without content."""
    with torch.device("meta"):
        model = ModelSpec(name=network).build(3, 32, 10, mean=[0.5] * 3, std=[0.2] * 3)
        flops = forward_flops(model, torch.zeros(1, 3, 32, 32))
    return Size(sum(weight.numel() for weight in model.parameters()), flops)


def ring(count: float, members: int, link: Link) -> float:
    """Seconds of a ring all-reduce of so many bytes: each member sends 2 (n - 1) pieces of 1/n.

    >>> ring(1e9, 1, NVLINK), ring(1e9, 2, Link(0.0, 1e9)), ring(0, 3, Link(1.0, 1.0))
    (0.0, 1.0, 4.0)
    """
    hops = 2 * (members - 1)
    return hops * (link.latency + count / members / link.bandwidth)


def all_reduce(count: float, gpus: int, between: Link) -> float:
    """Seconds within nodes and between them: a ring of each, as NCCL lays them out on such machines."""
    nodes = math.ceil(gpus / PER_NODE)
    return ring(count, min(gpus, PER_NODE), NVLINK) + ring(count, nodes, between)


def passes(size: Size, algorithm: str, images: float) -> float:
    """Seconds of the passes of a step on one GPU."""
    return FE[algorithm] * size.flops * max(images, LEAST) / (PEAK * UTILISATION)


def share(size: Size, algorithm: str, gpus: int, between: Link, images: float = WEAK) -> float:
    """The collective's share of a step."""
    collective = all_reduce(size.bytes, gpus, between)
    return collective / (collective + passes(size, algorithm, images))


def speed_up(size: Size, algorithm: str, gpus: int, between: Link) -> float:
    """How many times faster than on one GPU a step of `STRONG` images is."""
    step = passes(size, algorithm, STRONG / gpus) + all_reduce(size.bytes, gpus, between)
    return passes(size, algorithm, STRONG) / step
