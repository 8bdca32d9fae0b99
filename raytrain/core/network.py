"""The bare network: its mode, its precision, its weights and where they are for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.core.types import BatchNorm, RequestError

Precision = Literal["fp32", "bf16", "fp64"]
Network = TypeVar("Network", bound=nn.Module)


def copy_of(model: Network) -> Network:
    """A deep copy. Tensors that a pass has left on the modules are copied without their graph."""
    kept = [value for module in model.modules() for value in _graph_tensors(vars(module))]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept})


def _graph_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples that torch does not copy."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _graph_tensors(inner)


@contextmanager
def mode(model: nn.Module, wanted: BatchNorm) -> Iterator[None]:
    """BatchNorm and dropout in the `wanted` mode inside; every module as it was afterwards."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    tracking = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
    model.train(wanted != "eval")
    if wanted == "batch_nostat":
        for norm in tracking:
            norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
        for module, was in zip(modules, training, strict=True):
            module.training = was


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bfloat16 autocast where asked for; bfloat16 has float32's range, so no loss scaling is needed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained, in the model's own order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weight_grads(value: Tensor, model: nn.Module, retain_graph: bool = False) -> list[Tensor]:
    """The gradient for every trainable weight: zero for those that `value` does not depend on."""
    weights = trainable(model)
    return list(
        torch.autograd.grad(
            value, weights, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
    )


@contextmanager
def shifted(model: nn.Module, offsets: Mapping[str, Tensor]) -> Iterator[None]:
    """The named weights moved by `offsets` inside; afterwards bit for bit what they were.

    Saved copies are put back: adding an offset and subtracting it changes float32 weights.
    """
    weights = {name: p for name, p in model.named_parameters() if name in offsets}
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(offsets[name])
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])


def stem_share(model: nn.Module, image: Tensor) -> float:
    """The first layer's part of the floating-point operations of a forward pass of one `image`.

    Raises:
        RequestError: if the network does not tell its first layer (`stem`) from the `rest`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if not (hasattr(model, "stem") and hasattr(model, "rest")):
        raise RequestError(
            "model.name: this algorithm needs a network that tells its first layer (stem) from the rest, "
            f"and {type(model).__name__} does not"
        )
    with torch.no_grad(), mode(model, "eval"):
        with FlopCounterMode(display=False) as stem:
            model.stem(image)  # pyright: ignore[reportCallIssue]
        with FlopCounterMode(display=False) as whole:
            model(image)
    return stem.get_total_flops() / max(1, whole.get_total_flops())
