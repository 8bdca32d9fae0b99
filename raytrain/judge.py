"""Clean and robust accuracy of a network, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from raytrain.attacks import ProjectedAscent, Uniform
from raytrain.balls import AbstractBall
from raytrain.meter import Meter
from raytrain.network import Precision
from raytrain.objectives import CrossEntropy
from raytrain.oracle import Oracle
from raytrain.place import Place
from raytrain.record import EvalReport
from raytrain.types import Batch, Clock, Dice, Number, Spec, StepSize, mix


class Evaluation(Spec):
    """PGD-`steps` with random starts; a sample counts as robust if it survives every restart."""

    steps: Annotated[PositiveInt, Field(description="PGD steps")] = 10
    step_size: StepSize = "eps/4"
    restarts: PositiveInt = 1
    eps: Annotated[
        Number | None, Field(ge=0, description="radius, where it is not that of training")
    ] = None
    every: Annotated[
        PositiveInt, Field(description="epochs between validations; the last is always one")
    ] = 1
    batch_size: PositiveInt = 500

    @property
    def name(self) -> str:
        """Such as `pgd20`, `pgd20x5` with five restarts, `pgd20-eps0.1` under a radius of its own."""
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"pgd{self.steps}{restarts}" + ("" if self.eps is None else f"-eps{self.eps:.4g}")

    def ball(self, threat: AbstractBall) -> AbstractBall:
        """The threat model that is evaluated under."""
        return threat if self.eps is None else threat.model_copy(update={"eps": self.eps})


@dataclass(frozen=True)
class Flags:
    """Per-sample verdicts, by index in the part of the data set that was evaluated."""

    index: Int[Tensor, " n"]
    clean: Bool[Tensor, " n"]
    robust: Bool[Tensor, " n"]


def judge(
    model: nn.Module,
    batches: Iterable[Batch],
    ball: AbstractBall,
    evaluation: Evaluation,
    place: Place,
    precision: Precision = "fp32",
) -> tuple[EvalReport, Flags]:
    """Attack every sample of `batches` in eval mode; the report is over all workers, the flags are
    this one's.

    Always in float32 or wider, whatever precision the network was trained in.
    """
    meter, ball = Meter(), evaluation.ball(ball)
    attack = ProjectedAscent(
        start=Uniform(), steps=evaluation.steps, step_size=evaluation.step_size, bn="eval"
    )
    index, clean, robust = [], [], []
    for batch in batches:
        right, survived = _verdicts(
            model, batch, ball, attack, evaluation.restarts, meter, precision
        )
        index.append(batch.index)
        clean.append(right)
        robust.append(survived)
    flags = Flags(torch.cat(index), torch.cat(clean), torch.cat(robust))
    counts = torch.tensor(
        [len(flags.index), int(flags.clean.sum()), int(flags.robust.sum()), meter.fe],
        device=place.device,
    )
    images, num_clean, num_robust, fe = place.total(counts).tolist()
    report = EvalReport(num_clean / images, num_robust / images, images, evaluation.name, fe)
    return report, flags


def _verdicts(
    model: nn.Module,
    batch: Batch,
    ball: AbstractBall,
    attack: ProjectedAscent,
    restarts: int,
    meter: Meter,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Clean and worst-case correctness; samples that have fallen are not attacked again."""
    wide: Precision = "fp64" if precision == "fp64" else "fp32"
    oracle = Oracle(model, CrossEntropy(), batch, meter, attack_bn="eval", precision=wide)
    clean = oracle.correct(torch.zeros_like(batch.images))
    robust = clean.clone()
    for restart in range(restarts):
        rows = robust.nonzero().flatten()
        if len(rows) == 0:
            break
        fresh = Batch(batch.images, batch.labels, batch.index, _reseeded(batch.dice, restart))
        start = attack.start.delta(ball, fresh, None)[rows]
        standing = Oracle(
            model, CrossEntropy(), batch[rows], meter, attack_bn="eval", precision=wide
        )
        found = attack.maximise(standing, ball, start, Clock(1.0, 1.0))
        robust[rows] = standing.correct(found.delta)
    return clean, robust


def _reseeded(dice: Dice, restart: int) -> Dice:
    return Dice(mix(dice.seed, restart), dice.width, dice.slots, dice.device)
