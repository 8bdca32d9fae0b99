"""Networks written elsewhere: torchvision's classifiers and any module:function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from raytrain.core.errors import RequestError
from raytrain.core.failures import error_summary
from raytrain.core.user_code import import_object, user_code_errors

_GIVEN = WeakTensorKeyDictionary()
"""Weights of the networks that user functions have returned in this process, as keys."""


def torchvision_names() -> list[str]:
    """List the image classifiers of torchvision, which is imported here and not at start."""
    models = import_module("torchvision.models")
    return models.list_models(module=models)


def torchvision_model(
    name: str, channels: int, classes: int, kwargs: Mapping[str, Any]
) -> nn.Module:
    """Build the untrained network `name`, without a download, with a head for `classes`."""
    if channels != 3:
        raise RequestError(
            f"model.name: torchvision's {name} takes 3 channels and the images have {channels}"
        )
    make = import_module("torchvision.models").get_model_builder(name)
    return _made(name, make, {"weights": None, "num_classes": classes}, kwargs)


def imported_model(name: str, classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a network by calling `function(num_classes=classes, **kwargs)`.

    Raises:
        RequestError: if that fails, or it shares weights with a network that was returned before.
    """
    module, found = import_object(name, "model.name", "function")
    make = _function(name, module, found)
    network = _made(name, make, {"num_classes": classes}, kwargs)
    weights: list[Tensor] = list(network.parameters())
    if any(weight in _GIVEN for weight in weights):
        raise RequestError(
            f"model.name: {name} returns weights that it has returned before; expected a new network "
            "at every call, as copy.deepcopy makes one"
        )
    _GIVEN.update(dict.fromkeys(weights))
    return network


def _function(name: str, module: ModuleType, found: Any) -> Callable[..., Any]:
    if isinstance(found, nn.Module):
        raise RequestError(
            f"model.name: {name} is one network, and every training begins with a new one; expected "
            "a function or class that makes it"
        )
    if not callable(found):
        file = getattr(module, "__file__", None)
        where = f" ({file})" if file else ""
        raise RequestError(
            f"model.name: module {module.__name__}{where} has no function {name.partition(':')[2]!r}"
        )
    return found


def _made(
    name: str, make: Callable[..., Any], ours: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in {**ours, **kwargs}.items())
    with user_code_errors(name, f"cannot be made with {given}"):
        try:
            network = make(**ours, **kwargs)
        except TypeError as error:
            if kwargs and "argument" in str(error):  # unknown, missing or repeated
                raise RequestError(
                    f"model.kwargs: {name} refuses them: {error_summary(error)}"
                ) from error
            raise
        if isinstance(network, nn.Module):
            network.state_dict()  # fails if nn.Module.__init__ was not called
            return network
    found = (
        f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
    )
    raise RequestError(f"model.name: {name} gives {found}, not an nn.Module")
