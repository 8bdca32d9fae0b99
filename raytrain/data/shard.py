"""The images of a split that one worker owns, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import tee

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.regions import DATA, region
from raytrain.core.sample_store import cut
from raytrain.core.types import AugmentedView, Batch, BatchRandom
from raytrain.data.images import Pixels, whole
from raytrain.data.read_ahead import in_processes
from raytrain.data.reading import ImageReader, Selection
from raytrain.data.slots import Slots


@dataclass(frozen=True)
class BatchRequest:
    """Which images a batch holds, on the device, and how they are augmented."""

    index: Int64[Tensor, " n"]
    rng: BatchRandom
    view: AugmentedView | None = None

    def __getitem__(self, rows: slice) -> BatchRequest:
        """The request for these rows of the batch; `rng` is that of the whole batch."""
        view = None if self.view is None else self.view[rows]
        return BatchRequest(self.index[rows], self.rng, view)


@dataclass(frozen=True)
class SplitShard:
    """This worker's images of a split: row k has index rank + k * world, or the one that `slots` gives it."""

    pixels: Pixels  # (owned, c, h, w), on the device if `reader` is None
    labels: Int64[Tensor, " owned"]
    num_images: int  # over all workers
    context: DistributedContext
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    reader: ImageReader | None = None  # in other processes, of pixels that are not in memory
    slots: Slots | None = None  # of batches that have images of another source too; None: all

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def whole(self) -> UInt8[Tensor, "owned c h w"]:
        """The pixels of all images that this worker owns, as one tensor."""
        return whole(self.pixels)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the images and labels that are held in memory."""
        labels = self.labels.numel() * self.labels.element_size()
        return labels + (math.prod(self.pixels.shape) if self.reader is None else 0)

    @property
    def num_indices(self) -> int:
        """The first index that no image has, over all workers."""
        return self.num_images if self.slots is None else self.slots.num_indices(self.num_images)

    def index(self, numbers: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The indices of images, given by their numbers in the split."""
        return numbers if self.slots is None else self.slots.index(numbers)

    def read(self, index: Tensor) -> UInt8[Tensor, "n c h w"]:
        """The pixels 0..255 of the images with these indices, all owned by this worker, on the device."""
        rows = self._rows(index)
        if self.reader is None:
            return self.pixels[rows]
        return self.pixels[rows.cpu()].to(self.context.device)

    def labels_of(self, index: Tensor) -> Int64[Tensor, " n"]:
        """The labels of the images with these indices, all owned by this worker."""
        return self.labels[self._rows(index)]

    def batch(self, index: Tensor, rng: BatchRandom, view: AugmentedView | None = None) -> Batch:
        """Return the images with these indices, all owned by this worker, cropped and flipped by `view`."""
        request = BatchRequest(index, rng, view)
        return self.batch_of(self._viewed(request), self.labels_of(index), request)

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield batches in order; images that are not in memory are decoded ahead, in other processes."""
        wanted, requests = tee(requests)
        with closing(self.pixels_of(wanted)) as pixels:
            for request in requests:
                with region(DATA):  # the wait for images is part of it
                    labels = self.labels_of(request.index)
                    batch = self.batch_of(next(pixels), labels, request)
                yield batch
            next(pixels, None)  # so that it runs to its end

    def pixels_of(self, requests: Iterable[BatchRequest]) -> Generator[UInt8[Tensor, "n c h w"]]:
        """Yield the pixels 0..255 of batches in order, cropped and flipped; see `batches`."""
        if self.reader is not None:
            yield from self._decoded_ahead(self.reader, list(requests))
            return
        for request in requests:
            yield self._viewed(request)

    def batch_of(self, pixels: Tensor, labels: Tensor, request: BatchRequest) -> Batch:
        """Return the batch of these pixels 0..255 and labels."""
        images = (pixels.to(self.dtype) / 255).contiguous(memory_format=self.memory_format)
        return Batch(images, labels, request.index, request.rng, request.view)

    def _decoded_ahead(
        self, reader: ImageReader, requests: list[BatchRequest]
    ) -> Generator[UInt8[Tensor, "n c h w"]]:
        context, pixels = self.context, self.pixels
        assert isinstance(pixels, Selection)
        ahead = context.read_ahead or in_processes
        wanted = [
            (pixels.rows[self._rows(request.index.cpu())], _on_cpu(request.view))
            for request in requests
        ]
        with closing(ahead(reader, wanted)) as decoded:
            for images in decoded:
                yield images.to(context.device, non_blocking=True)

    def _viewed(self, request: BatchRequest) -> UInt8[Tensor, "n c h w"]:
        pixels = self.read(request.index)
        return pixels if request.view is None else cut(pixels, request.view)

    def _rows(self, index: Tensor) -> Tensor:
        if self.slots is None:
            return index // self.context.world
        return self.slots.rows(index, self.context)


def _on_cpu(view: AugmentedView | None) -> AugmentedView | None:
    if view is None:
        return None
    return AugmentedView(view.pad, view.top.cpu(), view.left.cpu(), view.mirrored.cpu())
