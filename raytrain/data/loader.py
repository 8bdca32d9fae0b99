"""Data sets as one tensor on the device, and the order of their images in batches.

Slot j of every global batch holds images whose index is j modulo the batch size. Worker r fills the
slots r, r + world, ...: so it owns the images with index = r modulo the number of workers, in every
epoch, and a batch holds the same images for any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.memory import machine_memory
from raytrain.core.regions import DATA, region
from raytrain.core.sample_store import cut
from raytrain.core.types import AugmentedView, Batch, BatchRandom, mix
from raytrain.data.augment import random_view
from raytrain.data.images import Pixels, whole
from raytrain.data.read_ahead import in_processes
from raytrain.data.reading import ImageReader, Selection, content_of, images_of
from raytrain.data.sources import SOURCES, ImageSet, Source, Split, source_of
from raytrain.data.spec import DataSpec
from raytrain.data.validation_split import split_validation


@dataclass(frozen=True)
class BatchRequest:
    """Which images a batch holds, on the device, and how they are augmented."""

    index: Int64[Tensor, " n"]
    rng: BatchRandom
    view: AugmentedView | None = None


@dataclass(frozen=True)
class SplitShard:
    """This worker's images of a split: row k has index rank + k * world."""

    pixels: Pixels  # (owned, c, h, w), on the device if `reader` is None
    labels: Int64[Tensor, " owned"]
    num_images: int  # over all workers
    context: DistributedContext
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    reader: ImageReader | None = None  # in other processes, of pixels that are not in memory

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

    def read(self, index: Tensor) -> UInt8[Tensor, "n c h w"]:
        """The pixels 0..255 of the images with these indices, all owned by this worker, on the device."""
        rows = index // self.context.world
        if self.reader is None:
            return self.pixels[rows]
        return self.pixels[rows.cpu()].to(self.context.device)

    def batch(self, index: Tensor, rng: BatchRandom, view: AugmentedView | None = None) -> Batch:
        """Return the images with these indices, all owned by this worker, cropped and flipped by `view`."""
        pixels = self.read(index)
        return self._batch(
            pixels if view is None else cut(pixels, view), BatchRequest(index, rng, view)
        )

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield batches in order; images that are not in memory are decoded ahead, in other processes."""
        if self.reader is not None:
            yield from self._decoded_ahead(self.reader, list(requests))
            return
        for request in requests:
            with region(DATA):
                batch = self.batch(request.index, request.rng, request.view)
            yield batch

    def _decoded_ahead(self, reader: ImageReader, requests: list[BatchRequest]) -> Iterator[Batch]:
        context, pixels = self.context, self.pixels
        assert isinstance(pixels, Selection)
        ahead = context.read_ahead or in_processes
        wanted = [
            (pixels.rows[request.index.cpu() // context.world], _on_cpu(request.view))
            for request in requests
        ]
        with closing(ahead(reader, wanted)) as decoded:
            for request in requests:
                with region(DATA):  # the wait for images is part of it
                    images = next(decoded).to(context.device, non_blocking=True)
                    batch = self._batch(images, request)
                yield batch
            next(decoded, None)  # so that it runs to its end

    def _batch(self, pixels: Tensor, request: BatchRequest) -> Batch:
        images = (pixels.to(self.dtype) / 255).contiguous(memory_format=self.memory_format)
        labels = self.labels[request.index // self.context.world]
        return Batch(images, labels, request.index, request.rng, request.view)


@dataclass(frozen=True)
class Splits:
    """Training and validation images of a run, without the test set."""

    train: SplitShard
    valid: SplitShard
    source: Source


def open_splits(
    spec: DataSpec,
    context: DistributedContext,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Splits:
    """Read the training set and split it into training and validation, stratified by label.

    Raises:
        RequestError: naming the file or field that makes training or validation impossible.
    """
    images, source = _training_set(spec, context)
    if spec.pad is not None and spec.pad >= source.size:
        raise RequestError(
            f"data.pad: expected less than the {source.size} pixels of an image, found {spec.pad}"
        )
    validation, training = split_validation(images.labels, spec)
    reader = _reader(images, spec, "train", context)
    train, valid = (
        replace(_part(images, chosen, context, dtype, reader), memory_format=memory_format)
        for chosen in (training, validation)
    )
    return Splits(train, valid, source)


def open_source(spec: DataSpec) -> Source:
    """Return the properties of a data set: channels, classes, statistics of pixels."""
    if spec.name in SOURCES:
        return SOURCES[spec.name]
    return _training_set(spec, DistributedContext())[1]


def open_test(
    spec: DataSpec, context: DistributedContext, dtype: torch.dtype = torch.float32
) -> tuple[SplitShard, Source]:
    """Read the test set, for `evaluate` only; labels and channels must be those of the training images.

    Raises:
        RequestError: naming the file that does not fit the training images.
    """
    source = _training_set(spec, context)[1]
    images = images_of(_fields(spec), "test", _memory(context))
    reader = _reader(images, spec, "test", context)
    return _part(images, np.arange(len(images.labels)), context, dtype, reader), source


def num_steps(part: SplitShard, batch_size: int) -> int:
    """Return the whole batches in an epoch; each epoch drops another random rest."""
    if batch_size > part.num_images:
        raise RequestError(
            f"batch_size: {batch_size} is more than the {part.num_images} training images"
        )
    return part.num_images // batch_size


def iter_train(
    part: SplitShard, batch_size: int, seed: int, epoch: int, pad: int, flip: bool, first: int = 0
) -> Generator[Batch]:
    """Yield the training batches of one epoch for this worker, from the `first` on: a function of seed and
    epoch alone.
    """
    context = part.context
    order = epoch_order(part.num_images, batch_size, mix(seed, "order", epoch))
    slots = slice(context.rank, None, context.world)

    def requests() -> Iterator[BatchRequest]:
        for step, index in enumerate(order[first:, slots].to(context.device), first):
            rng = BatchRandom(mix(seed, "batch", epoch, step), batch_size, slots, context.device)
            yield BatchRequest(index, rng, random_view(rng, pad, flip))

    yield from part.batches(requests())


def _on_cpu(view: AugmentedView | None) -> AugmentedView | None:
    if view is None:
        return None
    return AugmentedView(view.pad, view.top.cpu(), view.left.cpu(), view.mirrored.cpu())


def epoch_order(num_images: int, batch_size: int, seed: int) -> Int64[Tensor, "steps slots"]:
    """A random order in which slot j only ever holds indices that are j modulo the batch size."""
    rounds = -(-num_images // batch_size)
    keys = torch.full((rounds * batch_size,), 2.0)
    keys[:num_images] = torch.rand(num_images, generator=torch.Generator().manual_seed(seed))
    chosen = keys.view(rounds, batch_size).argsort(dim=0)[: num_images // batch_size]
    return chosen * batch_size + torch.arange(batch_size)


def iter_eval(
    part: SplitShard, batch_size: int, seed: int, images: int | None = None
) -> Iterator[Batch]:
    """Yield every image once (or the first `images`), in order, un-augmented: for evaluation."""
    context, device = part.context, part.context.device
    count = part.num_images if images is None else min(images, part.num_images)

    def requests() -> Iterator[BatchRequest]:
        for first in range(0, count, batch_size):
            width = min(batch_size, count - first)
            slots = slice((context.rank - first) % context.world, None, context.world)
            index = torch.arange(first, first + width, device=device)[slots]
            yield BatchRequest(index, BatchRandom(mix(seed, "sweep", first), width, slots, device))

    yield from part.batches(requests())


def _part(
    images: ImageSet,
    chosen: np.ndarray,
    context: DistributedContext,
    dtype: torch.dtype,
    reader: ImageReader | None,
) -> SplitShard:
    """The images of a split that this worker owns, of those `chosen`."""
    owned = torch.from_numpy(chosen)[context.rank :: context.world]
    shared = images.is_shared and context.device.type == "cpu"
    if reader is not None or shared:  # a copy would be this process's own
        pixels = Selection(images.pixels, owned)
    else:
        pixels = images.pixels[owned].to(context.device)
    labels = images.labels[owned].to(context.device)
    return SplitShard(pixels, labels, len(chosen), context, dtype, reader=reader)


def _reader(
    images: ImageSet, spec: DataSpec, split: Split, context: DistributedContext
) -> ImageReader | None:
    if isinstance(images.pixels, Tensor):
        return None
    return ImageReader(_fields(spec), split, _memory(context), content_of(images))


def _memory(context: DistributedContext) -> int:
    """Bytes of images that are kept in memory: half of this machine's and half of all workers' GPUs'."""
    memory = machine_memory() // 2
    if context.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(context.device).total_memory
        memory = min(memory, context.world * gpu // 2)
    return memory


def _training_set(spec: DataSpec, context: DistributedContext) -> tuple[ImageSet, Source]:
    images = images_of(_fields(spec), "train", _memory(context))
    return images, source_of(spec.name, images)


def _fields(spec: DataSpec) -> str:
    """The fields on which the images depend: a process with many trials reads once."""
    read_by = {"name", "root", "test_path", "image_column", "label_column", "in_memory"}
    return spec.model_dump_json(include=read_by)
