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
from raytrain.core.recording import RecordedPasses, Recorder
from raytrain.core.types import Images, Labels, Predict

Logits = Float[Tensor, "n classes"]
Forward = Callable[[Images], Logits]


class CountedModel:
    """Logits of images, from frozen copies of the network in eval mode and float32.

    Weights take no gradient, so that `.backward()` in a library costs the input gradient alone.
    Attacks use a copy that is the same function up to rounding: BatchNorm is folded into the
    convolution before it, and on a CPU channels are the last axis. That is checked on the first
    images. Whether an image counts as misclassified is decided by the network itself (`classes`).

    A `recorder` records the passes of the attacked copy, for batches of up to `largest` images.
    """

    def __init__(
        self, model: nn.Module, meter: Meter, recorder: Recorder | None = None, largest: int = 0
    ) -> None:
        self._own = copy_of(model).float().eval().requires_grad_(False)
        self._folded = folded(self._own)
        self._recorder, self._largest = recorder, largest
        self._fast: Predict | None = None  # not known before the first images
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
            return self._own(images.clone()).argmax(1)  # a network may overwrite what it is given

    @contextmanager
    def skipping_fallen(self, labels: Labels) -> Iterator[FallenRows]:
        """Stop evaluating misclassified rows inside the block; row k of every batch belongs to label k."""
        self._fallen_rows = FallenRows(labels, self.classes)
        try:
            yield self._fallen_rows
        finally:
            self._fallen_rows = None

    def _pass(self, images: Images) -> Logits:
        self.meter.forwards += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            self.meter.input_backwards += len(images)
        fast = self._attacked_copy(images)
        return fast(images.clone(memory_format=self._layout))

    def _attacked_copy(self, images: Images) -> Predict:
        """Return the copy that is attacked, after choosing it and the memory format `_layout`."""
        if self._fast is None:
            fast, self._layout = fast_copy(self._own, self._folded, images.detach())
            self._fast = fast
            if self._recorder is not None:
                self._fast = RecordedPasses(fast, fast, self._recorder, self._largest)
        return self._fast


def fast_copy(
    own: nn.Module, short: nn.Module, images: Images
) -> tuple[nn.Module, torch.memory_format]:
    """The fastest copy that answers as the network does, and the layout of its images.

    Evaluated on some of `images` and on noise: `short`, what was traced of it, may be another function
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
                    if _close(fast(probe.clone(memory_format=layout)), wanted):
                        return fast, layout
    return own, torch.contiguous_format


def _close(found: Logits, wanted: Logits) -> bool:
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
        if len(rows):  # the copy that is attacked may be wrong in the last bit
            fresh[rows] = self._classify(images[rows]) != self._labels[rows]
        self.found[fresh], self._logits[fresh] = images[fresh], logits[fresh]
        self.fallen = self.fallen | fresh
