"""Rectangles of positions in feature maps, and their images and preimages under convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Positions from `start` up to but not including `stop`, along one side of a map."""

    start: int
    stop: int

    def __or__(self, other: Span) -> Span:
        return Span(min(self.start, other.start), max(self.stop, other.stop))

    def within(self, size: int) -> Span:
        return Span(max(self.start, 0), min(self.stop, size))

    def slice(self, origin: int = 0) -> slice:
        return slice(self.start - origin, self.stop - origin)


@dataclass(frozen=True)
class Region:
    """A rectangle of positions."""

    rows: Span
    columns: Span

    def __or__(self, other: Region) -> Region:
        return Region(self.rows | other.rows, self.columns | other.columns)

    @property
    def area(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def of(
        self, maps: Float[Tensor, "n c h w"], origin: Region | None = None
    ) -> Float[Tensor, "n c p q"]:
        """Return this part of maps that begin at 0, or at the corner of `origin`: a view."""
        top, left = (0, 0) if origin is None else (origin.rows.start, origin.columns.start)
        return maps[:, :, self.rows.slice(top), self.columns.slice(left)]


def common(one: Span, other: Span) -> Span:
    start = max(one.start, other.start)
    return Span(start, max(start, min(one.stop, other.stop)))


def reached(conv: Any, axis: int, span: Span, size: int) -> tuple[Span, int]:
    """Return the outputs that depend on a span of inputs, at least one, and the number of all outputs."""
    kernel = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    stride, padding = conv.stride[axis], conv.padding[axis]
    outputs = (size + 2 * padding - kernel) // stride + 1
    start = min(max(0, -(-(span.start + padding - kernel + 1) // stride)), outputs - 1)
    stop = min((span.stop - 1 + padding) // stride + 1, outputs)
    return Span(start, max(stop, start + 1)), outputs


def needed(conv: Any, axis: int, span: Span) -> Span:
    """Return the inputs on which a span of outputs depends; some may lie in the padding."""
    kernel = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    stride, padding = conv.stride[axis], conv.padding[axis]
    return Span(span.start * stride - padding, (span.stop - 1) * stride - padding + kernel)
