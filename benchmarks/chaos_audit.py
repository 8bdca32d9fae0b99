"""What a round of `chaos.py` left behind, counted from the outside: weights, steps, and runs in MLflow."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from chaos_network import Pass
from chaos_stage import Cluster
from faults_audit import runs_of
from mlflow import MlflowClient
from mlflow.entities import Run

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the storage."""

    rate: float  # by which trials of a sweep differ
    weights: Weights
    sound: bool  # it matches its checksum

    @classmethod
    def of(cls, cluster: Cluster, path: str) -> Checkpoint:
        """The file at a path of the storage."""
        raw = cluster.file(path)
        digest = cluster.file(f"{path}.sha256").decode().split()[0]
        content = torch.load(io.BytesIO(raw), weights_only=True)
        rate = json.loads(content["run"])["optimizer"]["lr"]
        return cls(rate, content["model"], hashlib.sha256(raw).hexdigest() == digest)

    def distance(self, other: Checkpoint) -> float:
        """The largest difference of two weights; 0 if all are the same to the last bit."""
        mine, its = self.weights, other.weights
        if mine.keys() != its.keys():
            return math.inf
        return max(float((mine[name] - its[name]).abs().max()) for name in mine)


def repeated(processes: list[list[Pass]]) -> list[tuple[float, int]]:
    """When each process of rank 0 after the first began, and how many steps it repeated.

    A step is known by the checksum of its images.
    """
    found = []
    for before, after in zip(processes, processes[1:], strict=False):
        sums = [checksum for _, checksum, _ in before]
        steps = len(sums) - sums.index(after[0][1]) if after[0][1] in sums else 0
        found.append((after[0][0], steps))
    return found


def longest_pause(times: list[float], after: float, before: float) -> float:
    """Seconds between two passes one after the other, the first of which is in this time at the latest."""
    pairs = zip(times, times[1:], strict=False)
    return max((b - a for a, b in pairs if b > after and a < before), default=0.0)


def training_runs(uri: str, experiment: str, epochs: int) -> dict[str, list[str]]:
    """Violations in the MLflow runs of one training."""
    client = MlflowClient(uri)
    runs = runs_of(client, experiment)
    names = [run.info.run_id for run in runs]
    points = _points(client, runs[0]) if runs else {}
    wanted = range(1, epochs + 1)
    return {
        "MLflow runs missing": [] if runs else [experiment],
        "MLflow runs doubled": names[1:],
        "MLflow runs left RUNNING": [r.info.run_id for r in runs if r.info.status == "RUNNING"],
        "rows missing in MLflow": [
            f"epoch {epoch}" for epoch in wanted if points.get("train/loss", {}).get(epoch) is None
        ],
        "metric points doubled": [
            f"{name} {step}"
            for name, steps in points.items()
            for step, count in steps.items()
            if count > 1
        ],
    }


def _points(client: MlflowClient, run: Run) -> Mapping[str, Counter[int]]:
    return {
        name: Counter(point.step for point in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
        if not name.startswith("step/")
    }


def listed(found: Mapping[str, Any]) -> dict[str, int]:
    """How often each violation was found."""
    return {name: len(cases) for name, cases in found.items()}
