"""Evaluator of one process: runs work items on a network and a test set."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raytrain.attacks import ProjectedAscent, Zero
from raytrain.attacks.autoattack import exact_float32, survivors
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.core.cost import Meter
from raytrain.core.losses import AbstractLoss, CrossEntropy, Margin
from raytrain.core.network import Precision
from raytrain.core.oracle import Oracle
from raytrain.core.recording import Recorder
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import BatchRandom, Delta, Images, Labels, Progress, mix
from raytrain.data.loader import SplitShard
from raytrain.evaluation.checks import Finding, before_belief, under_noise
from raytrain.evaluation.checks.gradients import Connected
from raytrain.evaluation.settings import (
    CLEAN,
    NOISE,
    EvaluationSettings,
    PgdSettings,
    standard_stage,
)
from raytrain.evaluation.validation import survived
from raytrain.evaluation.work_item import WorkItem, WorkResult

_CHECKED = 512  # images from which the checks draw theirs
_DRAWS = 20  # of noise


Attacked = tuple[Images, Delta, Labels]
"""Images, the perturbation, and the predicted classes of the perturbed images."""


class Evaluator:
    """Attacks on a network under a threat model; a result depends on its item and the settings alone.

    A `recorder` records the passes of AutoAttack.
    """

    def __init__(
        self,
        model: nn.Module,
        part: SplitShard,
        ball: AbstractThreatModel,
        settings: EvaluationSettings,
        precision: Precision = "fp32",
        recorder: Recorder | None = None,
    ) -> None:
        self._model, self._part, self._ball, self._settings = model, part, ball, settings
        self._precision: Precision = "fp64" if precision == "fp64" else "fp32"
        self._meter = Meter()
        # Where the network cuts the graph the gradient is zero; the checks report that.
        self._attackable = Connected(model)
        self._answers = CountedModel(self._attackable, self._meter, recorder, settings.batch_size)

    def run(self, item: WorkItem) -> WorkResult:
        """Run one work item."""
        began, before = time.perf_counter(), self._meter.fe
        rows = torch.tensor(item.rows, device=self._part.context.device)
        with exact_float32():
            values = [int(value) for value in self._values(item.stage, rows)]
        seconds = time.perf_counter() - began
        return WorkResult(item, tuple(values), self._meter.fe - before, seconds)

    def findings(self) -> list[Finding]:
        """The checks that need no attack results, on some of the images."""
        count = min(self._part.num_images, self._settings.images or self._part.num_images)
        generator = torch.Generator().manual_seed(mix(self._settings.seed, "checks"))
        rows = torch.randperm(count, generator=generator)[:_CHECKED].sort().values
        rows = rows.to(self._part.context.device)
        batch = self._part.batch(rows, BatchRandom(0, len(rows), slice(None), rows.device))
        with exact_float32():
            return before_belief(
                self._model, batch.images, batch.labels, self._ball, self._settings.seed
            )

    def attacked(self, rows: Tensor) -> Attacked:
        """These images under PGD-20, on the CPU."""
        rows = rows.to(self._part.context.device)
        rng = BatchRandom(
            mix(self._settings.seed, "examples"), len(rows), slice(None), rows.device
        )
        batch = self._part.batch(rows, rng)
        attack = PgdSettings(steps=20).ascent
        oracle = Oracle(
            self._attackable,
            CrossEntropy(),
            batch,
            Meter(),
            attack_bn="eval",
            precision=self._precision,
        )
        start = attack.start.delta(self._ball, batch, None)
        delta = attack.maximise(oracle, self._ball, start, Progress(1.0, 1.0)).delta
        classes = self._answers.classes((batch.images + delta).float())
        return batch.images.cpu(), delta.cpu(), classes.cpu()

    def _values(self, stage: str, rows: Tensor) -> Iterable[bool | int]:
        seed = mix(self._settings.seed, stage, int(rows[0]))
        batch = self._part.batch(rows, BatchRandom(seed, len(rows), slice(None), rows.device))
        if stage == CLEAN:
            return self._answers.classes(batch.images.float()).tolist()
        if stage == NOISE:
            self._meter.forwards += _DRAWS * len(rows)
            return under_noise(
                self._model, batch.images, batch.labels, self._ball, self._settings.seed, _DRAWS
            ).tolist()
        standard = standard_stage(stage)
        if standard is not None:
            return survivors(
                standard,
                self._answers,
                batch.images,
                batch.labels,
                self._ball,
                self._settings.seed,
            ).tolist()
        attack, objective, restarts = self._simple(stage)
        return survived(
            self._attackable,
            batch,
            self._ball,
            attack,
            restarts,
            self._meter,
            self._precision,
            objective,
        ).tolist()

    def _simple(self, stage: str) -> tuple[ProjectedAscent, AbstractLoss, int]:
        if stage == "fgsm":
            attack = ProjectedAscent(start=Zero(), steps=1, step_size="eps", bn="eval")
            return attack, CrossEntropy(), 1
        objective = Margin() if stage.startswith("cw") else CrossEntropy()
        return self._settings.ascent, objective, self._settings.restarts
