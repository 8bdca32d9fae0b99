"""Attacks as functions on any classifier, without a configuration or a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from raytrain.attacks.ascent import ProjectedAscent
from raytrain.attacks.autoattack import STAGES, Stage, adversarial
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.core.cost import Meter
from raytrain.core.errors import RequestError
from raytrain.core.losses import AbstractLoss, Loss
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel, ThreatModel
from raytrain.core.types import Batch, BatchRandom, Progress, mix

_THREAT: TypeAdapter[AbstractThreatModel] = TypeAdapter(ThreatModel)
_LOSS: TypeAdapter[AbstractLoss] = TypeAdapter(Loss)
_ASCENT = TypeAdapter(ProjectedAscent)
_END = Progress(1.0, 1.0)


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Any = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | str = "eps/4",
    start: Any = "uniform",
    stop: Any = "never",
    loss: Any = "cross_entropy",
    restarts: int = 1,
    bn: str = "eval",
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Adversarial images by projected ascent (PGD, Madry et al. 2018, arXiv 1706.06083).

    `model` maps images (n, c, h, w) in [0, 1] to logits; it is neither changed nor trained (with
    bn=train the running statistics of BatchNorm move). `threat` is
    `linf`, `l2` or `l1` with the radius `eps` in pixels of [0, 1], or a threat model with its own radius.
    `start`, `stop` and `loss` are names, records or parts, as in a run file. Each image has the first
    perturbation of `restarts` attempts that changes its class, or else the one of highest loss. The
    result depends on `seed` and not on `batch_size`; it is on the device of `images`.

        >>> import torch, raytrain
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> found = raytrain.attack(model, images, labels, eps=0.1, steps=3)
        >>> bool((found - images).abs().max() <= 0.1 + 1e-6)
        True

    Raises:
        RequestError: naming the argument that is wrong.
    """
    ball = _threat(threat, eps)
    objective = _validated("loss", _LOSS, loss)
    fields = {"start": start, "steps": steps, "step_size": step_size, "stop": stop, "bn": bn}
    ascent = _validated("", _ASCENT, fields)
    if restarts < 1:
        raise RequestError(f"restarts: expected 1 or more, found {restarts}")
    _check(images, labels, batch_size)
    found = []
    for rows in torch.arange(len(images)).split(batch_size):
        batch = _batch(images, labels, rows, seed)
        best, highest = torch.zeros_like(batch.images), None
        fooled = torch.zeros(len(batch), dtype=torch.bool, device=batch.images.device)
        for restart in range(restarts):
            again = _batch(images, labels, rows, mix(seed, restart))
            oracle = Oracle(model, objective, again, Meter(), attack_bn=ascent.bn)
            delta = ascent.maximise(oracle, ball, ascent.start.delta(ball, again), _END).delta
            losses, correct = oracle.losses(delta), oracle.correct(delta)
            if highest is None:
                better = torch.ones_like(fooled)
                highest = losses
            else:
                better = ~fooled & (~correct | (losses > highest))
            best = torch.where(better.view(-1, 1, 1, 1), delta, best)
            highest = torch.where(better, losses, highest)
            fooled |= ~correct
        found.append(batch.images + best)
    return torch.cat(found)


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Any = "linf",
    eps: float = 8 / 255,
    stages: Iterable[Stage] = STAGES,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Adversarial images by AutoAttack's standard version (Croce and Hein 2020, arXiv 2003.01690).

    The four attacks in turn, each on the images that have survived so far, in float32 and eval mode;
    images that survive all four, or were misclassified before, are returned unchanged. Robust
    accuracy is the accuracy on the result. Arguments are those of `attack`.

    Raises:
        RequestError: naming the argument that is wrong.
    """
    ball = _threat(threat, eps)
    _check(images, labels, batch_size)
    stages = tuple(stages)
    counted, found = CountedModel(model, Meter()), images.clone()
    for rows in torch.arange(len(images), device=images.device).split(batch_size):
        standing = rows[counted.classes(images[rows].float()) == labels[rows]]
        for stage in stages:
            if len(standing) == 0:
                break
            perturbed, fooled = adversarial(
                stage, counted, images[standing], labels[standing], ball, seed
            )
            found[standing[fooled]] = perturbed[fooled].to(found.dtype)
            standing = standing[~fooled]
    return found


def _threat(threat: Any, eps: float) -> AbstractThreatModel:
    """Return the threat model; `eps` is the radius of one that is given by its name."""
    named = {"norm": threat, "eps": eps} if isinstance(threat, str) else threat
    return _validated("threat", _THREAT, named)


def _validated(name: str, adapter: Any, value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([*([name] if name else []), *map(str, first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{where}: {message}, found {first['input']!r}") from None


def _check(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise RequestError("images: expected floating-point pixels of shape (n, c, h, w)")
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise RequestError(
            "images: expected pixels in [0, 1]; a normaliser belongs into the model"
        )
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise RequestError(f"labels: expected {len(images)} class numbers, one for each image")
    if batch_size < 1:
        raise RequestError(f"batch_size: expected 1 or more, found {batch_size}")


def _batch(images: Tensor, labels: Tensor, rows: Tensor, seed: int) -> Batch:
    rows = rows.to(images.device)
    rng = BatchRandom(seed, len(images), rows, images.device)
    return Batch(images[rows], labels.to(images.device)[rows], rows, rng)
