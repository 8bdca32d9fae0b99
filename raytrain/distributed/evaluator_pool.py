"""Who attacks: this process alone, or several on a Ray cluster, which share out the units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import local_context
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
from raytrain.evaluation.work_item import Verdict, WorkItem
from raytrain.training.checkpoint import Saved
from raytrain.training.trainer import network


class EvaluatorPool(Protocol):
    """Evaluators of one network: see `Evaluator`."""

    def examine(self, work_items: list[WorkItem]) -> Iterator[Verdict]:
        """Carry out units, told in any order."""
        ...

    def findings(self) -> list[Finding]:
        """The checks that need no verdicts."""
        ...

    def attacked(self, rows: Tensor) -> Attacked:
        """Examples of an attack."""
        ...


@contextmanager
def evaluator_pool(
    config: RunConfig, saved: Saved, exam: EvaluationSettings
) -> Iterator[EvaluatorPool]:
    """As many evaluators as the run has workers; more than one, or RAY_ADDRESS, means Ray."""
    if config.workers == 1 and wanted_cluster() is None:
        yield _Alone(_examiner(config, saved, exam))
        return
    import ray

    # One process is one worker here: none of them waits for another.
    alone = config.model_copy(update={"workers": 1})
    with session(alone, trials=config.workers):
        count = concurrent_trials(alone, config.workers)
        needs = worker_resources(config)
        kind: Any = ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            max_restarts=config.max_failures,
            max_task_retries=config.max_failures,
        )(_RemoteEvaluator)
        content = ray.put(saved)
        yield _Several([kind.remote(config, content, exam) for _ in range(count)])


class _Alone:
    def __init__(self, examiner: Evaluator) -> None:
        self.findings, self.attacked = examiner.findings, examiner.attacked
        self._one = examiner

    def examine(self, work_items: list[WorkItem]) -> Iterator[Verdict]:
        return map(self._one.examine, work_items)


class _Several:
    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def examine(self, work_items: list[WorkItem]) -> Iterator[Verdict]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self._actors)
        yield from pool.map_unordered(lambda actor, unit: actor.examine.remote(unit), work_items)

    def findings(self) -> list[Finding]:
        return self._first("findings")

    def attacked(self, rows: Tensor) -> Attacked:
        return self._first("attacked", rows)

    def _first(self, method: str, *given: Any) -> Any:
        import ray

        return ray.get(getattr(self._actors[0], method).remote(*given))


class _RemoteEvaluator:
    """an evaluator as a Ray actor, built where it runs."""

    def __init__(self, config: RunConfig, saved: Saved, exam: EvaluationSettings) -> None:
        self._examiner = _examiner(config, saved, exam)

    def examine(self, unit: WorkItem) -> Verdict:
        return self._examiner.examine(unit)

    def findings(self) -> list[Finding]:
        return self._examiner.findings()

    def attacked(self, rows: Tensor) -> Attacked:
        return self._examiner.attacked(rows)


def _examiner(config: RunConfig, saved: Saved, exam: EvaluationSettings) -> Evaluator:
    """an evaluator of a checkpoint, on the device of this process."""
    place = local_context(config.device)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    part, _ = open_test(config.data, place, dtype)
    model = network(saved, config.data).to(place.device)
    return Evaluator(model, part, config.threat, exam, config.precision)
