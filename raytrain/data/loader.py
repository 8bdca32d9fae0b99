"""The splits of a data set on the device, and the order of their images in batches.

Slot j of every global batch holds images whose index is j modulo the batch size. Worker r fills the
slots r, r + world, ...: so it owns the images with index = r modulo the number of workers, in every
epoch, and a batch holds the same images for any number of workers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.memory import machine_memory
from raytrain.core.types import Batch, BatchRandom, mix
from raytrain.data.augment import random_view
from raytrain.data.cutmix import cutmix
from raytrain.data.images import AnySplit
from raytrain.data.mixed import mixed_batches, mixed_order, slots_of
from raytrain.data.reading import ImageReader, Selection, content_of, images_of
from raytrain.data.shard import BatchRequest, SplitShard
from raytrain.data.slots import Slots
from raytrain.data.sources import SOURCES, ImageSet, Source, source_of
from raytrain.data.spec import DataSpec
from raytrain.data.validation_split import split_validation


@dataclass(frozen=True)
class Splits:
    """Training and validation images of a run, without the test set."""

    train: SplitShard
    valid: SplitShard
    source: Source
    extra: SplitShard | None = None  # additional images: a share of every training batch

    @property
    def shards(self) -> list[SplitShard]:
        """All images of this worker."""
        return [self.train, self.valid, *([] if self.extra is None else [self.extra])]

    @property
    def num_indices(self) -> int:
        """The first index that no image of a training batch has, over all workers."""
        return max(one.num_indices for one in (self.train, self.extra or self.train))


def open_splits(
    spec: DataSpec,
    context: DistributedContext,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    batch_size: int | None = None,
) -> Splits:
    """Read the training set and split it into training and validation, stratified by label.

    Where `spec` has additional images and a `batch_size` is given, they are read as well.

    Raises:
        RequestError: naming the file or field that makes training or validation impossible.
    """
    images, source = _training_set(spec, context)
    if spec.pad is not None and spec.pad >= source.size:
        raise RequestError(
            f"data.pad: expected less than the {source.size} pixels of an image, found {spec.pad}"
        )
    validation, training = split_validation(images.labels, spec)
    shard = partial(_shard, spec, context, dtype, memory_format)
    valid = shard("train", images, validation)
    if spec.extra is None or batch_size is None:
        return Splits(shard("train", images, training), valid, source)
    own, others = slots_of(batch_size, spec.extra.per_batch(batch_size))
    extra = shard("extra", _additional(spec, context, others.count), slots=others)
    return Splits(shard("train", images, training, own), valid, source, extra)


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
    return _shard(spec, context, dtype, torch.contiguous_format, "test", images), source


def open_additional(spec: DataSpec, context: DistributedContext) -> ImageSet:
    """Read the additional images; labels and channels must be those of the training images.

    Raises:
        RequestError: naming the file that does not fit the training images.
    """
    return images_of(_fields(spec), "extra", _memory(context))


def num_steps(part: SplitShard, batch_size: int) -> int:
    """Return the whole batches in an epoch; each epoch drops another random rest."""
    if batch_size > part.num_images:
        raise RequestError(
            f"batch_size: {batch_size} is more than the {part.num_images} training images"
        )
    return part.num_images // batch_size


def iter_train(
    part: SplitShard,
    batch_size: int,
    seed: int,
    epoch: int,
    pad: int,
    flip: bool,
    first: int = 0,
    extra: SplitShard | None = None,
    mixed: float | None = None,
) -> Generator[Batch]:
    """Yield the training batches of one epoch for this worker, from the `first` on: a function of seed and
    epoch alone. A share of every batch is images of `extra`; `mixed` is the share that CutMix changes.
    """
    context = part.context
    shards = [part] if extra is None else [part, extra]
    if extra is None:
        order = epoch_order(part.num_images, batch_size, mix(seed, "order", epoch))
    else:
        order = mixed_order(shards, seed, epoch, part.num_images // batch_size)
    slots = slice(context.rank, None, context.world)
    steps = list(range(first, len(order)))
    if mixed is not None:
        steps.append(0)  # the last batch is mixed with the first

    def requests() -> Iterator[BatchRequest]:
        for step, index in zip(steps, order[steps, slots].to(context.device), strict=True):
            rng = BatchRandom(mix(seed, "batch", epoch, step), batch_size, slots, context.device)
            yield BatchRequest(index, rng, random_view(rng, pad, flip))

    batches = part.batches(requests()) if extra is None else mixed_batches(shards, requests())
    yield from batches if mixed is None else cutmix(batches, mixed)


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


def _shard(
    spec: DataSpec,
    context: DistributedContext,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    split: AnySplit,
    images: ImageSet,
    chosen: np.ndarray | None = None,
    slots: Slots | None = None,
) -> SplitShard:
    """The images of a split that this worker owns, of those `chosen` (default: all)."""
    numbers = torch.arange(len(images.labels)) if chosen is None else torch.from_numpy(chosen)
    owned = numbers[context.rank :: context.world]
    if slots is not None:
        owned = numbers[slots.owned(len(numbers), context)]
    reader = _reader(images, spec, split, context)
    shared = images.is_shared and context.device.type == "cpu"
    if reader is not None or shared:  # a copy would be this process's own
        pixels = Selection(images.pixels, owned)
    else:
        pixels = images.pixels[owned].to(context.device)
    return SplitShard(
        pixels,
        images.labels[owned].to(context.device),
        len(numbers),
        context,
        dtype,
        memory_format,
        reader,
        slots,
    )


def _additional(spec: DataSpec, context: DistributedContext, per_batch: int) -> ImageSet:
    """The additional images, of which a batch has `per_batch`."""
    images = open_additional(spec, context)
    if len(images.labels) < per_batch:
        raise RequestError(
            f"data.extra.name: expected {per_batch} images or more, those of one batch, found "
            f"{len(images.labels)}"
        )
    return images


def _reader(
    images: ImageSet, spec: DataSpec, split: AnySplit, context: DistributedContext
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
    read_by = ("name", "root", "test_path", "image_column", "label_column", "in_memory")
    return spec.model_dump_json(include={**dict.fromkeys(read_by, True), "extra": {"name"}})
