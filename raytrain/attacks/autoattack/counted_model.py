"""A network as an attack from a library meets it: float32, fixed weights, every pass counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from raytrain.attacks.autoattack.local import Local
from raytrain.attacks.autoattack.regions import Region, Span
from raytrain.core.cost import Meter
from raytrain.core.network import copy_of
from raytrain.core.types import Images, Labels

REMEMBERED = 2**31
"""Bytes of activations that are remembered at most."""

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

        None where the network cannot be followed layer by layer, where 2 GiB do not hold what is
        remembered, and on other devices than a CPU: many small kernels would take longer there.
        """
        fast, images = self._settled(images), images.contiguous(memory_format=self._layout)
        if images.device.type != "cpu" or not Local.fits(fast):
            return None
        few = images[:2].clone()
        with torch.no_grad():
            if not _follows(fast, few) or Local(fast, few, Meter()).nbytes * len(images) > (
                REMEMBERED * len(few)
            ):
                return None
            return Local(fast, images, self.meter)

    def _pass(self, images: Images) -> Logits:
        self.meter.forwards += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            self.meter.input_backwards += len(images)
        fast = self._settled(images)
        return fast(images.contiguous(memory_format=self._layout))

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
        wanted = own(probe.clone())  # a network may overwrite what it is given
        for model in (_overwriting_nothing(short), short, own):
            for layout in layouts:
                fast: Any = copy.deepcopy(model)
                # What tracers and layouts do not bear differs from network to network.
                with suppress(Exception):
                    fast = fast.to(memory_format=layout)
                    if _alike(fast(probe.clone(memory_format=layout)), wanted):
                        return fast, layout
    return own, torch.contiguous_format


def _overwriting_nothing(model: nn.Module) -> nn.Module:
    """A copy in which what a layer was given stays as it was: it is to be remembered."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            vars(module)["inplace"] = False
    return model


def _alike(found: Logits, wanted: Logits) -> bool:
    scale = wanted.abs().amax().nan_to_num(0.0, 0.0, 0.0)
    return torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(scale), equal_nan=True)


def _follows(fast: nn.Module, few: Images) -> bool:
    """Whether answers about windows are those of the whole network, before and after a change."""
    height, width = few.shape[2:]
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(len(few))
    images, size = few.clone(), min(3, height // 2, width // 2)
    try:
        local = Local(fast, few, Meter())  # pyright: ignore[reportArgumentType]
        for top, left in ((0, 0), (height // 2, width // 3), (height - size, width - size)):
            region = Region(Span(top, top + size), Span(left, left + size))
            window = torch.rand(region.of(images).shape, generator=generator)
            region.of(images).copy_(window)
            if not _alike(local.ask(rows, region, window), fast(images)):
                return False
            local.keep(torch.ones(len(rows), dtype=torch.bool))
    except Exception:  # a network may do to its activations what nobody has thought of
        return False
    return True


def folded(model: nn.Module) -> nn.Module:
    """A network in eval mode with BatchNorm folded into the convolutions; itself if it cannot be traced."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(model).eval().requires_grad_(False)
    except Exception:
        # Networks from elsewhere may branch on their values, which no tracer follows.
        return model


class WholeModel:
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
