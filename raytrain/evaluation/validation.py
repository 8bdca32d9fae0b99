"""Clean and robust accuracy of a network, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from raytrain.attacks import ProjectedAscent
from raytrain.attacks.autoattack import CHEAP, survivors
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EvalReport
from raytrain.core.losses import AbstractLoss, CrossEntropy
from raytrain.core.network import Precision
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Batch, BatchRandom, Mask, Pixels, Progress, Rows, mix
from raytrain.evaluation.settings import PgdSettings


class Evaluation(PgdSettings):
    """The attack of validation; a sample counts as robust if it survives every attempt.

    `pgd` is that of `PgdSettings`. `apgd` is the cheap tier of AutoAttack, APGD on the
    cross-entropy and targeted APGD: about a hundred times the cost of PGD-10 for a robust network, and
    within 0.02 points of all of AutoAttack in published logs.
    """

    attack: Annotated[
        Literal["pgd", "apgd"], Field(description="pgd, or apgd: half of AutoAttack, costly")
    ] = "pgd"
    steps: Annotated[PositiveInt, Field(description="steps of the attack")] = 10
    eps: Annotated[
        Pixels | None, Field(ge=0, description="radius, where it is not that of training")
    ] = None
    every: Annotated[
        PositiveInt, Field(description="epochs between validations; the last is always one")
    ] = 1
    batch_size: Annotated[PositiveInt, Field(description="images attacked at once")] = 500

    @property
    def name(self) -> str:
        """Such as `pgd20`, `pgd20x5` with five restarts, `apgd-eps0.1` under a radius of its own."""
        attack = "apgd" if self.attack == "apgd" else self.named("pgd")
        return attack + ("" if self.eps is None else f"-eps{self.eps:.4g}")

    def ball(self, threat: AbstractThreatModel) -> AbstractThreatModel:
        """The threat model of the evaluation."""
        return threat if self.eps is None else threat.model_copy(update={"eps": self.eps})


@dataclass(frozen=True)
class SampleFlags:
    """Per-sample results, by index in the evaluated part of the data set."""

    index: Int[Tensor, " n"]
    clean: Bool[Tensor, " n"]
    robust: Bool[Tensor, " n"]


def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    ball: AbstractThreatModel,
    evaluation: Evaluation,
    context: DistributedContext,
    precision: Precision = "fp32",
) -> tuple[EvalReport, SampleFlags]:
    """Attack every sample of `batches` in eval mode; returns a report over all workers and the flags
    of this one.

    Always in float32 or wider, whatever precision the network was trained in; `apgd` is float32.
    """
    meter, ball = Meter(), evaluation.ball(ball)
    wide: Precision = "fp64" if precision == "fp64" else "fp32"
    counted = CountedModel(model, meter) if evaluation.attack == "apgd" else None
    index, clean, robust = [], [], []
    for batch in batches:
        oracle = Oracle(model, CrossEntropy(), batch, meter, attack_bn="eval", precision=wide)
        right = oracle.correct(torch.zeros_like(batch.images))
        index.append(batch.index)
        clean.append(right)
        if counted is not None:
            robust.append(_after_apgd(counted, batch, right, ball))
        else:
            attack, restarts = evaluation.ascent, evaluation.restarts
            rows = right.nonzero().flatten()
            robust.append(survived(model, batch, ball, attack, restarts, meter, wide, rows=rows))
    flags = SampleFlags(torch.cat(index), torch.cat(clean), torch.cat(robust))
    counts = torch.tensor(
        [len(flags.index), int(flags.clean.sum()), int(flags.robust.sum()), meter.fe],
        device=context.device,
    )
    images, num_clean, num_robust, fe = context.total(counts).tolist()
    report = EvalReport(num_clean / images, num_robust / images, images, evaluation.name, fe)
    return report, flags


def survived(
    model: nn.Module,
    batch: Batch,
    ball: AbstractThreatModel,
    attack: ProjectedAscent,
    restarts: int,
    meter: Meter,
    precision: Precision,
    objective: AbstractLoss | None = None,
    rows: Rows | None = None,
) -> Mask:
    """Which of the `rows` of `batch` (default: all) keep their label through every restart of an
    attack: a mask over the whole batch, false elsewhere.

    Fallen samples are not attacked again. `objective` is what the attack maximises: the
    cross-entropy if not given.
    """
    standing = torch.zeros(len(batch), dtype=torch.bool, device=batch.labels.device)
    standing[slice(None) if rows is None else rows] = True
    for restart in range(restarts):
        rows = standing.nonzero().flatten()
        if len(rows) == 0:
            break
        fresh = Batch(batch.images, batch.labels, batch.index, _reseeded(batch.rng, restart))
        start = attack.start.delta(ball, fresh, None)[rows]
        oracle = Oracle(
            model,
            CrossEntropy() if objective is None else objective,
            batch[rows],
            meter,
            attack_bn="eval",
            precision=precision,
        )
        found = attack.maximise(oracle, ball, start, Progress(1.0, 1.0))
        standing[rows] = oracle.correct(found.delta)
    return standing


def _after_apgd(
    counted: CountedModel, batch: Batch, right: Mask, ball: AbstractThreatModel
) -> Mask:
    """Of the samples that are `right` on clean images, those that survive the cheap tier."""
    robust = right.clone()
    for stage in CHEAP:
        rows = robust.nonzero().flatten()
        if len(rows):
            part = batch[rows]
            robust[rows] = survivors(stage, counted, part.images, part.labels, ball, seed=0)
    return robust


def _reseeded(rng: BatchRandom, restart: int) -> BatchRandom:
    return BatchRandom(mix(rng.seed, restart), rng.width, rng.slots, rng.device)
