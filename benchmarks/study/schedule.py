"""The tasks of a study in their order, and which of them is next, given the records that there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from raytrain.config.run import RunConfig

from .problem import Problem, Task
from .records import Record


class Schedule:
    """First the trials of all methods in turn, then the runs by evaluation, budget and seed, in this order.

    Records of another configuration than the present one are left out: they are of an earlier problem.
    """

    def __init__(self, problem: Problem, records: Sequence[Record]) -> None:
        self.problem = problem
        self._found = {record.key: record for record in records}

    @cached_property
    def records(self) -> list[Record]:
        """The records of tasks of this problem as it is now."""
        return [record for task in self.tasks() if (record := self._of(task)) is not None]

    def tasks(self) -> Iterator[Task]:
        """All tasks that are known: runs of a method are, once its trials are done."""
        yield from self._trials()
        for evaluation in range(len(self.problem.evaluations)):
            for budget in self.problem.budgets:
                for seed in range(self.problem.seeds):
                    yield from self._runs(budget, seed, evaluation)

    @property
    def count(self) -> int:
        """How many tasks there are in all."""
        problem = self.problem
        runs = len(problem.budgets) * problem.seeds * len(problem.evaluations)
        return len(problem.methods) * (self.num_trials + runs)

    @property
    def num_trials(self) -> int:
        """Trials of a method's search."""
        return 0 if self.problem.tuning is None else self.problem.tuning.trials

    def config(self, task: Task) -> RunConfig:
        """The configuration of a task's training."""
        if task.phase == "tune":
            return self.problem.trial(task.method, task.trial)
        return self.problem.run(task.method, task.trial, task.budget, task.seed)

    def next(self, seconds: float, running: Collection[Task]) -> Task | None:
        """The first task without a record that will end in this time, else the first; None if all are done.

        No task of a training that is `running`.
        """
        busy = {task.training for task in running}
        left = [t for t in self.tasks() if self._of(t) is None and t.training not in busy]
        fitting = (task for task in left if self.seconds(task) <= seconds)
        return next(fitting, left[0] if left else None)

    def seconds(self, task: Task) -> float:
        """How long a task takes, from the records of its method or else of all; 0 where there are none."""
        alike = [r for r in self.records if r.finished and r.task.evaluation == task.evaluation]
        own = [record for record in alike if record.method == task.method]
        paces = [(r.seconds + (r.evaluation_seconds or 0)) / r.budget for r in own or alike]
        return statistics.median(paces) * task.budget if paces else 0.0

    def chosen(self, method: str) -> int | None:
        """The trial whose hyperparameters a method's runs have; None before its trials are done.

        The one with the highest robust accuracy in validation at its last epoch, of those that are within
        the bounds of the space, or of all where none is. Without a search it is 0.
        """
        if self.num_trials == 0:
            return 0
        trials = [self._of(task) for task in self._trials() if task.method == method]
        done = [record for record in trials if record is not None]
        if len(done) < len(trials):
            return None
        measured = [record for record in done if record.finished and _value(record) >= 0]
        feasible = [record for record in measured if self._is_feasible(record)]
        best = max(feasible or measured, key=lambda r: (_value(r), -r.trial), default=None)
        return None if best is None else best.trial

    def _is_feasible(self, record: Record) -> bool:
        limits = self.problem.spaces[record.method].feasible
        return all(
            limit.excess(record.metrics[metric]) <= 0
            for metric, limit in limits.items()
            if metric in record.metrics
        )

    def _trials(self) -> Iterator[Task]:
        tuning, name = self.problem.tuning, self.problem.name
        for number in range(0 if tuning is None else tuning.trials):
            assert tuning is not None
            for method in self.problem.methods:
                yield Task(name, "tune", method, number, tuning.fe_per_image, tuning.seed)

    def _runs(self, budget: float, seed: int, evaluation: int) -> Iterator[Task]:
        for method in self.problem.methods:
            if (trial := self._choices[method]) is not None:
                yield Task(self.problem.name, "run", method, trial, budget, seed, evaluation)

    @cached_property
    def _choices(self) -> dict[str, int | None]:
        return {method: self.chosen(method) for method in self.problem.methods}

    def _of(self, task: Task) -> Record | None:
        return self._found.get((task.key, self.config(task).signature()))


def _value(record: Record) -> float:
    """What trials are chosen by; negative where it is unknown."""
    value = record.valid_robust
    return -1.0 if value is None or not math.isfinite(value) else value
