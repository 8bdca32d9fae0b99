"""AutoAttack's four attacks in their standard version, those of pyautoattack with fewer passes.

Croce & Hein 2020 (arXiv 2003.01690; for l1: 2103.01208): APGD on the cross-entropy, targeted APGD on
the difference-of-logits ratio (DLR), targeted FAB, Square. The loops of
pyautoattack are those of the authors' code; each subclass here gives the same results in fewer passes, with
loops of its own for FAB and, in l-inf, Square.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from raytrain.attacks.autoattack.apgd import Apgd, ApgdMargin, ApgdTargeted
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.attacks.autoattack.fab import Fab
from raytrain.attacks.autoattack.square import Square
from raytrain.core.errors import RequestError
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Images, Labels

Stage = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
STAGES: tuple[Stage, ...] = get_args(Stage)
EDITION = 2
"""Version of these attacks: increase it with every change of results, so that old ones are not reused."""

CHEAP: tuple[Stage, ...] = ("apgd-ce", "apgd-t")
"""Stages that cost a quarter of all and are within 0.02 points of all in published logs."""

_DLR_CLASSES = 4  # the targeted DLR divides by the largest minus the mean of the third and fourth


@dataclass(frozen=True)
class Standard:
    """Parameters of the standard version; with fewer than ten classes, a target for each other class."""

    steps: int = 100
    restarts: int = 1  # of APGD-CE
    targets: int = 9  # of APGD-T
    fab_targets: int = 9
    queries: int = 5000
    large_radii: bool = False  # begin at three and two times the radius

    @classmethod
    def of(cls, norm: str, classes: int) -> Standard:
        """Return the parameters for a norm and a number of classes."""
        most = max(1, classes - 1)
        if norm == "l1":
            return cls(
                restarts=5, targets=min(5, most), fab_targets=min(9, most), large_radii=True
            )
        return cls(targets=min(9, most), fab_targets=min(9, most))


def survivors(
    stage: Stage,
    model: CountedModel,
    images: Images,
    labels: Labels,
    ball: AbstractThreatModel,
    seed: int,
) -> Tensor:
    """Which rows are still classified correctly after a stage: (n,) bool. `images` are before it."""
    return ~adversarial(stage, model, images, labels, ball, seed)[1]


def adversarial(
    stage: Stage,
    model: CountedModel,
    images: Images,
    labels: Labels,
    ball: AbstractThreatModel,
    seed: int,
) -> tuple[Images, Tensor]:
    """Run a stage on correctly classified `images`; return its images and which are misclassified.

    The global random state is restored afterwards.
    """
    # The library seeds every device.
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), exact_float32():
        attack = _attack(stage, model, images, ball, seed)
        found = attack.perturb(images.float(), labels.long()).detach()
        return found, misclassified(found, model, images.float(), labels, ball)


def misclassified(
    found: Images,
    model: CountedModel,
    images: Images,
    labels: Labels,
    ball: AbstractThreatModel,
) -> Tensor:
    """Which rows of `found`, an attack's result on `images`, are adversarial examples: (n,) bool.

    A row is one if the network's own output on it is wrong and it is legal: inside the ball and [0, 1].
    """
    return (model.classes(found) != labels) & _legal(found, images, ball)


def _legal(found: Images, images: Images, ball: AbstractThreatModel) -> Tensor:
    """Whether images are in the ball, up to float32's rounding, and in [0, 1]; NaN is not."""
    apart = ball.norm_of(found - images)
    inside = (found >= 0).flatten(1).all(1) & (found <= 1).flatten(1).all(1)
    return inside & (apart <= ball.eps * (1 + 1e-4) + 1e-6)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32 in convolutions and products, and autocast, inside the block."""
    # torch refuses a mixture of the old switches for products with this one.
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions


def _attack(
    stage: Stage, model: CountedModel, images: Images, ball: AbstractThreatModel, seed: int
) -> Any:
    with torch.no_grad():
        classes = model(images[:1].float()).shape[1]
    numbers = Standard.of(ball.norm, classes)
    common: dict[str, Any] = {
        "norm": _library_norm(ball),
        "eps": ball.eps,
        "seed": seed,
        "device": images.device,
    }
    radii = {"use_largereps": numbers.large_radii, "logger": _silent()}
    if stage == "apgd-ce":
        return Apgd(
            model,
            n_iter=numbers.steps,
            n_restarts=numbers.restarts,
            loss="ce",
            **radii,
            **common,
        )
    if stage == "apgd-t":
        kind = ApgdTargeted if classes >= _DLR_CLASSES else ApgdMargin
        return kind(
            model, n_iter=numbers.steps, n_target_classes=numbers.targets, **radii, **common
        )
    if stage == "fab-t":
        return Fab(
            model,
            ball,
            n_iter=numbers.steps,
            n_target_classes=numbers.fab_targets,
            targeted=True,
            **common,
        )
    return Square(model, n_queries=numbers.queries, resc_schedule=False, **common)


def _library_norm(ball: AbstractThreatModel) -> str:
    if ball.autoattack is None:
        raise RequestError(f"threat.norm: AutoAttack is not defined in {ball.norm}")
    return ball.autoattack


def _silent() -> logging.Logger:
    """Return a disabled logger: the library warns of zero gradients at every call, the checks once."""
    logger = logging.getLogger("raytrain.standard")
    logger.propagate = False
    logger.setLevel(logging.CRITICAL)
    return logger
