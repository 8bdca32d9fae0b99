"""ResNet-18 for images of about 32 pixels."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from raytrain.models.classifier import AbstractTwoStage
from raytrain.models.layers import conv, global_mean, stage


@final
class ResidualBlock(nn.Module):
    """x <- relu(shortcut(x) + F(x)), F = bn conv relu bn conv: He et al. 2016, equation 1."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_width, out_width, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.conv2 = conv(out_width, out_width, 3)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != out_width:
            self.shortcut.append(conv(in_width, out_width, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(out_width))

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n m p q"]:
        h = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(h)) + self.shortcut(x))


@final
class ResNet18(AbstractTwoStage):
    """Four stages of two residual blocks, 64 to 512 channels: He et al. 2016 (arXiv 1512.03385).

    Differs from the paper's ImageNet network: a 3x3 first convolution of stride 1 and no pooling
    after it. Parameter names are those of RobustBench's ResNet18. Weights start as torch's
    default.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(ResidualBlock, 64, 64, num_blocks=2, stride=1)
        self.layer2 = stage(ResidualBlock, 64, 128, num_blocks=2, stride=2)
        self.layer3 = stage(ResidualBlock, 128, 256, num_blocks=2, stride=2)
        self.layer4 = stage(ResidualBlock, 256, 512, num_blocks=2, stride=2)
        self.linear = nn.Linear(512, classes)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        return self.conv1(x)

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        h = relu(self.bn1(h))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.linear(global_mean(h))
