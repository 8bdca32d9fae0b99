"""What MLflow holds of a run: its configuration, its curves and how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrain.core.epoch_metrics import IN_EPS
from raytrain.evaluation.confidence import Share, wilson
from raytrain.report.evaluations import EvaluatedRun
from raytrain.tracking.run_search import parent_of
from raytrain.training.run_folder import short_id

Curve = dict[int, float]  # by epoch

CURVES = (
    "valid/robust",
    "valid/clean",
    "train/fosc",
    "train/inner_steps",
    "cost/fe",
    "cost/samples",
)
"""Metrics that are read epoch by epoch."""

_ENDS = {  # MLflow's word where no sweep said how a trial ended
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "interrupted",
    "RUNNING": "running, or its driver died",
    "SCHEDULED": "not begun",
}
_STOPPED = "stopped early"
_OUTCOMES = {"complete": "finished", "stopped": _STOPPED, "cut": "cut by the budget"}


@dataclass(frozen=True)
class Trained:
    """One run. `params` are flat, by dotted path, as the strings that MLflow keeps."""

    id: str
    name: str
    began: int  # milliseconds since 1970
    status: str  # MLflow's own word
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]  # the last value of each
    curves: Mapping[str, Curve] = field(default_factory=dict)
    evaluations: tuple[EvaluatedRun, ...] = ()
    split_size: int | None = None  # training images, where the run has its data sets
    valid_size: int | None = None  # validation images, likewise

    @property
    def seed(self) -> str:
        """Of the training; 0 where it is not recorded."""
        return self.params.get("seed", "0")

    @property
    def short(self) -> str:
        """Its name; of a trial of a sweep its handle, without what varies in it."""
        return self.tags.get("trial", self.name)

    @property
    def algorithm(self) -> str:
        """By name."""
        return self.params.get("algorithm.name", self.tags.get("algorithm", self.name))

    @property
    def imported(self) -> bool:
        """Whether it is a network in a file, of whose training nothing is known."""
        return self.tags.get("kind") == "imported"

    @property
    def stopped(self) -> bool:
        """Whether a pruner ended it: its numbers are not those of a whole run."""
        return self.state == _STOPPED

    @property
    def state(self) -> str:
        """How it ended, in words."""
        outcome = self.tags.get("outcome")
        if "stopped_by" in self.tags:
            return "stopped by a sentinel"
        if outcome is None:
            return _ENDS.get(self.status, self.status.lower())
        return _OUTCOMES.get(outcome, outcome)

    @property
    def ended(self) -> bool:
        """By itself or by a rule: not interrupted, failed, diverged or still running."""
        return self.status == "FINISHED" and self.tags.get("outcome") not in ("diverged", "failed")

    @property
    def data(self) -> str:
        """The data set by name."""
        return self.params.get("data.name", self.tags.get("data", "unknown data"))

    @property
    def contract(self) -> str:
        """The threat model it was trained for: the contract's hash, else norm and radius."""
        return self.tags.get("contract") or self.contract_text

    @property
    def contract_text(self) -> str:
        """The same in words."""
        norm, eps = self.params.get("threat.norm"), self.params.get("threat.eps")
        plain = self.tags.get("threat") or (f"{norm} {eps}" if norm else "unknown threat")
        return self.tags.get("contract_text") or plain.replace(" ", " eps ", 1)

    @property
    def failed_checks(self) -> str:
        """What an evaluation found wrong, such as `zero_gradients`; empty if nothing."""
        checks = self.tags.get("checks", "")
        return checks.partition(":")[2].strip() or checks if checks.startswith("FAILED") else ""

    @property
    def epochs(self) -> int:
        """Of the last row; 0 if there is none."""
        return max((max(curve) for curve in self.curves.values() if curve), default=0)

    @property
    def best_epoch(self) -> int | None:
        """The first one with the highest validation robustness: that of the best checkpoint."""
        curve = self.curves.get("valid/robust", {})
        return min(curve, key=lambda epoch: (-curve[epoch], epoch)) if curve else None

    @property
    def images(self) -> float | None:
        """Training images: those of the data set, else those that an epoch visits, in whole batches."""
        samples = self.curves.get("cost/samples", {})
        visited = samples[min(samples)] / min(samples) if samples and min(samples) > 0 else None
        return self.split_size or visited or None

    def per_image(self, fe: float | None) -> float | None:
        """Forward-equivalents per training image."""
        return fe / self.images if fe is not None and self.images else None

    def at_best(self, metric: str) -> float | None:
        """A metric of the best epoch."""
        best = self.best_epoch
        return None if best is None else self.curves.get(metric, {}).get(best)

    def valid(self, metric: str, last: bool = False) -> Share | None:
        """A share of the validation images, at the best or the last epoch; limits only if their number
        is known.
        """
        value = self.metrics.get(metric) if last else self.at_best(metric)
        if value is None:
            return None
        images = self._valid_images
        if not images or not math.isfinite(value):
            return Share(value, value, value, 0, 0)
        limits = wilson(round(value * images), images)
        return Share(value, limits.low, limits.high, limits.count, images)

    @property
    def _valid_images(self) -> int:
        """How many images a validation is of; 0 if unknown."""
        most = self.params.get("evaluation.images", "")
        size = self.valid_size or 0
        return min(size, int(most)) if most.isdigit() else size

    @property
    def valid_attack(self) -> str:
        """The attack of validation, as a column of an evaluation has it; empty where not recorded."""
        attack = self.params.get("evaluation.attack", "pgd")
        steps = self.params.get("evaluation.steps")
        if attack != "pgd" or steps is None:
            return attack if attack != "pgd" else ""
        restarts = self.params.get("evaluation.restarts", "1")
        return f"pgd{steps}" + ("" if restarts == "1" else f"x{restarts}")


def split_of(run: Trained) -> tuple[str, ...]:
    """What decides which images are trained on and which are held back."""
    names = ("name", "train_size", "validation", "split_seed", "image_column", "label_column")
    return tuple(run.params.get(f"data.{name}", "") for name in names)


def read(client: Any, run: Any, evaluations: tuple[EvaluatedRun, ...]) -> Trained:
    """A run of MLflow with its curves."""
    metrics = {name: float(value) for name, value in run.data.metrics.items()}
    return Trained(
        id=run.info.run_id,
        name=run.info.run_name or short_id(run.info.run_id),
        began=int(run.info.start_time or 0),
        status=str(run.info.status),
        params={name: v for name, v in run.data.params.items() if not name.endswith(IN_EPS)},
        tags={**run.data.tags, **({"parent": p} if (p := parent_of(run)) else {})},
        metrics=metrics,
        curves={name: _curve(client, run, name) for name in CURVES if name in metrics},
        evaluations=evaluations,
        split_size=_size(run, "training"),
        valid_size=_size(run, "validation"),
    )


def _size(run: Any, context: str) -> int | None:
    """The number of images of a data set of the run."""
    for data_set in run.inputs.dataset_inputs:
        contexts = [tag.value for tag in data_set.tags if tag.key == "mlflow.data.context"]
        if contexts == [context] and data_set.dataset.profile:
            return json.loads(data_set.dataset.profile).get("num_rows")
    return None


def _curve(client: Any, run: Any, metric: str) -> Curve:
    points = client.get_metric_history(run.info.run_id, metric)
    return {int(point.step): float(point.value) for point in points if point.step > 0}
