"""Predicted cost of a configuration, from the costs of its parts."""

from __future__ import annotations

import functools
import math

import torch

from raytrain.config.run import RunConfig
from raytrain.core.cost import CostSetting
from raytrain.core.network import stem_share
from raytrain.data.catalogue import SOURCES, Source
from raytrain.models import ModelSpec

_POINTS = 20  # evaluations per training at least, if numbers change during it
_UNKNOWN = Source("an unknown data set", 3, 32, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def estimate_cost(run: RunConfig) -> float:
    """Return forward-equivalents per training image of the whole run: `fe_per_image`, or the sum over its
    epochs; an upper bound where `is_bound(run)`.

    An epoch drops images that fill no whole batch: the run's own count is smaller by their share.
    """
    if run.fe_per_image is not None:
        return run.fe_per_image
    points = math.ceil(_POINTS / run.epochs) if run.curriculum else 1
    total = 0.0
    scheduled, algorithm = {}, run.algorithm_with({})
    for epoch in range(run.epochs):
        setting = CostSetting(
            epoch, run.batch_size, run.workers, functools.partial(_stem_share, run)
        )
        for point in range(points):
            now = run.scheduled((epoch + (point + 0.5) / points) / run.epochs)
            if now != scheduled:
                scheduled, algorithm = now, run.algorithm_with(now)
            total += algorithm.fe_per_image(setting) / points
    return total


def estimate_validation(run: RunConfig, num_images: int) -> float | None:
    """Return the most forward-equivalents of one validation on `num_images` images, with its sentinels.

    Images that are misclassified, or have fallen to an earlier restart, cost less. None for `apgd`.
    """
    evaluation = run.evaluation
    if evaluation.attack == "apgd":
        return None
    images = min(num_images, evaluation.images or num_images)
    cost = images * (1 + evaluation.restarts * (2 * evaluation.steps + 1.0))
    if run.sentinels is not None:
        cost += min(images, run.sentinels.images) * (3 + run.sentinels.corners)
    return cost


def is_bound(run: RunConfig) -> bool:
    """Whether a run may cost less than its estimate, because attacks or the run may stop early."""
    if run.early_stop is not None or (run.sentinels and run.sentinels.stop.limits()):
        return True
    return run.fe_per_image is None and run.algorithm_with({}).cost_varies


def _stem_share(run: RunConfig) -> float:
    """Return the first layer's share of a forward of the run's network, without its weights."""
    own = ":" not in run.model.name  # others are not built
    return _share_of(run.data.name, run.model.name if own else "auto")


@functools.lru_cache(maxsize=64)
def _share_of(data: str, model: str) -> float:
    source = SOURCES.get(data, _UNKNOWN)
    with torch.device("meta"):
        network = ModelSpec(name=model).build(
            source.channels, source.size, len(source.classes), source.mean, source.std
        )
        image = torch.zeros(1, source.channels, source.size, source.size)
    return stem_share(network, image)
