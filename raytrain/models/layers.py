"""Layers that the networks share: bias-free convolutions, stages of blocks, the global mean."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


def conv(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution whose output has 1 / stride of the input's side; BatchNorm adds the bias."""
    return nn.Conv2d(in_width, out_width, kernel, stride, padding=kernel // 2, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module],
    in_width: int,
    out_width: int,
    num_blocks: int,
    stride: int,
) -> nn.Sequential:
    """`num_blocks` residual blocks; the first changes the width and the side of the image."""
    first = block(in_width, out_width, stride)
    return nn.Sequential(first, *(block(out_width, out_width, 1) for _ in range(num_blocks - 1)))


def global_mean(h: Float[Tensor, "n k h w"]) -> Float[Tensor, "n k"]:
    """The mean over the pixels, so that a network takes images of any side."""
    return h.mean((2, 3))


def start_he_normal(network: nn.Module, last: nn.Linear) -> None:
    """Draw convolutions from He's normal distribution by fan-out, and set the bias of `last` to 0.

    BatchNorm starts at 1 and 0 by itself.
    """
    nn.init.zeros_(last.bias)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
