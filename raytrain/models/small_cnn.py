"""A small convolutional network for digits and other images of 8 to 32 pixels."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from raytrain.models.classifier import AbstractTwoStage
from raytrain.models.layers import global_mean


@final
class SmallCNN(AbstractTwoStage):
    """Three 3x3 convolutions (32, 64, 64 channels), the last two of stride 2, and the global mean.

    The all-convolutional plan of Springenberg et al. 2015 (arXiv 1412.6806), cut down: 56,554
    parameters for ten classes of grey images. Without BatchNorm the logits of one image do not
    depend on the others of its batch, also in training mode, and the convolutions have biases.
    """

    def __init__(self, channels: int, classes: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=not batch_norm)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=not batch_norm)
        self.conv3 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(32) if batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(64) if batch_norm else nn.Identity()
        self.bn3 = nn.BatchNorm2d(64) if batch_norm else nn.Identity()
        self.linear = nn.Linear(64, classes)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        return self.conv1(x)

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        h = relu(self.bn1(h))
        h = relu(self.bn2(self.conv2(h)))
        h = relu(self.bn3(self.conv3(h)))
        return self.linear(global_mean(h))
