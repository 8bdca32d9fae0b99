"""Wrapper of a network for library attacks: float32, fixed weights, every pass counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from raytrain.attacks.autoattack.activation_cache import ActivationCache
from raytrain.attacks.autoattack.regions import Region, Span
from raytrain.core.cost import Meter
from raytrain.core.network import copy_of
from raytrain.core.types import Images, Labels

MAX_CACHE_BYTES = 2**31
"""Largest number of bytes of cached activations."""

Logits = Float[Tensor, "n classes"]
Forward = Callable[[Images], Logits]


class CountedModel:
    """Logits of images, from frozen copies of the network in eval mode and float32.

    Weights take no gradient, so that `.backward()` in a library costs the input gradient alone.
    Attacks use a copy that is the same function up to rounding: BatchNorm is folded into the
    convolution before it, and on a CPU channels are the last axis. That is checked on the first
    images. Whether an image counts as misclassified is decided by the network itself (`classes`).
    """

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        self._own = copy_of(model).float().eval().requires_grad_(False)
        self._folded = folded(self._own)
        self._fast: nn.Module | None = None  # chosen at the first images
        self._layout = torch.contiguous_format
        self.meter = meter
        self._fallen_rows: FallenRows | None = None

    def __call__(self, images: Images) -> Logits:
        if self._fallen_rows is not None:
            return self._fallen_rows.logits(self._pass, images)
        return self._pass(images)

    def classes(self, images: Images) -> Labels:
        """Return the classes that the network itself gives the images."""
        self.meter.forwards += len(images)
        with torch.no_grad():
            return self._own(images).argmax(1)

    @contextmanager
    def skipping_fallen(self, labels: Labels) -> Iterator[FallenRows]:
        """Stop evaluating misclassified rows inside the block; row k of every batch belongs to label k."""
        self._fallen_rows = FallenRows(labels, self.classes)
        try:
            yield self._fallen_rows
        finally:
            self._fallen_rows = None

    def activation_cache(self, images: Images) -> ActivationCache | None:
        """Cache the activations on `images`, for logits of images that differ in a window.

        None where the network cannot be traced layer by layer, where the cache would exceed 2 GiB,
        and on other devices than a CPU: many small kernels are slower there.
        """
        fast, images = self._attacked_copy(images), images.contiguous(memory_format=self._layout)
        if images.device.type != "cpu" or not ActivationCache.fits(fast):
            return None
        few = images[:2].clone()
        with torch.no_grad():
            if not _cache_is_exact(fast, few) or ActivationCache(fast, few, Meter()).nbytes * len(
                images
            ) > (MAX_CACHE_BYTES * len(few)):
                return None
            return ActivationCache(fast, images, self.meter)

    def _pass(self, images: Images) -> Logits:
        self.meter.forwards += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            self.meter.input_backwards += len(images)
        fast = self._attacked_copy(images)
        return fast(images.contiguous(memory_format=self._layout))

    def _attacked_copy(self, images: Images) -> nn.Module:
        """Return the copy that is attacked, after choosing it and the memory format `_layout`."""
        if self._fast is None:
            self._fast, self._layout = fast_copy(self._own, self._folded, images.detach())
        return self._fast


def fast_copy(
    own: nn.Module, short: nn.Module, images: Images
) -> tuple[nn.Module, torch.memory_format]:
    """Return the fastest copy with the same outputs as the network, and the memory format of its images.

    Outputs are compared on some of `images` and on noise: `short`, the traced network, may be another
    function (weights used twice, activations overwritten, branches on types), and some networks do not
    support channels last.
    """
    few = images[:4]
    noise = torch.rand(few.shape, generator=torch.Generator().manual_seed(0)).to(few)
    probe = torch.cat([few, noise])
    layouts = [torch.contiguous_format]
    if images.device.type == "cpu":  # faster convolutions
        layouts.insert(0, torch.channels_last)
    with torch.no_grad():
        expected = own(probe.clone())  # a network may overwrite its input
        for model in (_overwriting_nothing(short), short, own):
            for layout in layouts:
                fast: Any = copy.deepcopy(model)
                # Networks fail in tracing and layouts with errors of many types.
                with suppress(Exception):
                    fast = fast.to(memory_format=layout)
                    if _close(fast(probe.clone(memory_format=layout)), expected):
                        return fast, layout
    return own, torch.contiguous_format


def _overwriting_nothing(model: nn.Module) -> nn.Module:
    """Return a copy whose layers do not work in place: their inputs are cached."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if getattr(module, "inplace", False):
            vars(module)["inplace"] = False
    return model


def _close(found: Logits, expected: Logits) -> bool:
    scale = expected.abs().amax().nan_to_num(0.0, 0.0, 0.0)
    return torch.allclose(found, expected, rtol=0, atol=1e-4 * float(scale), equal_nan=True)


def _cache_is_exact(fast: nn.Module, few: Images) -> bool:
    """Whether logits for windows are those of the whole network, before and after an update."""
    height, width = few.shape[2:]
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(len(few))
    images, size = few.clone(), min(3, height // 2, width // 2)
    try:
        cache = ActivationCache(fast, few, Meter())  # pyright: ignore[reportArgumentType]
        for top, left in ((0, 0), (height // 2, width // 3), (height - size, width - size)):
            region = Region(Span(top, top + size), Span(left, left + size))
            window = torch.rand(region.of(images).shape, generator=generator)
            region.of(images).copy_(window)
            if not _close(cache.logits(rows, region, window), fast(images)):
                return False
            cache.update(torch.ones(len(rows), dtype=torch.bool))
    except Exception:  # networks may fail here in many ways
        return False
    return True


def folded(model: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions of a network in eval mode; return it as it is if untraceable."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(model).eval().requires_grad_(False)
    except Exception:
        # Networks may branch on values, which cannot be traced.
        return model


class NoCache:
    """The interface of `ActivationCache`, computed by the whole network without a cache."""

    def __init__(self, forward: Forward, images: Images) -> None:
        self._forward, self._images = forward, images

    def logits(self, rows: Int[Tensor, " k"], region: Region, window: Images) -> Logits:
        """The logits of images `rows` if `region` of them were `window`."""
        images = self._images[rows]
        region.of(images).copy_(window)
        return self._forward(images)

    def update(self, chosen: Bool[Tensor, " k"]) -> None:
        """Do nothing: the caller updates the images in place."""


class FallenRows:
    """Early exit of rows: a row that was misclassified once keeps its logits and is not evaluated again.

    Whether a row is misclassified is decided by `classify`, the network itself.

    Correct only while every image is inside the threat model, as all of APGD's steps are.
    """

    def __init__(self, labels: Labels, classify: Callable[[Images], Labels]) -> None:
        self._labels, self._classify = labels, classify
        self.fallen: Bool[Tensor, " n"] = torch.zeros_like(labels, dtype=torch.bool)
        self.found: Images | None = None  # the adversarial images of fallen rows
        self._logits: Logits | None = None

    def logits(self, forward: Forward, images: Images) -> Logits:
        """Return the logits of `images`; those of fallen rows are stored ones, without a gradient."""
        if self._logits is None or self.found is None or not bool(self.fallen.any()):
            logits = forward(images)
        else:
            standing = (~self.fallen).nonzero().flatten()
            logits = self._logits
            if len(standing):
                logits = logits.index_copy(0, standing, forward(images.index_select(0, standing)))
            elif images.requires_grad:
                logits = logits + 0 * images.flatten(1).sum(1, keepdim=True)
        self._note(images.detach(), logits.detach())
        return logits

    def _note(self, images: Images, logits: Logits) -> None:
        if self.found is None or self._logits is None:
            self.found, self._logits = images.clone(), logits.clone()
        fresh = ~self.fallen & (logits.argmax(1) != self._labels)
        rows = fresh.nonzero().flatten()
        if len(rows):  # the attacked copy is equal up to rounding
            fresh[rows] = self._classify(images[rows]) != self._labels[rows]
        self.found[fresh], self._logits[fresh] = images[fresh], logits[fresh]
        self.fallen = self.fallen | fresh
