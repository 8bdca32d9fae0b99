"""Who attacks: this process alone, or several on a Ray cluster, which share out the units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrain.checkpoint import Saved
from raytrain.config import RunConfig
from raytrain.data.loader import open_test
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.exam import Exam
from raytrain.evaluation.examiner import Attacked, Examiner
from raytrain.evaluation.unit import Unit, Verdict
from raytrain.loop import network
from raytrain.place import here
from raytrain.session import session, slots, wanted_cluster, worker_resources


class Panel(Protocol):
    """Examiners of one network: see `Examiner`."""

    def examine(self, units: list[Unit]) -> Iterator[Verdict]:
        """Carry out units, told in any order."""
        ...

    def findings(self) -> list[Finding]:
        """The checks that need no verdicts."""
        ...

    def attacked(self, rows: Tensor) -> Attacked:
        """Examples of an attack."""
        ...


@contextmanager
def panel_of(config: RunConfig, saved: Saved, exam: Exam) -> Iterator[Panel]:
    """As many examiners as the run has workers; more than one, or RAY_ADDRESS, means Ray."""
    if config.workers == 1 and wanted_cluster() is None:
        yield _Alone(_examiner(config, saved, exam))
        return
    import ray

    # One process is one worker here: none of them waits for another.
    alone = config.model_copy(update={"workers": 1})
    with session(alone, trials=config.workers):
        count = slots(alone, config.workers)
        needs = worker_resources(config)
        kind: Any = ray.remote(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            max_restarts=config.max_failures,
            max_task_retries=config.max_failures,
        )(_RemoteExaminer)
        content = ray.put(saved)
        yield _Several([kind.remote(config, content, exam) for _ in range(count)])


class _Alone:
    def __init__(self, examiner: Examiner) -> None:
        self.findings, self.attacked = examiner.findings, examiner.attacked
        self._one = examiner

    def examine(self, units: list[Unit]) -> Iterator[Verdict]:
        return map(self._one.examine, units)


class _Several:
    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def examine(self, units: list[Unit]) -> Iterator[Verdict]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self._actors)
        yield from pool.map_unordered(lambda actor, unit: actor.examine.remote(unit), units)

    def findings(self) -> list[Finding]:
        return self._first("findings")

    def attacked(self, rows: Tensor) -> Attacked:
        return self._first("attacked", rows)

    def _first(self, method: str, *given: Any) -> Any:
        import ray

        return ray.get(getattr(self._actors[0], method).remote(*given))


class _RemoteExaminer:
    """An examiner as a Ray actor, built where it runs."""

    def __init__(self, config: RunConfig, saved: Saved, exam: Exam) -> None:
        self._examiner = _examiner(config, saved, exam)

    def examine(self, unit: Unit) -> Verdict:
        return self._examiner.examine(unit)

    def findings(self) -> list[Finding]:
        return self._examiner.findings()

    def attacked(self, rows: Tensor) -> Attacked:
        return self._examiner.attacked(rows)


def _examiner(config: RunConfig, saved: Saved, exam: Exam) -> Examiner:
    """An examiner of a checkpoint, on the device of this process."""
    place = here(config.device)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    part, _ = open_test(config.data, place, dtype)
    model = network(saved, config.data).to(place.device)
    return Examiner(model, part, config.threat, exam, config.precision)
