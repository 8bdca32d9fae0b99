"""A classifier: images in [0, 1] to logits, the normaliser inside, as one map or as two stages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raytrain.core.errors import ModelFailed, RequestError
from raytrain.core.user_code import sentence


@final
class Normalise(nn.Module):
    """x <- (x - mean) / std per channel; mean 0 and std 1 are the identity."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        finite = all(map(math.isfinite, [*mean, *std]))
        if not finite or len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise RequestError(
                f"data: mean and std need one finite number for each of {channels} channels, "
                f"std above 0, but are {list(mean)} and {list(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean).float().view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).float().view(-1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (x - self.mean) / self.std


class AbstractTwoStage(nn.Module, ABC):
    """f = rest o stem, the stem being the first convolution alone.

    Zhang et al. 2019 (YOPO, arXiv 1905.00877): the images enter a network only through its first
    layer, so a fixed costate after that layer gives input gradients without the later layers.
    """

    @abstractmethod
    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]: ...

    @abstractmethod
    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]: ...

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.rest(self.stem(x))


@final
class Classifier(nn.Module):
    """logits = backbone(normalise(x)), x in [0, 1].

    An attack moves pixels, so its eps is in pixels whatever the normaliser is. Keys of the state
    dict: `normalise.mean`, `normalise.std`, and `backbone.` before the backbone's own keys. `name` is
    the backbone's in the configuration; its errors are raised as `ModelFailed` with this name.
    """

    def __init__(self, normalise: Normalise, backbone: nn.Module, name: str = "") -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone
        self.name = name or type(backbone).__name__

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.answer(x)

    def stem(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        """Apply the normaliser and the first convolution, the only layers whose input is the image."""
        return self._run(self._two_stage().stem, self.normalise(x))

    def rest(self, h: Float[Tensor, "n k p q"]) -> Float[Tensor, "n classes"]:
        """Apply all later layers: `model(x)` is `model.rest(model.stem(x))` bit for bit."""
        return self._run(self._two_stage().rest, h)

    def answer(self, x: Tensor) -> Any:
        """Return the raw output of the backbone: logits, if it is a classifier."""
        return self._run(self.backbone, self.normalise(x))

    def _run(self, part: Callable[[Tensor], Any], x: Tensor) -> Any:
        try:
            return part(x)
        except Exception as error:  # not SystemExit, which may be the end of a Ray worker
            mode = "training" if self.training else "evaluation"
            size = "x".join(str(length) for length in x.shape[1:])
            many = f"{len(x)} images" if len(x) > 1 else "1 image"
            deed = f"cannot take {many} of {size} in {mode} mode"
            raise ModelFailed(sentence(self.name, deed, error)) from error

    def _two_stage(self) -> AbstractTwoStage:
        if not isinstance(self.backbone, AbstractTwoStage):
            raise RequestError(
                f"model.name: {type(self.backbone).__name__} does not separate its first layer from "
                "the rest; choose a network of raytrain's own, such as resnet18"
            )
        return self.backbone
