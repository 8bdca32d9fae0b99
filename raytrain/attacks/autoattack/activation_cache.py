"""Logits of images that differ from cached ones in a window.

A change of a few pixels reaches a few more in each convolution, so most activations stay as they are:
they are cached, and only the region that depends on the window is computed again. The logits are the
network's up to rounding.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional

from raytrain.attacks.autoattack.regions import Region, common, needed, reached
from raytrain.core.cost import Meter
from raytrain.core.types import Images, Rows

Maps = Float[Tensor, "n c h w"]

LARGE = 0.5
"""A change that reaches more than this share of a layer is computed as a whole."""

_POINTWISE_MODULES = (nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.BatchNorm2d, nn.Identity)
_POINTWISE_FUNCTIONS: set[Callable[..., Any]] = {
    torch.relu, functional.relu, functional.silu, functional.gelu,
    torch.add, operator.add, operator.sub, operator.mul, operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Patch:
    """Values of a layer in the region where they differ from the cached ones."""

    node: fx.Node
    region: Region
    values: Maps


class ActivationCache:
    """Activations of a traced network on some images, kept up to date as the images change.

    Layers must not work in place: see `fits`.
    """

    @staticmethod
    def fits(network: nn.Module) -> TypeGuard[fx.GraphModule]:
        """Whether a network maps one tensor to one, and its layers change nothing in place."""
        if not isinstance(network, fx.GraphModule):
            return False
        nodes = list(network.graph.nodes)
        entries = [node for node in nodes if node.op == "placeholder"]
        single = len(entries) == 1 and isinstance(nodes[-1].args[0], fx.Node)
        in_place = any(getattr(module, "inplace", False) for module in network.modules())
        return single and not in_place and not any(_changes_in_place(node) for node in nodes)

    def __init__(self, network: fx.GraphModule, images: Images, meter: Meter) -> None:
        self._network, self._meter = network, meter
        self._modules: dict[str, Any] = dict(network.named_modules())
        self._convolutions: set[fx.Node] = set()
        self._pointwise: set[fx.Node] = set()
        self._sort_layers()
        self._cached: dict[fx.Node, Maps] = {}
        self._latest: dict[fx.Node, Any] = {}
        self._rows = torch.arange(len(images), device=images.device)
        self._run(images)
        self._cached = {node: self._latest[node].clone() for node in self._layers_to_cache()}
        self._latest = {}

    @property
    def nbytes(self) -> int:
        """Size of the cached activations."""
        return sum(cached.nbytes for cached in self._cached.values())

    def logits(self, rows: Rows, region: Region, window: Maps) -> Float[Tensor, "k classes"]:
        """The logits of images `rows` if `region` of them were `window`: counted as a whole pass."""
        (entry,) = (node for node in self._network.graph.nodes if node.op == "placeholder")
        self._rows = rows
        return self._run(Patch(entry, region, window))

    def update(self, chosen: Bool[Tensor, " k"]) -> None:
        """Update the cache: of the images of the last call, the `chosen` ones have their window replaced."""
        rows = self._rows[chosen]
        for node, cached in self._cached.items():
            latest = self._latest[node]
            if isinstance(latest, Patch):
                latest.region.of(cached)[rows] = latest.values[chosen]
            else:
                cached[rows] = latest[chosen]

    # -------------------------------------------------------------- forward pass, layer by layer

    def _run(self, images: Images | Patch) -> Any:
        self._latest = latest = {}
        self._meter.forwards += len(self._rows)
        for node in self._network.graph.nodes:
            if node.op == "output":
                return latest[node.args[0]]
            latest[node] = images if node.op == "placeholder" else self._compute(node, latest)
        raise AssertionError("a traced network ends with its output")

    def _compute(self, node: fx.Node, latest: dict[fx.Node, Any]) -> Any:
        patches = [latest[n] for n in node.all_input_nodes if isinstance(latest[n], Patch)]
        if patches and node in self._convolutions:
            return self._convolve(node, patches[0])
        if patches and self._acts_pointwise(node, latest):
            region = reduce(operator.or_, (patch.region for patch in patches))
            values = self._apply(node, lambda n: self._part(latest[n], region))
            return Patch(node, region, values)
        return self._apply(node, lambda n: self._whole(latest[n]))

    def _apply(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Run a layer on these values of its inputs."""
        if node.op == "get_attr":
            return _attribute(self._network, node)
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        target: Any = node.target
        if node.op == "call_module":
            return self._modules[target](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _convolve(self, node: fx.Node, patch: Patch) -> Any:
        conv: Any = self._modules[str(node.target)]
        size = self._cached[patch.node].shape[2:]
        spans = [
            reached(conv, axis, span, size[axis])
            for axis, span in enumerate((patch.region.rows, patch.region.columns))
        ]
        region, whole = Region(spans[0][0], spans[1][0]), spans[0][1] * spans[1][1]
        if region.area > LARGE * whole:
            return conv(self._whole(patch))
        inputs = Region(*(needed(conv, axis, spans[axis][0]) for axis in (0, 1)))
        values = functional.conv2d(
            self._part(patch, inputs), conv.weight, conv.bias, conv.stride, 0, conv.dilation,
            conv.groups,
        )  # fmt: skip
        return Patch(node, region, values)

    # -------------------------------------------------------------- inputs of a layer, in part and whole

    def _part(self, value: Any, region: Region) -> Any:
        """Return a region of a patched map, zero outside the map; other values are returned unchanged."""
        if not isinstance(value, Patch) or value.region == region:
            return value.values if isinstance(value, Patch) else value
        cached = self._cached[value.node]
        height, width = cached.shape[2:]
        inside = Region(region.rows.within(height), region.columns.within(width))
        part = inside.of(cached)[self._rows]
        both = Region(
            common(inside.rows, value.region.rows),
            common(inside.columns, value.region.columns),
        )
        if both.area > 0:
            both.of(part, inside).copy_(both.of(value.values, value.region))
        edges = (
            inside.columns.start - region.columns.start,
            region.columns.stop - inside.columns.stop,
            inside.rows.start - region.rows.start,
            region.rows.stop - inside.rows.stop,
        )
        return functional.pad(part, edges) if any(edges) else part

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, Patch):
            return value
        whole = self._cached[value.node][self._rows]
        value.region.of(whole).copy_(value.values)
        return whole

    # -------------------------------------------------------------- kinds of layers

    def _acts_pointwise(self, node: fx.Node, latest: dict[fx.Node, Any]) -> bool:
        """Whether a position of the result depends on the same position of the patches alone."""
        inputs = _inputs(node)
        if node not in self._pointwise or not all(isinstance(latest[n], Patch) for n in inputs):
            return False
        return len(inputs) == 1 or len({self._cached[latest[n].node].shape for n in inputs}) == 1

    def _sort_layers(self) -> None:
        """Find the convolutions and pointwise layers that are reached through such layers only."""
        reached: set[fx.Node] = set()
        for node in self._network.graph.nodes:
            inputs = _inputs(node)
            if node.op != "placeholder" and not (inputs and reached.issuperset(inputs)):
                continue
            if self._is_convolution(node):
                self._convolutions.add(node)
            elif self._is_pointwise(node):
                self._pointwise.add(node)
            elif node.op != "placeholder":
                continue
            reached.add(node)

    def _layers_to_cache(self) -> list[fx.Node]:
        """Return the layers whose values are used outside a patch."""
        known = self._convolutions | self._pointwise
        return [
            node
            for node in self._network.graph.nodes
            if (node.op == "placeholder" or node in known)
            and any(n not in self._pointwise or len(_inputs(n)) > 1 for n in node.users)
        ]

    def _is_convolution(self, node: fx.Node) -> bool:
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        return (
            type(module) is nn.Conv2d
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and not _is_hooked(module)
        )

    def _is_pointwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            moves = isinstance(module, nn.BatchNorm2d) and module.running_mean is None
            return type(module) in _POINTWISE_MODULES and not moves and not _is_hooked(module)
        constants = (n for n in node.all_input_nodes if n.op == "get_attr")
        return (
            node.op == "call_function"
            and node.target in _POINTWISE_FUNCTIONS
            and all(_same_everywhere(_attribute(self._network, n)) for n in constants)
        )


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a layer that depend on the images."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _attribute(network: nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(network)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _changes_in_place(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    try:
        names: list[str] = list(inspect.signature(node.target).parameters)  # pyright: ignore
    except (TypeError, ValueError):  # of a method, or of a function in C
        names = []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(given.get("inplace", False))


def _same_everywhere(constant: Any) -> bool:
    return isinstance(constant, Tensor) and (constant.dim() == 0 or constant.shape[-2:] == (1, 1))
