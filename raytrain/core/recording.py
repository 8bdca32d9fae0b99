"""Work on tensors that is recorded once and replayed on new values, such as a CUDA graph.

A recording fixes addresses of tensors and values of numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.core.console import log_line
from raytrain.core.types import Predict

Result = TypeVar("Result")
Replay = Callable[[], object]

NUM_EAGER = 2
"""Times that work is done before it is recorded: momentum and libraries are set up in them."""


@runtime_checkable
class Recorder(Protocol):
    """Does work, and records what it does to tensors."""

    def run(self, work: Callable[[], Result]) -> Result:
        """Do work as it will be recorded."""
        ...

    def record(self, work: Callable[[], Result]) -> tuple[Replay, Result]:
        """Do work and record it. A replay leaves its result in the returned tensors.

        Raises:
            RuntimeError: if it cannot be recorded.
        """
        ...


class CudaGraphs:
    """Records work as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Result]) -> Result:
        present = torch.cuda.current_stream()
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            result = work()
        present.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Result]) -> tuple[Replay, Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = work()
        graph.replay()
        return graph.replay, result


class RecordedPasses:
    """A network whose forward and backward passes are recorded for a few batch sizes and replayed.

    Takes the place of `network`, which evaluates `module`, where a whole step cannot be recorded: because
    its samples leave the batch, or because the loop belongs to a library. In eval mode, where samples are
    independent, a batch is padded to the next of `batch_sizes(largest)`; with batch statistics a pass
    has the size of its batch. Larger batches are not recorded. `weights` are those that gradients are
    taken of, beside the images'.

    A recorded pass has its activations in one place: a pass that begins before the gradients of the
    previous one have been taken is an ordinary one. What cannot be recorded is run ordinarily from
    there on, and a line on stderr gives the reason.

    `recorder` belongs to this object alone: its recordings share memory.
    """

    def __init__(
        self,
        network: Predict,
        module: nn.Module,
        recorder: Recorder,
        largest: int,
        weights: Sequence[nn.Parameter] = (),
    ) -> None:
        self._network, self._module, self._recorder = network, module, recorder
        self._norms = [one for one in module.modules() if isinstance(one, _NormBase)]
        self._sizes, self._weights = batch_sizes(largest), tuple(weights)
        self._kinds: dict[Hashable, _Kind] = {}
        self._waiting: Callable[[], object | None] = lambda: (
            None
        )  # a pass without its gradients yet
        self._stopped = False
        self.replayed = 0  # passes so far, forward

    def __call__(self, images: Tensor) -> Tensor:
        count = len(images)
        size = next((one for one in self._sizes if one >= count), 0)
        if self._stopped or not size or self._waiting() is not None:
            return self._network(images)
        kind = self._kind(images, count if self._module.training else size)
        kind.seen += 1
        if kind.seen <= NUM_EAGER:
            return self._network(kind.padded(images))[:count]
        kind.fill(images)
        if kind.recorded is None:
            try:
                kind.recorded = _Recorded(self._network, kind, self._weights, self._recorder)
            except RuntimeError as error:
                self._stopped = True
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                log_line(f"raytrain: performance: passes are not recorded: {reason}")
                return self._network(images)
        else:
            kind.recorded.forward()
            self.replayed += 1
        if not kind.differentiated:
            return kind.recorded.logits[:count].clone()
        return _Replayed.apply(self, kind, images, *self._weights)

    def _kind(self, images: Tensor, size: int) -> _Kind:
        grad = torch.is_grad_enabled()
        by_images = grad and images.requires_grad
        tracked = tuple(norm.track_running_stats for norm in self._norms)
        key = (
            size,
            images.shape[1:],
            images.dtype,
            by_images,
            grad,
            self._module.training,
            tracked,
        )
        if key not in self._kinds:
            self._kinds[key] = _Kind(images, size, by_images, grad and bool(self._weights))
        return self._kinds[key]


def batch_sizes(largest: int) -> list[int]:
    """Sizes that batches of up to `largest` samples are padded to: its eighths, then halves of an eighth.

    >>> batch_sizes(128)
    [8, 16, 32, 48, 64, 80, 96, 112, 128]
    >>> batch_sizes(5)
    [1, 2, 3, 4, 5]
    """
    sizes = {-(-largest * eighths // 8) for eighths in range(1, 9)}
    while (half := min(sizes) // 2) >= 8:
        sizes.add(half)
    return sorted(sizes)


class _Kind:
    """Passes of batches of one size, in static tensors."""

    def __init__(self, images: Tensor, size: int, by_images: bool, by_weights: bool) -> None:
        last = images.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        self.images = images.new_zeros(size, *images.shape[1:]).contiguous(memory_format=order)
        self.by_images, self.differentiated = by_images, by_images or by_weights
        self.seen, self.count = 0, 0
        self.recorded: _Recorded | None = None

    def padded(self, images: Tensor) -> Tensor:
        """These images, and others up to the size."""
        return torch.cat([images, self.images[len(images) :].detach()])

    def fill(self, images: Tensor) -> None:
        """Copy the images to their static place."""
        self.count = len(images)
        self.images.data[: self.count].copy_(images.detach())


class _Recorded:
    """Recordings of the passes of one kind."""

    def __init__(
        self,
        network: Predict,
        kind: _Kind,
        weights: tuple[nn.Parameter, ...],
        recorder: Recorder,
    ) -> None:
        images = kind.images.requires_grad_(kind.by_images)
        self.forward, logits = recorder.record(lambda: network(images))
        self.logits = logits.detach()
        if not kind.differentiated:
            return
        inputs = [*([images] if kind.by_images else []), *weights]
        self.grad = torch.zeros_like(self.logits)  # of the logits
        self.backward, self.grads = recorder.record(
            lambda: torch.autograd.grad(logits, inputs, self.grad, materialize_grads=True)
        )


class _Replayed(torch.autograd.Function):
    """Logits of a recorded pass, whose gradients are those of the recorded backward pass."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, passes: RecordedPasses, kind: _Kind, images: Tensor, *weights: Tensor
    ) -> Tensor:
        assert kind.recorded is not None
        ctx.passes, ctx.kind, ctx.count = passes, kind, len(images)
        passes._waiting = weakref.ref(ctx)
        return kind.recorded.logits[: len(images)].clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        passes, kind, count = ctx.passes, ctx.kind, ctx.count
        if passes._waiting() is not ctx:
            raise RuntimeError("the gradients of a recorded pass can be taken once")
        passes._waiting = lambda: None
        recorded = kind.recorded
        recorded.grad[:count].copy_(grad)
        recorded.grad[count:].zero_()
        recorded.backward()
        grads = list(recorded.grads)
        by_images = [grads.pop(0)[:count].clone()] if kind.by_images else [None]
        return (None, None, *by_images, *(one.clone() for one in grads))
