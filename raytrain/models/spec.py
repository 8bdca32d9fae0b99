"""A network by name: its record in the configuration, and its construction."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.types import Spec
from raytrain.models.checks import check_network, initialised
from raytrain.models.classifier import Classifier, Normalise
from raytrain.models.foreign import imported_model, torchvision_model, torchvision_names
from raytrain.models.preact_resnet import PreActResNet18
from raytrain.models.resnet import ResNet18
from raytrain.models.silu_wide_resnet import SiluWideResNet
from raytrain.models.small_cnn import SmallCNN
from raytrain.models.wide_resnet import WideResNet

MODELS: dict[str, str] = {
    "auto": "small_cnn below 32 pixels, resnet18 at 32, torchvision:resnet18 above",
    "small_cnn": "three convolutions with BatchNorm, for digits; about 57,000 parameters",
    "small_cnn_nobn": "the same without BatchNorm",
    "resnet18": "ResNet-18 with a 3x3 first convolution, for 32 pixels; 11.2 million parameters",
    "preact_resnet18": "PreActResNet-18, for 32 pixels; 11.2 million parameters",
    "wideresnet-D-W": "WideResNet of depth D = 6 n + 4 and width W, such as wideresnet-28-10",
    "wideresnet-D-W-silu": "the same with SiLU, as in RobustBench's DMWideResNet",
    "torchvision:NAME": "an untrained image classifier of torchvision, for 3 channels",
    "module:function": "your own: function(num_classes=..., **kwargs) returns a new nn.Module",
}

_OWN: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_cnn_nobn": partial(SmallCNN, batch_norm=False),
    "resnet18": ResNet18,
    "preact_resnet18": PreActResNet18,
}


class ModelSpec(Spec):
    """Which network, by a name of `MODELS`; a bare string in its place is that name.

    A torchvision name also goes without its prefix, except `resnet18`, which is raytrain's own.

    >>> ModelSpec().resolved(size=8), ModelSpec(name="wideresnet-28-10").resolved(size=32)
    ('small_cnn', 'wideresnet-28-10')
    >>> network = ModelSpec(name="small_cnn").build(1, 8, 10, mean=[0.3], std=[0.4])
    >>> sum(weights.numel() for weights in network.parameters())
    56554
    """

    bare: ClassVar[str | None] = "name"

    name: Annotated[
        str, Field(description="auto: by the size of the images", examples=[*MODELS])
    ] = "auto"
    normalise: Annotated[
        bool, Field(description="false: the input of the network is the pixels in [0, 1]")
    ] = True
    kwargs: Annotated[
        dict[str, Any], Field(description="for torchvision:NAME and module:function only")
    ] = {}

    def resolved(self, size: int) -> str:
        """Return the name of the network for images of this height and width: never `auto`."""
        return _automatic(size) if self.name == "auto" else self.name

    def foreign(self, size: int) -> bool:
        """Whether the network is not raytrain's: torchvision's, or the user's own."""
        return _own(self.resolved(size)) is None

    @property
    def users(self) -> bool:
        """Whether the network is the user's own."""
        return ":" in self.name.removeprefix("torchvision:")

    def build(
        self,
        channels: int,
        size: int,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Classifier:
        """Build a new network from images (n, channels, size, size) in [0, 1] to logits (n, classes).

        `mean` and `std` hold one number per channel; weights are drawn from torch's global
        generator. A network that is not raytrain's is tried on a few images.

        Raises:
            RequestError: if there is no such network, or it is no classifier of these images.
        """
        if not self.normalise:
            mean, std = [0.0] * channels, [1.0] * channels
        normalise, name = Normalise(channels, mean, std), self.resolved(size)
        own = _own(name)
        if own is None:
            shape = channels, size, size
            foreign = Classifier(normalise, self._foreign(name, channels, classes), name)
            model = initialised(foreign, shape)
            check_network(model, shape, classes)
            return model
        if self.kwargs:
            raise RequestError(f"model.kwargs: {name} takes none, but {sorted(self.kwargs)} given")
        return Classifier(normalise, own(channels, classes), name)

    def _foreign(self, name: str, channels: int, classes: int) -> nn.Module:
        bare = name.removeprefix("torchvision:")
        if ":" in bare:
            return imported_model(name, classes, self.kwargs)
        theirs = torchvision_names()
        if bare not in theirs:
            prefix = name.removesuffix(bare)
            raise _unknown(name, [prefix + their for their in theirs])
        return torchvision_model(bare, channels, classes, self.kwargs)


def _automatic(size: int) -> str:
    if size < 32:
        return "small_cnn"
    return "resnet18" if size == 32 else "torchvision:resnet18"


def _own(name: str) -> Callable[[int, int], nn.Module] | None:
    return _OWN.get(name) or _wide(name)


def _wide(name: str) -> Callable[[int, int], nn.Module] | None:
    match = re.fullmatch(r"wideresnet-(\d+)-(\d+)(-silu)?", name)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise RequestError(
            f"model.name: {name} does not exist: a WideResNet has depth 10, 16, 22, 28, 34, ... "
            "and width 1 or more"
        )
    return partial(SiluWideResNet if match[3] else WideResNet, depth=depth, width=width)


def _unknown(name: str, theirs: Sequence[str]) -> RequestError:
    names = ["auto", *_OWN, "wideresnet-28-10", "wideresnet-28-10-silu", *theirs]
    hint = nearest(name, names) or f"; expected one of {', '.join(MODELS)}"
    return RequestError(f"model.name: no model is called {name!r}{hint}")
