"""A network by name: its record in the configuration, and its construction."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    PositiveFloat,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import nn

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.types import ADDED, Spec
from raytrain.models.checks import check_network, initialised
from raytrain.models.classifier import Classifier, Normalise
from raytrain.models.foreign import imported_model, torchvision_model, torchvision_names
from raytrain.models.preact_resnet import PreActResNet18
from raytrain.models.resnet import ResNet18
from raytrain.models.robustbench import layout_of, load_robustbench, read_robustbench
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
    "robustbench:FILE": "one of the last four, with the weights and the normaliser of RobustBench's file",
    "torchvision:NAME": "an untrained image classifier of torchvision, for 3 channels",
    "module:function": "your own: function(num_classes=..., **kwargs) returns a new nn.Module",
}

ROBUSTBENCH = "robustbench:"
"""Begins a name that is followed by the path of a file."""

_OWN: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_cnn_nobn": partial(SmallCNN, batch_norm=False),
    "resnet18": ResNet18,
    "preact_resnet18": PreActResNet18,
}


class ModelSpec(Spec):
    """Which network, by a name of `MODELS`; a bare string in its place is that name.

    A torchvision name also goes without its prefix, except `resnet18`, which is raytrain's own.
    `robustbench:FILE` is replaced in validation by the name of the network that the file is of, the
    absolute path of the file as `weights`, and its normaliser as `normalise`, `mean` and `std`.

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
    mean: Annotated[
        tuple[FiniteFloat, ...] | None,
        ADDED,
        Field(description="of the normaliser, a number per channel (default: the data set's)"),
    ] = None
    std: Annotated[
        tuple[Annotated[PositiveFloat, Field(allow_inf_nan=False)], ...] | None,
        ADDED,
        Field(description="of the normaliser, likewise"),
    ] = None
    weights: Annotated[
        Path | None,
        ADDED,
        AfterValidator(lambda path: None if path is None else path.expanduser().absolute()),
        Field(description="file of weights to start from: a state dict with RobustBench's names"),
    ] = None
    kwargs: Annotated[
        dict[str, Any], Field(description="for torchvision:NAME and module:function only")
    ] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _from_robustbench(cls, values: Any, handler: Callable[[Any], ModelSpec]) -> ModelSpec:
        asked = handler(values)
        if not asked.name.startswith(ROBUSTBENCH):
            return asked
        path = Path(asked.name.removeprefix(ROBUSTBENCH)).expanduser().absolute()
        try:
            layout = layout_of(path)
        except RequestError as error:
            raise _part_error(f"name: {error}") from error
        found: dict[str, Any] = {"weights": path, "normalise": asked.mean is not None}
        if layout.mean is not None:
            found |= {"normalise": True, "mean": layout.mean, "std": layout.std}
        for field, value in found.items():
            given = getattr(asked, field)
            if given not in (None, True, value):
                raise _part_error(f"{field}: {path.name} has {value}, found {given}; expected one")
        return handler({**asked.model_dump(), **found, "name": layout.name})

    @model_validator(mode="after")
    def _one_normaliser(self) -> ModelSpec:
        if (self.mean is None) is not (self.std is None):
            raise _part_error("mean: expected together with std, or neither")
        if self.mean is not None and not self.normalise:
            raise _part_error("mean: not applied with normalise=false; expected none, or true")
        return self

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
        mean, std = self.statistics(channels, mean, std)
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

    def statistics(
        self, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and std of the network's normaliser for images with these; 0 and 1 without one."""
        if not self.normalise:
            return [0.0] * channels, [1.0] * channels
        if self.mean is None or self.std is None:
            return mean, std
        if not len(self.mean) == len(self.std) == channels:
            raise RequestError(
                f"model.mean: expected a number for each of {channels} channels in mean and std, found "
                f"{len(self.mean)} and {len(self.std)}"
            )
        return self.mean, self.std

    def load_weights(self, model: Classifier, channels: int, classes: int) -> None:
        """Load `weights`, if there are any, into the network that `build` has returned.

        Raises:
            RequestError: if the file is of another network, or of one for other images or classes.
        """
        if self.weights is None:
            return
        try:
            layout, state = layout_of(self.weights), read_robustbench(self.weights)
            expected = (
                f"expected weights of {model.name} for {classes} classes and {channels} channels"
            )
            kind = f"{layout.name} for {layout.classes} classes and {layout.channels} channels"
            if (layout.name, layout.channels, layout.classes) != (model.name, channels, classes):
                raise RequestError(f"{self.weights} is of {kind}; {expected}")
            if layout.mean is not None and layout.std is not None:
                theirs = Normalise(channels, layout.mean, layout.std).state_dict().values()
                ours = model.normalise.state_dict().values()
                if not all(map(torch.equal, ours, theirs)):
                    raise RequestError(
                        f"{self.weights} has the normaliser mean {layout.mean}, std {layout.std}; "
                        "expected the same in model.mean and model.std"
                    )
            load_robustbench(model, state)
        except RequestError as error:
            raise RequestError(f"model.weights: {error}") from error

    def _foreign(self, name: str, channels: int, classes: int) -> nn.Module:
        bare = name.removeprefix("torchvision:")
        if ":" in bare:
            return imported_model(name, classes, self.kwargs)
        theirs = torchvision_names()
        if bare not in theirs:
            prefix = name.removesuffix(bare)
            raise _unknown(name, [prefix + their for their in theirs])
        return torchvision_model(bare, channels, classes, self.kwargs)


def _part_error(sentence: str) -> PydanticCustomError:
    """An error whose sentence begins with a field of the record."""
    return PydanticCustomError("part", "{said}", {"said": sentence})


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
