"""CutMix: a box of every image is replaced by that of another image, and the labels are mixed.

Yun et al. 2019 (CutMix: regularization strategy to train strong classifiers with localizable features, arXiv
1905.04899), algorithm 1; for adversarial training Rebuffi et al. 2021 (Fixing data augmentation to improve
adversarial robustness, arXiv 2103.01946), who mix all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from raytrain.core.regions import DATA, region
from raytrain.core.types import Batch, BatchRandom, MixedLabels, PerSample


def cutmix(batches: Iterable[Batch], probability: float) -> Iterator[Batch]:
    """Yield every batch but the last, each of its images mixed with that in its slot of the next batch.

    The partner has its own crop and flip. It is of the same worker, for any number of workers; in the
    papers it is any other image of the batch.
    """
    before = None
    for batch in batches:
        if before is not None:
            with region(DATA):
                mixed = mix_images(before, batch, probability)
            yield mixed
        before = batch


def mix_images(batch: Batch, partner: Batch, probability: float) -> Batch:
    """Replace a box of each image, with this probability, by the same box of its partner.

    lambda ~ U(0, 1), which is Beta(1, 1); the box has sqrt(1 - lambda) of height and width, rounded down to
    even numbers, a uniform centre, and ends at the border. The share of the first label is that of its
    pixels. Every image has a box of its own; in the authors' code those of a batch have the same one.
    """
    boxes = random_boxes(batch.rng, batch.images.shape[-2:], probability)
    images = torch.empty_like(batch.images)  # in their order in memory
    torch.where(boxes[:, None], partner.images, batch.images, out=images)
    share = 1 - boxes.flatten(1).to(images.dtype).mean(1)
    return replace(batch, images=images, mixed=MixedLabels(partner.labels, share))


def random_boxes(
    rng: BatchRandom, shape: tuple[int, ...], probability: float
) -> Bool[Tensor, "n h w"]:
    """Draw which pixels of each image are replaced; those of no image that is left as it is."""
    size = (1 - rng.uniform("cutmix/lambda")).sqrt()
    chosen = rng.uniform("cutmix") < probability
    rows, columns = (
        _within(size, length, rng.integers(f"cutmix/{name}", length))
        for name, length in zip(("row", "column"), shape, strict=True)
    )
    return rows[:, :, None] & columns[:, None] & chosen[:, None, None]


def _within(size: PerSample, length: int, centre: Tensor) -> Bool[Tensor, "n length"]:
    """Places that are less than half of size * length before the centre, or at most as far behind it."""
    half = (size * length).long()[:, None] // 2
    place = torch.arange(length, device=centre.device) - centre[:, None]
    return (place >= -half) & (place < half)
