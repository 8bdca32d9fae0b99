"""A network asked about images that differ from known ones in a window alone.

A convolution carries a change of a few pixels to a few more, so most of an answer is known: what a
layer computes is remembered, and only the part that the window reaches is computed again. The answer
is the network's up to rounding.
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
    """What a layer computes, where it differs from what is remembered of it."""

    node: fx.Node
    region: Region
    values: Maps


class Local:
    """Activations of a traced network on some images, kept up to date as the images change.

    Layers must leave their inputs as they are: see `fits`.
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
        self._kept: dict[fx.Node, Maps] = {}
        self._asked: dict[fx.Node, Any] = {}
        self._rows = torch.arange(len(images), device=images.device)
        self._run(images)
        self._kept = {node: self._asked[node].clone() for node in self._to_keep()}
        self._asked = {}

    @property
    def nbytes(self) -> int:
        """Memory of what is remembered."""
        return sum(kept.nbytes for kept in self._kept.values())

    def ask(self, rows: Rows, region: Region, window: Maps) -> Float[Tensor, "k classes"]:
        """The logits of images `rows` if `region` of them were `window`: counted as a whole pass."""
        (entry,) = (node for node in self._network.graph.nodes if node.op == "placeholder")
        self._rows = rows
        return self._run(Patch(entry, region, window))

    def keep(self, chosen: Bool[Tensor, " k"]) -> None:
        """Of the images last asked about, the `chosen` ones are now as they were asked about."""
        rows = self._rows[chosen]
        for node, kept in self._kept.items():
            asked = self._asked[node]
            if isinstance(asked, Patch):
                asked.region.of(kept)[rows] = asked.values[chosen]
            else:
                kept[rows] = asked[chosen]

    # -------------------------------------------------------------- one layer after another

    def _run(self, images: Images | Patch) -> Any:
        self._asked = asked = {}
        self._meter.forwards += len(self._rows)
        for node in self._network.graph.nodes:
            if node.op == "output":
                return asked[node.args[0]]
            asked[node] = images if node.op == "placeholder" else self._answer(node, asked)
        raise AssertionError("a traced network ends with its output")

    def _answer(self, node: fx.Node, asked: dict[fx.Node, Any]) -> Any:
        patches = [asked[n] for n in node.all_input_nodes if isinstance(asked[n], Patch)]
        if patches and node in self._convolutions:
            return self._convolve(node, patches[0])
        if patches and self._acts_pointwise(node, asked):
            region = reduce(operator.or_, (patch.region for patch in patches))
            values = self._apply(node, lambda n: self._part(asked[n], region))
            return Patch(node, region, values)
        return self._apply(node, lambda n: self._whole(asked[n]))

    def _apply(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """A layer as it is, on these values of its inputs."""
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
        size = self._kept[patch.node].shape[2:]
        spans = [
            reached(conv, axis, span, size[axis])
            for axis, span in enumerate((patch.region.rows, patch.region.columns))
        ]
        region, whole = Region(spans[0][0], spans[1][0]), spans[0][1] * spans[1][1]
        if region.area > LARGE * whole:
            return conv(self._whole(patch))
        seen = Region(*(needed(conv, axis, spans[axis][0]) for axis in (0, 1)))
        values = functional.conv2d(
            self._part(patch, seen), conv.weight, conv.bias, conv.stride, 0, conv.dilation,
            conv.groups,
        )  # fmt: skip
        return Patch(node, region, values)

    # -------------------------------------------------------------- what an input is, in part and whole

    def _part(self, value: Any, region: Region) -> Any:
        """A region of a patched map, zero outside the map; what is no patch holds everywhere."""
        if not isinstance(value, Patch) or value.region == region:
            return value.values if isinstance(value, Patch) else value
        kept = self._kept[value.node]
        height, width = kept.shape[2:]
        inside = Region(region.rows.within(height), region.columns.within(width))
        part = inside.of(kept)[self._rows]
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
        whole = self._kept[value.node][self._rows]
        value.region.of(whole).copy_(value.values)
        return whole

    # -------------------------------------------------------------- what kind of layer it is

    def _acts_pointwise(self, node: fx.Node, asked: dict[fx.Node, Any]) -> bool:
        """Whether nothing but the same positions of the patches changes a position of the result."""
        inputs = _inputs(node)
        if node not in self._pointwise or not all(isinstance(asked[n], Patch) for n in inputs):
            return False
        return len(inputs) == 1 or len({self._kept[asked[n].node].shape for n in inputs}) == 1

    def _sort_layers(self) -> None:
        """Find the layers that a change of the images reaches as a change of a region."""
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

    def _to_keep(self) -> list[fx.Node]:
        """The layers of which more is asked for than a patch."""
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
    """What a layer is given that depends on the images."""
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
