"""Evaluators in this process or on a Ray cluster, which share the work items."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import local_context
from raytrain.core.recording import CudaGraphs
from raytrain.data.loader import open_test
from raytrain.distributed.ray_session import (
    concurrent_trials,
    session,
    wanted_cluster,
    worker_resources,
)
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.evaluator import Attacked, Evaluator
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.evaluation.work_item import WorkItem, WorkResult
from raytrain.training.checkpoint import Saved
from raytrain.training.setup import network


class EvaluatorPool(Protocol):
    """Evaluators of one network: see `Evaluator`."""

    def run(self, work_items: list[WorkItem]) -> Iterator[WorkResult]:
        """Run work items; yields results in any order."""
        ...

    def findings(self) -> list[Finding]:
        """The checks that need no attack results."""
        ...

    def attacked(self, rows: Tensor) -> Attacked:
        """Examples of an attack."""
        ...


@contextmanager
def evaluator_pool(
    config: RunConfig, saved: Saved, settings: EvaluationSettings
) -> Iterator[EvaluatorPool]:
    """As many evaluators as the run has workers; more than one, or RAY_ADDRESS, means Ray."""
    if config.workers == 1 and wanted_cluster() is None:
        yield _Alone(_evaluator(config, saved, settings))
        return
    import ray

    # Each process is a worker group of one.
    alone = config.model_copy(update={"workers": 1, "min_workers": None})
    with session(alone, trials=config.workers):
        count = concurrent_trials(alone, config.workers)
        needs = worker_resources(config)
        kind: Any = ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            max_restarts=config.max_failures,
            max_task_retries=config.max_failures,
        )(_RemoteEvaluator)
        # Within a list: Ray warns on stderr of an actor that is given one and may be restarted.
        content = [ray.put(saved)]
        yield _Several([kind.remote(config, content, settings) for _ in range(count)])


class _Alone:
    def __init__(self, evaluator: Evaluator) -> None:
        self.findings, self.attacked = evaluator.findings, evaluator.attacked
        self._one = evaluator

    def run(self, work_items: list[WorkItem]) -> Iterator[WorkResult]:
        return map(self._one.run, work_items)


class _Several:
    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def run(self, work_items: list[WorkItem]) -> Iterator[WorkResult]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self._actors)
        yield from pool.map_unordered(lambda actor, item: actor.run.remote(item), work_items)

    def findings(self) -> list[Finding]:
        return self._first("findings")

    def attacked(self, rows: Tensor) -> Attacked:
        return self._first("attacked", rows)

    def _first(self, method: str, *given: Any) -> Any:
        import ray

        return ray.get(getattr(self._actors[0], method).remote(*given))


class _RemoteEvaluator:
    """An evaluator as a Ray actor, built in its process."""

    def __init__(self, config: RunConfig, saved: list[Any], settings: EvaluationSettings) -> None:
        import ray

        self._evaluator = _evaluator(config, ray.get(saved[0]), settings)

    def run(self, item: WorkItem) -> WorkResult:
        return self._evaluator.run(item)

    def findings(self) -> list[Finding]:
        return self._evaluator.findings()

    def attacked(self, rows: Tensor) -> Attacked:
        return self._evaluator.attacked(rows)


def _evaluator(config: RunConfig, saved: Saved, settings: EvaluationSettings) -> Evaluator:
    """Build an evaluator of a checkpoint on the device of this process."""
    context = local_context(config.device)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    part, _ = open_test(config.data, context, dtype)
    model = network(saved, config.data).to(context.device)
    # A recording would fix what the code of a user's network decides on the host.
    recorded = context.device.type == "cuda" and not config.model.users
    recorder = CudaGraphs(context.device) if recorded else None
    return Evaluator(model, part, config.threat, settings, config.precision, recorder)
