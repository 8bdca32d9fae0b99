"""WideResNet-depth-width with SiLU: the network of the strongest results on CIFAR-10 since 2020."""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from raytrain.models.classifier import AbstractTwoStage
from raytrain.models.layers import conv, global_mean, stage, start_he_normal

_MOMENTUM = 0.01  # of BatchNorm


@final
class SiluBlock(nn.Module):
    """x <- shortcut + conv silu bn conv (a), a = silu bn x.

    The shortcut is x itself, or a 1x1 convolution of a where the width changes. The first
    convolution is padded as TensorFlow's "SAME": at stride 2 an image of even side gets a line
    below and a column at the right, and none above and at the left (of odd side: all four).
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(in_width, momentum=_MOMENTUM)
        self.conv_0 = nn.Conv2d(in_width, out_width, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_width, momentum=_MOMENTUM)
        self.conv_1 = conv(out_width, out_width, 3)
        # A stride occurs only in the first block of a stage, which changes the width.
        same = in_width == out_width
        self.shortcut = None if same else conv(in_width, out_width, 1, stride)

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n m p q"]:
        a = silu(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        h = silu(self.batchnorm_1(self.conv_0(pad(a, self._borders(*a.shape[2:])))))
        return self.conv_1(h) + shortcut

    def _borders(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, right, top and bottom border, for an output of 1 / stride of the side, rounded up."""
        left, top = (int(self.stride == 1 or side % 2 == 1) for side in (width, height))
        return left, 1, top, 1


@final
class SiluWideResNet(AbstractTwoStage):
    """Three stages of (depth - 4) / 6 blocks, of 16, 32, 64 times `width` channels.

    Gowal et al. 2020 (arXiv 2010.03593): SiLU in place of ReLU. Parameter names and
    arithmetic are those of RobustBench's DMWideResNet with `activation_fn=Swish`. BatchNorm has momentum
    0.01, which is the decay 0.99 of the authors' code. Weights start as in Rade's re-implementation
    of their training (github.com/imrahulr/adversarial_robustness_pytorch), from which Wang et al. 2023
    (2302.04638) start too, since the authors' PyTorch code only evaluates: He normal by fan-out for
    convolutions, BatchNorm at 1 and 0, the last layer's bias at 0. Differs from them in a global mean
    in place of a mean over 8x8, so that images of any side are taken.
    """

    def __init__(self, channels: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        assert depth >= 10 and (depth - 4) % 6 == 0
        num_blocks = (depth - 4) // 6
        self.init_conv = conv(channels, 16, 3)
        self.layer = nn.Sequential(
            _named_stage(16, 16 * width, num_blocks, stride=1),
            _named_stage(16 * width, 32 * width, num_blocks, stride=2),
            _named_stage(32 * width, 64 * width, num_blocks, stride=2),
        )
        self.batchnorm = nn.BatchNorm2d(64 * width, momentum=_MOMENTUM)
        self.logits = nn.Linear(64 * width, classes)
        start_he_normal(self, self.logits)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        return self.init_conv(x)

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        return self.logits(global_mean(silu(self.batchnorm(self.layer(h)))))


def _named_stage(in_width: int, out_width: int, num_blocks: int, stride: int) -> nn.Sequential:
    """A stage under RobustBench's names: layer.0.block.0.conv_0 and so on."""
    blocks = stage(SiluBlock, in_width, out_width, num_blocks, stride)
    return nn.Sequential(OrderedDict(block=blocks))
