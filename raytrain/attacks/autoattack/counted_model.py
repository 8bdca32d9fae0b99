"""A network as an attack from a library meets it: float32, fixed weights, every pass counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from raytrain.core.cost import Meter
from raytrain.core.network import copy_of
from raytrain.core.types import Images, Labels

Logits = Float[Tensor, "n classes"]
Ask = Callable[[Images], Logits]


class Answers:
    """Logits of images, from frozen copies of the network in eval mode and float32.

    Weights take no gradient, so a library that calls `.backward()` pays for the input alone.
    Attacks ask a copy that is the same function up to rounding: BatchNorm is folded into the
    convolution before it, and on a CPU channels lie innermost. Whether it is, is seen on the first
    images; verdicts are the network's own.
    """

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        self._own = copy_of(model).float().eval().requires_grad_(False)
        self._folded = folded(self._own)
        self._fast: nn.Module | None = None  # not known before the first images
        self._layout = torch.contiguous_format
        self.meter = meter
        self._sieve: Sieve | None = None

    def __call__(self, images: Images) -> Logits:
        if self._sieve is not None:
            return self._sieve.answer(self._pass, images)
        return self._pass(images)

    def classes(self, images: Images) -> Labels:
        """What the network itself takes the images for."""
        self.meter.forwards += len(images)
        with torch.no_grad():
            return self._own(images.clone()).argmax(1)  # a network may overwrite what it is given

    @contextmanager
    def sieving(self, labels: Labels) -> Iterator[Sieve]:
        """Inside, row k of every question is an attempt on the k-th of `labels`, until one succeeds."""
        self._sieve = Sieve(labels, self.classes)
        try:
            yield self._sieve
        finally:
            self._sieve = None

    def _pass(self, images: Images) -> Logits:
        self.meter.forwards += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            self.meter.input_backwards += len(images)
        fast = self._settled(images)
        return fast(images.clone(memory_format=self._layout))

    def _settled(self, images: Images) -> nn.Module:
        """The copy that is attacked; `_layout` is what it wants images to be in."""
        if self._fast is None:
            self._fast, self._layout = fast_copy(self._own, self._folded, images.detach())
        return self._fast


def fast_copy(
    own: nn.Module, short: nn.Module, images: Images
) -> tuple[nn.Module, torch.memory_format]:
    """The fastest copy that answers as the network does, and the layout of its images.

    Asked about some of `images` and about noise: `short`, what was traced of it, may be another function
    (weights used twice, activations overwritten, branches on types), and some networks do not take
    channels last.
    """
    few = images[:4]
    noise = torch.rand(few.shape, generator=torch.Generator().manual_seed(0)).to(few)
    probe = torch.cat([few, noise])
    layouts = [torch.contiguous_format]
    if images.device.type == "cpu":  # where their convolutions are faster
        layouts.insert(0, torch.channels_last)
    with torch.no_grad():
        wanted = own(probe.clone())
        for model in (short, own):
            for layout in layouts:
                fast: Any = copy.deepcopy(model)
                # What tracers and layouts do not bear differs from network to network.
                with suppress(Exception):
                    fast = fast.to(memory_format=layout)
                    if _alike(fast(probe.clone(memory_format=layout)), wanted):
                        return fast, layout
    return own, torch.contiguous_format


def _alike(found: Logits, wanted: Logits) -> bool:
    scale = wanted.abs().amax().nan_to_num(0.0, 0.0, 0.0)
    return torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(scale), equal_nan=True)


def folded(model: nn.Module) -> nn.Module:
    """A network in eval mode with BatchNorm folded into the convolutions; itself if it cannot be traced."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(model).eval().requires_grad_(False)
    except Exception:
        # Networks from elsewhere may branch on their values, which no tracer follows.
        return model


class Sieve:
    """Rows that have been misclassified once are not asked about again: they keep their logits.

    `judge` has the last word on it.

    Sound only while every question lies inside the threat model, as all of APGD's steps do.
    """

    def __init__(self, labels: Labels, judge: Callable[[Images], Labels]) -> None:
        self._labels, self._judge = labels, judge
        self.fallen: Bool[Tensor, " n"] = torch.zeros_like(labels, dtype=torch.bool)
        self.found: Images | None = None  # for rows that have fallen: what they fell to
        self._logits: Logits | None = None

    def answer(self, ask: Ask, images: Images) -> Logits:
        """The logits of `images`, those of fallen rows without the network and without gradient."""
        if self._logits is None or self.found is None or not bool(self.fallen.any()):
            logits = ask(images)
        else:
            standing = (~self.fallen).nonzero().flatten()
            logits = self._logits
            if len(standing):
                logits = logits.index_copy(0, standing, ask(images.index_select(0, standing)))
            elif images.requires_grad:
                logits = logits + 0 * images.flatten(1).sum(1, keepdim=True)
        self._note(images.detach(), logits.detach())
        return logits

    def _note(self, images: Images, logits: Logits) -> None:
        if self.found is None or self._logits is None:
            self.found, self._logits = images.clone(), logits.clone()
        fresh = ~self.fallen & (logits.argmax(1) != self._labels)
        rows = fresh.nonzero().flatten()
        if len(rows):  # the copy that is attacked may be wrong in the last bit
            fresh[rows] = self._judge(images[rows]) != self._labels[rows]
        self.found[fresh], self._logits[fresh] = images[fresh], logits[fresh]
        self.fallen = self.fallen | fresh
