"""Sentinels: signs of false robustness, measured at every validation.

On a fixed probe, the first images of the validation part, in eval mode, all shares of its images:

    fgsm       accuracy under one step of eps from the image itself
    robust     accuracy under the attack of validation, from its flags at no cost
    fgsm_gap   fgsm - robust: large once one step no longer finds what many do (catastrophic
               overfitting, Wong et al. 2020, arXiv 2001.03994)
    zero_grad  of the images that are classified correctly, those whose input gradient has vanished
    noise_gap  images that survive the attack of validation and fall to one of a few random corners
               of the ball: a black box that beats a white one (Athalye et al. 2018, arXiv 1802.00420)

FGSM starts at the image and not at a random point: it then draws nothing, so that the gap is a
function of the weights alone, it ends where a network that has overfitted to single steps was
trained, and its gradient is the one that `zero_grad` is about. With r images of the probe correct and
s robust this costs at most 3 r + corners * s forward-equivalents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor, nn

from raytrain.attacks import ProjectedAscent, Zero
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.losses import CrossEntropy
from raytrain.core.network import Precision
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel, in_box
from raytrain.core.types import Batch, BatchRandom, Number, Progress, Spec, mix
from raytrain.data.loader import SplitShard
from raytrain.evaluation.validation import SampleFlags

VANISHED = 2.0**-24
"""Nats that all of the ball could gain to first order, at most: from here on the probability of the
label rounds to 1 in float32 and its part of the gradient to 0."""

_FGSM = ProjectedAscent(start=Zero(), steps=1, step_size="eps", bn="eval")

Level = Annotated[Number | None, Field(ge=0, le=1)]


class Levels(Spec):
    """Values above which a run ends; null: no limit."""

    fgsm_gap: Annotated[
        Level, Field(description="accuracy under one step less that of validation")
    ] = None
    zero_grad: Annotated[
        Level, Field(description="share of correct images whose gradient has vanished")
    ] = None
    noise_gap: Annotated[
        Level, Field(description="share that survives the attack and falls to noise")
    ] = None
    robust_drop: Annotated[Level, Field(description="share of the best valid/robust lost")] = None

    def limits(self) -> dict[str, float]:
        """The levels that are set, by the metric they are about."""
        return {metric_of(name): level for name, level in self if level is not None}


def metric_of(reading: str) -> str:
    """The metric that a reading is logged as."""
    return ("valid/" if reading == "robust_drop" else "sentinel/") + reading


def _none_as_empty(value: Any) -> Any:
    return {} if value is None else value


class Sentinels(Spec):
    """The sentinels beside the validation, and the values that end a run."""

    images: Annotated[
        PositiveInt, Field(description="size of the probe: so many of the validation images")
    ] = 128
    corners: Annotated[PositiveInt, Field(description="random corners that each is tried at")] = 2
    stop: Annotated[
        Levels,
        BeforeValidator(_none_as_empty, json_schema_input_type=Levels | None),
        Field(description="values above which the run ends"),
    ] = Levels()

    def alarm(self, seen: Mapping[str, float]) -> str | None:
        """The first level that readings pass, its field first; None if they pass none."""
        for name, level in self.stop:
            value = seen.get(name)
            if level is not None and value is not None and value > level:
                return f"sentinels.stop.{name}: {metric_of(name)} is {value:.4g}, above {level:g}"
        return None


def probe(
    part: SplitShard, flags: SampleFlags, images: int, batch_size: int, seed: int
) -> Iterator[tuple[Batch, SampleFlags]]:
    """This worker's share of the first `images` images, as far as they were evaluated, with
    their flags.
    """
    width = min(images, part.num_images)
    for rows in (flags.index < width).nonzero().flatten().split(batch_size):
        index = flags.index[rows]
        rng = BatchRandom(mix(seed, "probe"), width, index, index.device)
        yield part.batch(index, rng), SampleFlags(index, flags.clean[rows], flags.robust[rows])


def readings(
    model: nn.Module,
    probed: Iterable[tuple[Batch, SampleFlags]],
    ball: AbstractThreatModel,
    corners: int,
    context: DistributedContext,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """The sentinel values by name, over all workers: a collective. `fe` is their cost.

    `zero_grad` is left out where no image is classified correctly. Always in float32 or wider, as
    the validation is.
    """
    meter, wide = Meter(), "fp64" if precision == "fp64" else "fp32"
    counts = torch.zeros(6, dtype=torch.int64, device=context.device)
    for batch, flags in probed:
        fgsm, vanished = _one_step(model, batch[_rows(flags.clean)], ball, meter, wide)
        fallen = _fallen_at_corners(model, batch, _rows(flags.robust), ball, corners, meter, wide)
        found = [len(batch), int(flags.clean.sum()), int(flags.robust.sum())]
        counts += torch.tensor([*found, fgsm, vanished, fallen], device=context.device)
    images, clean, robust, fgsm, vanished, fallen = context.total(counts).tolist()
    seen = {
        "fgsm": fgsm / images,
        "robust": robust / images,
        "fgsm_gap": (fgsm - robust) / images,
        "noise_gap": fallen / images,
        "fe": float(meter.total(context).fe),
    }
    return {**seen, "zero_grad": vanished / clean} if clean else seen


def _one_step(
    model: nn.Module, right: Batch, ball: AbstractThreatModel, meter: Meter, precision: Precision
) -> tuple[int, int]:
    """Of correctly classified images, how many survive FGSM, and how many have no gradient."""
    if len(right) == 0:
        return 0, 0
    oracle = Oracle(model, CrossEntropy(), right, meter, attack_bn="eval", precision=precision)
    found = _FGSM.maximise(oracle, ball, torch.zeros_like(right.images), Progress(1.0, 1.0))
    assert oracle.latest is not None
    # Without a ball there is nothing to gain in it: then of a step of one.
    gain = (ball.eps or 1.0) * ball.dual_norm(oracle.latest)
    return int(oracle.correct(found.delta).sum()), int((gain <= VANISHED).sum())


def _fallen_at_corners(
    model: nn.Module,
    batch: Batch,
    standing: Tensor,
    ball: AbstractThreatModel,
    corners: int,
    meter: Meter,
    precision: Precision,
) -> int:
    """How many of the rows `standing` fall to a random corner; those that have are not tried again."""
    before = len(standing)
    for corner in range(corners):
        if len(standing) == 0:
            break
        there = batch[standing]
        delta = _corner(ball, batch, f"corner{corner}")[standing]
        oracle = Oracle(model, CrossEntropy(), there, meter, attack_bn="eval", precision=precision)
        standing = standing[oracle.correct(delta)]
    return before - len(standing)


def _corner(ball: AbstractThreatModel, batch: Batch, purpose: str) -> Tensor:
    """A random extreme point of the ball for each image, clipped to the pixel box.

    l-inf: every pixel at +-eps; l2: a uniform direction; l1: all of eps on one pixel.
    """
    noise = batch.rng.normal(purpose, *batch.images.shape[1:]).to(batch.images.dtype)
    return in_box(ball.eps * ball.steepest(noise), batch.images)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()
