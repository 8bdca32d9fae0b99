"""AutoAttack's four attacks in their standard version: a library's, with the waste left out.

Croce & Hein 2020 (arXiv 2003.01690; for l1: 2103.01208): APGD on the cross-entropy, targeted APGD on
the difference-of-logits ratio (DLR), targeted FAB, Square. The attacks are pyautoattack's, whose loops
are those of the authors' code; each subclass here gives the same verdicts for fewer passes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from raytrain.attacks.answers import Answers
from raytrain.balls import AbstractBall
from raytrain.types import Images, Labels

Stage = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
STAGES: tuple[Stage, ...] = get_args(Stage)
CHEAP: tuple[Stage, ...] = ("apgd-ce", "apgd-t")
"""The part of it that costs a quarter and has left at most 0.02 points in published logs."""

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_DLR_CLASSES = 4  # the targeted DLR divides by the largest minus the mean of the third and fourth


@dataclass(frozen=True)
class Standard:
    """The numbers of the standard version; with fewer than ten classes, as many targets as there are."""

    steps: int = 100
    restarts: int = 1  # of APGD-CE
    targets: int = 9  # of APGD-T
    fab_targets: int = 9
    queries: int = 5000
    large_radii: bool = False  # begin at three and two times the radius

    @classmethod
    def of(cls, norm: str, classes: int) -> Standard:
        """For a norm and a number of classes."""
        most = max(1, classes - 1)
        if norm == "l1":
            return cls(
                restarts=5, targets=min(5, most), fab_targets=min(9, most), large_radii=True
            )
        return cls(targets=min(9, most), fab_targets=min(9, most))


def survivors(
    stage: Stage, answers: Answers, images: Images, labels: Labels, ball: AbstractBall, seed: int
) -> Tensor:
    """Which rows keep their label through a stage: (n,) bool. `images` are classified correctly.

    The verdict is the network's on the images that the attack hands over, if they are legal: inside
    the ball and [0, 1]. The global random state is as it was afterwards.
    """
    with torch.random.fork_rng(devices=_devices(images)), exact_float32():
        attack = _attack(stage, answers, images, ball, seed)
        found = attack.perturb(images.float(), labels.long()).detach()
        wrong = answers.classes(found) != labels
    return ~(wrong & _legal(found, images.float(), ball))


def _legal(found: Images, images: Images, ball: AbstractBall) -> Tensor:
    """Inside the ball, up to float32's rounding, and inside [0, 1]; NaN is not."""
    apart = ball.norm_of(found - images)
    inside = (found >= 0).flatten(1).all(1) & (found <= 1).flatten(1).all(1)
    return inside & (apart <= ball.eps * (1 + 1e-4) + 1e-6)


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 that is float32: no TF32 in convolutions and products, no autocast from outside."""
    # The old names of the switch for products may not be mixed with this one.
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


def _attack(stage: Stage, answers: Answers, images: Images, ball: AbstractBall, seed: int) -> Any:
    with torch.no_grad():
        classes = answers(images[:1].float()).shape[1]
    numbers = Standard.of(ball.norm, classes)
    common: dict[str, Any] = {
        "norm": _NORMS[ball.norm],
        "eps": ball.eps,
        "seed": seed,
        "device": images.device,
    }
    radii = {"use_largereps": numbers.large_radii, "logger": _silent()}
    if stage == "apgd-ce":
        return Apgd(
            answers,
            n_iter=numbers.steps,
            n_restarts=numbers.restarts,
            loss="ce",
            **radii,
            **common,
        )
    if stage == "apgd-t":
        kind = ApgdTargeted if classes >= _DLR_CLASSES else ApgdMargin
        return kind(
            answers, n_iter=numbers.steps, n_target_classes=numbers.targets, **radii, **common
        )
    if stage == "fab-t":
        return FABAttack_PT(
            answers,
            n_iter=numbers.steps,
            n_target_classes=numbers.fab_targets,
            targeted=True,
            **common,
        )
    return Square(answers, n_queries=numbers.queries, resc_schedule=False, **common)


class _EarlyExit:
    """An APGD whose rows stop costing once they have fallen."""

    model: Answers
    eps: float
    eps_orig: float

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if self.eps != self.eps_orig:  # a larger radius on the way: nothing found there counts
            return super().attack_single_run(x, y, x_init)  # pyright: ignore
        with self.model.sieving(y) as sieve:
            best, robust, loss, found = super().attack_single_run(x, y, x_init)  # pyright: ignore
        if sieve.found is not None:
            found[sieve.fallen] = sieve.found[sieve.fallen]
        return best, robust, loss, found


class Apgd(_EarlyExit, APGDAttack):
    """APGD on the cross-entropy."""


class ApgdTargeted(_EarlyExit, APGDAttack_targeted):
    """APGD on the targeted DLR loss, target after target."""


class ApgdMargin(ApgdTargeted):
    """With two or three classes, for which the targeted DLR is not defined: the bare difference of
    logits, its numerator."""

    y_target: Tensor

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.y_target] - x[rows, y]


class Square(SquareAttack):
    """Square that does not ask about the same image twice; l-inf only, the other norms as they are.

    All images of a batch try the same square at once. One whose best image is the same as when that
    square was last tried, or that the square would not change, knows the answer: no improvement.
    """

    predict: Answers
    eps: float

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm != "Linf":
            return super().attack_single_run(x, y)
        with torch.no_grad():
            return self._linf(x, y)

    def _linf(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        count, channels, height, width = x.shape
        stripes = self.random_choice([count, channels, 1, width])
        best = (x + self.eps * stripes).clamp(0, 1)
        margin = self._margin(best, y)
        queries = torch.ones(count, device=x.device)
        changed = torch.zeros(count, dtype=torch.long, device=x.device)
        tried: dict[tuple[int, ...], int] = {}
        for query in range(self.n_queries):
            if bool((margin <= 0).all()):
                break
            square = self._square(query, channels, height, width)
            known, tried[square.key] = tried.get(square.key, -1), query + 1
            rows = ((margin > 0) & (changed >= known)).nonzero().flatten()
            proposal = square.on(best[rows], x[rows], self.eps)
            moved = (proposal != best[rows]).flatten(1).any(1)
            rows, proposal = rows[moved], proposal[moved]
            if len(rows) == 0:
                continue
            found = self._margin(proposal, y[rows])
            better = found < margin[rows]
            rows = rows[better]
            margin[rows], best[rows] = found[better], proposal[better]
            changed[rows], queries[rows] = query + 1, float(query + 1)
        return queries, best

    def _margin(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logit of the label minus the largest other: the attack's loss, (n,)."""
        logits = self.predict(images)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    def _square(self, query: int, channels: int, height: int, width: int) -> _Square:
        """The next proposal, drawn as the library draws it."""
        size = max(round(math.sqrt(self.p_selection(query) * height * width)), 1)
        size = min(size, height, width)
        top = int(self.random_int(0, height - size))
        left = int(self.random_int(0, width - size))
        return _Square(top, left, size, self.random_choice([channels, 1, 1]))


@dataclass(frozen=True)
class _Square:
    """A square window in which every channel moves by 2 eps up or down."""

    top: int
    left: int
    size: int
    signs: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        return self.top, self.left, self.size, *(int(s) for s in self.signs.flatten().tolist())

    def on(self, best: Images, images: Images, eps: float) -> Images:
        """`best` with the window moved, inside the ball around `images` and [0, 1]."""
        move = torch.zeros_like(images[:1])
        window = slice(self.top, self.top + self.size), slice(self.left, self.left + self.size)
        move[:, :, window[0], window[1]] = 2 * eps * self.signs
        moved = (best + move).maximum(images - eps).minimum(images + eps)
        return moved.clamp(0, 1)


def _devices(images: Tensor) -> list[int]:
    return [images.device.index or 0] if images.device.type == "cuda" else []


def _silent() -> logging.Logger:
    """The library warns of zero gradients at every call; the checks say it once."""
    logger = logging.getLogger("raytrain.standard")
    logger.propagate = False
    logger.setLevel(logging.CRITICAL)
    return logger
