"""Networks written elsewhere: torchvision's classifiers and any module:function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.types import RequestError


def torchvision_names() -> list[str]:
    """The image classifiers of torchvision, which is imported here and not before."""
    models = import_module("torchvision.models")
    return models.list_models(module=models)


def torchvision_model(name: str, channels: int, classes: int, kwargs: Mapping[str, Any]) -> Any:
    """The untrained network `name` (nothing is downloaded) with a head for `classes`."""
    if channels != 3:
        raise RequestError(
            f"model.name: torchvision's {name} takes 3 channels and the images have {channels}"
        )
    make = import_module("torchvision.models").get_model_builder(name)
    return _call(name, make, {"weights": None, "num_classes": classes}, kwargs)


def imported_model(name: str, classes: int, kwargs: Mapping[str, Any]) -> Any:
    """The network made by calling `function(num_classes=classes, **kwargs)`."""
    path, _, function = name.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), function]):
        raise RequestError(f"model.name: {name!r} is not of the form module:function")
    try:
        module = import_module(path)
    except ImportError as error:
        raise RequestError(f"model.name: {path} cannot be imported ({error})") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise RequestError(f"model.name: module {path} has no function {function!r}")
    return _call(name, make, {"num_classes": classes}, kwargs)


def check_logits(name: str, network: Any, channels: int, size: int, classes: int) -> nn.Module:
    """Return the network if, in training mode, it maps two images to logits (2, classes).

    The trial leaves no trace: BatchNorm's statistics and the random numbers are put back.
    """
    if not isinstance(network, nn.Module):
        raise RequestError(f"model.name: {name} gives {type(network).__name__}, not an nn.Module")
    saved = {key: buffer.clone() for key, buffer in network.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = network(torch.zeros(2, channels, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:  # what layers raise about shapes
        images = f"{channels}x{size}x{size}"
        raise RequestError(
            f"model.name: {name} cannot take images of {images} ({_line(error)})"
        ) from error
    for key, buffer in saved.items():
        network.get_buffer(key).copy_(buffer)
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"model.name: {name} gives {type(logits).__name__} in training, not logits; switch "
            "auxiliary heads off in model.kwargs (aux_logits: false in torchvision)"
        )
    if logits.shape != (2, classes):
        shape = tuple(logits.shape)
        raise RequestError(
            f"model.name: {name} gives shape {shape} for 2 images, not (2, {classes})"
        )
    return network


def _call(
    name: str, make: Callable[..., Any], ours: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Any:
    try:
        return make(**ours, **kwargs)
    except TypeError as error:  # unknown, missing or repeated arguments
        raise RequestError(f"model.kwargs: {name} refuses them ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
