"""Data sets as one tensor on the device, and the order of their images in batches.

Slot j of every global batch holds images whose index is j modulo the batch size. Worker r fills the
slots r, r + world, ...: so it owns the images with index = r modulo the number of workers, in every
epoch, and a batch holds the same images for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.regions import DATA, region
from raytrain.core.sample_store import cut
from raytrain.core.types import AugmentedView, Batch, BatchRandom, mix
from raytrain.data.augment import random_view
from raytrain.data.sources import SOURCES, ImageSet, Source, Split, read, source_of
from raytrain.data.spec import DataSpec
from raytrain.data.validation_split import split_validation


@dataclass(frozen=True)
class SplitShard:
    """This worker's images of a split: row k has index rank + k * world."""

    pixels: UInt8[Tensor, "owned c h w"]
    labels: Int64[Tensor, " owned"]
    num_images: int  # over all workers
    context: DistributedContext
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def batch(self, index: Tensor, rng: BatchRandom, view: AugmentedView | None = None) -> Batch:
        """Return the images with these indices, all owned by this worker, cropped and flipped by `view`."""
        rows = index // self.context.world
        pixels = self.pixels[rows]
        if view is not None:
            pixels = cut(pixels, view)
        images = (pixels.to(self.dtype) / 255).contiguous(memory_format=self.memory_format)
        return Batch(images, self.labels[rows], index, rng, view)


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
    images, source = _training_set(spec)
    if spec.pad is not None and spec.pad >= source.size:
        raise RequestError(
            f"data.pad: expected less than the {source.size} pixels of an image, found {spec.pad}"
        )
    validation, training = split_validation(images.labels, spec)
    train, valid = (
        replace(_part(images, chosen, context, dtype), memory_format=memory_format)
        for chosen in (training, validation)
    )
    return Splits(train, valid, source)


def open_source(spec: DataSpec) -> Source:
    """Return the properties of a data set: channels, classes, statistics of pixels."""
    return SOURCES[spec.name] if spec.name in SOURCES else _training_set(spec)[1]


def open_test(
    spec: DataSpec, context: DistributedContext, dtype: torch.dtype = torch.float32
) -> tuple[SplitShard, Source]:
    """Read the test set, for `evaluate` only; labels and channels must be those of the training images.

    Raises:
        RequestError: naming the file that does not fit the training images.
    """
    training, source = _training_set(spec)
    images = _read(spec, "test", like=training)
    return _part(images, np.arange(len(images.labels)), context, dtype), source


def num_steps(part: SplitShard, batch_size: int) -> int:
    """Return the whole batches in an epoch; each epoch drops another random rest."""
    if batch_size > part.num_images:
        raise RequestError(
            f"batch_size: {batch_size} is more than the {part.num_images} training images"
        )
    return part.num_images // batch_size


def iter_train(
    part: SplitShard, batch_size: int, seed: int, epoch: int, pad: int, flip: bool, first: int = 0
) -> Iterator[Batch]:
    """Yield the training batches of one epoch for this worker, from the `first` on: a function of seed and
    epoch alone.
    """
    context, device = part.context, part.pixels.device
    order = epoch_order(part.num_images, batch_size, mix(seed, "order", epoch))
    slots = slice(context.rank, None, context.world)
    for step, index in enumerate(order[first:, slots].to(device), first):
        rng = BatchRandom(mix(seed, "batch", epoch, step), batch_size, slots, device)
        with region(DATA):
            batch = part.batch(index, rng, random_view(rng, pad, flip))
        yield batch


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
    context, device = part.context, part.pixels.device
    count = part.num_images if images is None else min(images, part.num_images)
    for first in range(0, count, batch_size):
        width = min(batch_size, count - first)
        slots = slice((context.rank - first) % context.world, None, context.world)
        index = torch.arange(first, first + width, device=device)[slots]
        yield part.batch(index, BatchRandom(mix(seed, "sweep", first), width, slots, device))


def _part(
    images: ImageSet, chosen: np.ndarray, context: DistributedContext, dtype: torch.dtype
) -> SplitShard:
    owned = torch.from_numpy(chosen)[context.rank :: context.world]
    pixels, labels = images.pixels[owned], images.labels[owned]
    return SplitShard(
        pixels.to(context.device), labels.to(context.device), len(chosen), context, dtype
    )


def _read(spec: DataSpec, split: Split, like: ImageSet | None = None) -> ImageSet:
    return read(
        spec.name,
        split,
        path=spec.root,
        image_column=spec.image_column,
        label_column=spec.label_column,
        test_path=spec.test_path,
        like=like,
    )


def _training_set(spec: DataSpec) -> tuple[ImageSet, Source]:
    # Keyed by the fields on which the data depends: a process with many trials reads once.
    read_by = {"name", "root", "test_path", "image_column", "label_column"}
    return _cached(spec.model_dump_json(include=read_by))


@lru_cache(maxsize=2)
def _cached(fields: str) -> tuple[ImageSet, Source]:
    spec = DataSpec.model_validate_json(fields)
    images = _read(spec, "train")
    return images, source_of(spec.name, images)
