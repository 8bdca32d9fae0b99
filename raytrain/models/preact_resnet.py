"""PreActResNet-18: BatchNorm and ReLU come before each convolution."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from raytrain.models.classifier import AbstractTwoStage
from raytrain.models.layers import conv, global_mean, stage


@final
class PreActBlock(nn.Module):
    """x <- shortcut + conv relu bn conv (a), a = relu bn x: He et al. 2016b, figure 4e.

    The shortcut is x itself, or a 1x1 convolution of a where the width or the side changes.
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv(in_width, out_width, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.conv2 = conv(out_width, out_width, 3)
        # A Sequential only for RobustBench's name, shortcut.0.
        same = stride == 1 and in_width == out_width
        self.shortcut = None if same else nn.Sequential(conv(in_width, out_width, 1, stride))

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n m p q"]:
        a = relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(a)
        return self.conv2(relu(self.bn2(self.conv1(a)))) + shortcut


@final
class PreActResNet18(AbstractTwoStage):
    """Four stages of two pre-activation blocks, 64 to 512 channels: He et al. 2016b (1603.05027).

    Parameter names and arithmetic are those of RobustBench's PreActResNet with PreActBlockV2 and
    `bn_before_fc=True` (Rice 2020 for L2, Kireev 2021, Addepalli 2021): the input of the
    shortcut convolution is pre-activated, and a last `bn` precedes `linear`. RobustBench's other
    variant (Wong 2020, Andriushchenko 2020) has neither and does not load here. Differs from the
    paper: a 3x3 first convolution of stride 1 and no pooling after it. Weights start as torch's
    default.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 64, 3)
        self.layer1 = stage(PreActBlock, 64, 64, num_blocks=2, stride=1)
        self.layer2 = stage(PreActBlock, 64, 128, num_blocks=2, stride=2)
        self.layer3 = stage(PreActBlock, 128, 256, num_blocks=2, stride=2)
        self.layer4 = stage(PreActBlock, 256, 512, num_blocks=2, stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        return self.conv1(x)

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.linear(global_mean(relu(self.bn(h))))
