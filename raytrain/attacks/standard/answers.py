"""A network as an attack from a library meets it: float32, fixed weights, every pass counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from raytrain.attacks.standard.local import Local, Region
from raytrain.meter import Meter
from raytrain.types import Images, Labels

REMEMBERED = 2**31
"""Bytes of activations that are remembered at most."""

Logits = Float[Tensor, "n classes"]
Ask = Callable[[Images], Logits]


class Answers:
    """Logits of images, from frozen copies of the network in eval mode and float32.

    Weights take no gradient, so a library that calls `.backward()` pays for the input alone.
    Attacks ask a copy that is the same function up to rounding: BatchNorm is folded into the
    convolution before it, and on a CPU channels lie innermost. Verdicts are the network's own.
    """

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        self._own = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._fast = folded(self._own)
        self._layout: torch.memory_format | None = None  # not known before the first image
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
            return self._own(images).argmax(1)

    @contextmanager
    def sieving(self, labels: Labels) -> Iterator[Sieve]:
        """Inside, row k of every question is an attempt on the k-th of `labels`, until one succeeds."""
        self._sieve = Sieve(labels, self.classes)
        try:
            yield self._sieve
        finally:
            self._sieve = None

    def local(self, images: Images) -> Local | None:
        """Activations on `images`, for questions about windows of them.

        None where the network cannot be followed layer by layer, where it would take more than 2 GiB,
        and on other devices than a CPU, whose many small kernels would take longer than the whole.
        """
        layout = self._settle(images)
        if images.device.type != "cpu" or not Local.fits(self._fast):
            return None
        images = images.contiguous(memory_format=layout)
        with torch.no_grad():
            if Local(self._fast, images[:1], Meter()).nbytes * len(images) > REMEMBERED:
                return None
            return Local(self._fast, images, self.meter)

    def _pass(self, images: Images) -> Logits:
        self.meter.forwards += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            self.meter.input_backwards += len(images)
        return self._fast(images.contiguous(memory_format=self._settle(images)))

    def _settle(self, images: Images) -> torch.memory_format:
        """The layout of images that the fast copy likes best; the copy is in it afterwards."""
        if self._layout is None:
            self._layout = _best_layout(self._fast, images.detach()[:1])
            self._fast = self._fast.to(memory_format=self._layout)  # pyright: ignore[reportCallIssue]
        return self._layout


def folded(model: nn.Module) -> nn.Module:
    """A network in eval mode with BatchNorm folded into the convolutions; itself if it cannot be traced."""
    from torch.fx.experimental.optimization import fuse

    try:
        fast = fuse(model).eval().requires_grad_(False)
    except Exception:
        # Networks from elsewhere may branch on their values, which no tracer follows.
        return model
    for module in fast.modules():
        if getattr(module, "inplace", False):  # what a layer was given is to be remembered
            vars(module)["inplace"] = False
    return fast


def _best_layout(model: nn.Module, image: Images) -> torch.memory_format:
    """Channels innermost where the processor's convolutions are faster so, and the network takes it."""
    if image.device.type != "cpu":
        return torch.contiguous_format
    try:
        with torch.no_grad():
            copy.deepcopy(model).to(memory_format=torch.channels_last)(  # pyright: ignore
                image.contiguous(memory_format=torch.channels_last)
            )
    except RuntimeError:  # a network may view its activations as rows, which this layout forbids
        return torch.contiguous_format
    return torch.channels_last


class Whole:
    """The same questions as to `Local`, answered by the whole network."""

    def __init__(self, ask: Ask, images: Images) -> None:
        self._ask, self._images = ask, images

    def ask(self, rows: Int[Tensor, " k"], region: Region, window: Images) -> Logits:
        """The logits of images `rows` if `region` of them were `window`."""
        images = self._images[rows]
        region.of(images).copy_(window)
        return self._ask(images)

    def keep(self, chosen: Bool[Tensor, " k"]) -> None:
        """Nothing is remembered: whoever asks changes the images."""


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
