"""Modes, precision and weights of a network, and temporary changes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.core.errors import RequestError
from raytrain.core.types import BatchNorm, Predict

Precision = Literal["fp32", "bf16", "fp64"]
Network = TypeVar("Network", bound=nn.Module)


def copy_of(model: Network) -> Network:
    """Return a deep copy. Tensors that a pass has stored on modules are copied without their graph."""
    copied = [value for module in model.modules() for value in _graph_tensors(vars(module))]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in copied})


def _graph_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples that torch does not copy."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _graph_tensors(inner)


@dataclass(frozen=True)
class FrozenNetwork:
    """A network for gradients of the input alone; the weights and buffers are those of another one.

    A compiled backward pass computes all gradients that its network requires, so that attacks on the
    trained network would compute those of the weights too.
    """

    module: nn.Module  # its mode is that of the passes
    predict: Predict  # `module`, or a compiled form of it

    @classmethod
    def of(cls, model: nn.Module, compiled: Callable[[nn.Module], Predict]) -> FrozenNetwork:
        """A frozen copy of `model` that shares its storage, for passes through `compiled(copy)`."""
        module = copy_of(model)
        ours = [*model.parameters(), *model.buffers()]
        for own, shared in zip([*module.parameters(), *module.buffers()], ours, strict=True):
            own.data = shared.data
            own.requires_grad_(False)
        return cls(module, compiled(module))


@contextmanager
def mode(model: nn.Module, bn: BatchNorm) -> Iterator[None]:
    """Set BatchNorm and dropout to mode `bn` inside the block; restore every module afterwards."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    tracking = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
    model.train(bn != "eval")
    if bn == "batch_nostat":
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
    """Return bfloat16 autocast for `bf16`, which needs no loss scaling: its range is that of float32.

    Converted weights are not cached: every pass uses each once, and a replayed pass must convert anew.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained weights, in the model's own order."""
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
    """Add `offsets` to the named weights inside the block; restore them bit for bit afterwards.

    Saved copies are restored, because adding an offset and subtracting it changes float32 weights.
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
        RequestError: if the network has no separate first layer (`stem` and `rest`).
    """
    from torch.utils.flop_counter import FlopCounterMode

    if not (hasattr(model, "stem") and hasattr(model, "rest")):
        raise RequestError(
            "model.name: this algorithm needs a network with its first layer (stem) apart from the rest, "
            f"and {type(model).__name__} does not"
        )
    with torch.no_grad(), mode(model, "eval"), FlopCounterMode(display=False) as stem:
        model.stem(image)  # pyright: ignore[reportCallIssue]
    return stem.get_total_flops() / max(1, forward_flops(model, image))


def forward_flops(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of a forward pass of one `image` in eval mode, of its products only: a
    multiplication and an addition are two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), mode(model, "eval"), FlopCounterMode(display=False) as whole:
        model(image)
    return whole.get_total_flops()
