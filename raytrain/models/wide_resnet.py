"""WideResNet-depth-width: pre-activation blocks with `width` times as many channels."""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from raytrain.models.classifier import AbstractTwoStage
from raytrain.models.layers import conv, global_mean, stage, start_he_normal


@final
class WideBlock(nn.Module):
    """x <- shortcut + conv relu bn conv (a), a = relu bn x: Zagoruyko et al. 2016, figure 1c.

    The shortcut is x itself, or a 1x1 convolution of a where the width changes. No dropout.
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv(in_width, out_width, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.conv2 = conv(out_width, out_width, 3)
        # A stride occurs only in the first block of a stage, which doubles the width.
        same = in_width == out_width
        self.convShortcut = None if same else conv(in_width, out_width, 1, stride)

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n m p q"]:
        a = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(a)
        return self.conv2(relu(self.bn2(self.conv1(a)))) + shortcut


@final
class WideResNet(AbstractTwoStage):
    """Three stages of (depth - 4) / 6 blocks, of 16, 32, 64 times `width` channels.

    Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 1. Parameter names are those of
    RobustBench's WideResNet. Weights start as in the authors' code: He normal by fan-out for the
    convolutions, BatchNorm at 1 and 0, the last layer's bias at 0.
    """

    def __init__(self, channels: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        assert depth >= 10 and (depth - 4) % 6 == 0
        num_blocks = (depth - 4) // 6
        self.conv1 = conv(channels, 16, 3)
        self.block1 = _named_stage(16, 16 * width, num_blocks, stride=1)
        self.block2 = _named_stage(16 * width, 32 * width, num_blocks, stride=2)
        self.block3 = _named_stage(32 * width, 64 * width, num_blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        start_he_normal(self, self.fc)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        return self.conv1(x)

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        h = self.block3(self.block2(self.block1(h)))
        return self.fc(global_mean(relu(self.bn1(h))))


def _named_stage(in_width: int, out_width: int, num_blocks: int, stride: int) -> nn.Sequential:
    """A stage under RobustBench's names: block1.layer.0.conv1 and so on."""
    blocks = stage(WideBlock, in_width, out_width, num_blocks, stride)
    return nn.Sequential(OrderedDict(layer=blocks))
