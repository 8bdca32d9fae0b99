"""Progress and budget of a sweep, updated as trials end, at constant cost per trial."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from raytrain.tuning.space.settings import Budget

ENDED = ("complete", "stopped", "infeasible", "diverged", "failed")
"""Outcomes that count as trials. `cut` (by the end of the budget) and `rejected` (by a constraint) do not."""


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the table at the end shows it."""

    number: int
    state: str  # one of ENDED, cut, rejected or running
    values: tuple[float, ...]  # of the objectives; empty if it never reported
    params: dict[str, Any]  # in the units of the run
    metrics: dict[str, float]  # of the last row
    epochs: int
    handle: str  # of its MLflow run, and the name of its folder
    error: str | None = None  # why it diverged or failed

    @property
    def value(self) -> float | None:
        """The first objective."""
        return self.values[0] if self.values else None


@dataclass(frozen=True)
class Running:
    """A trial under way."""

    number: int
    epoch: int  # under way, from 1
    progress: float  # share of training that is done
    value: float | None
    params: dict[str, Any]
    images_per_second: float | None = None  # of its last epoch


@dataclass(frozen=True)
class SweepProgress:
    """Progress of a sweep."""

    finished: int  # trials that count towards the budget
    budget: Budget
    outcomes: dict[str, int]  # how they ended
    retries: int  # restarts after a lost worker or driver
    fe_per_image: float  # spent, over all trials
    seconds: float | None  # of this launch; None if an older version has not recorded it
    seconds_left: float | None  # if it goes on as it did
    best: TrialRow | None
    running: tuple[Running, ...]


@dataclass
class BudgetState:
    """Counts, cost and the best trial."""

    budget: Budget
    sign: int  # of the first objective
    outcomes: Counter[str] = field(default_factory=Counter)
    fe_per_image: float = 0.0  # of trials that ended
    retries: int = 0
    best: TrialRow | None = None

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.used_before = 0.0  # share of the budget that earlier launches had used

    def ended(self, row: TrialRow, fe_per_image: float) -> None:
        """A trial has ended for good."""
        self.outcomes[row.state] += 1
        self.fe_per_image += fe_per_image
        if row.state == "complete" and self._beats(row):
            self.best = row

    def _beats(self, row: TrialRow) -> bool:
        """Of equals the one that began first, so that a relaunch finds the same."""
        if row.value is None:
            return False
        if self.best is None:
            return True
        ahead = self.sign * (row.value - self.best.values[0])
        return ahead > 0 or (ahead == 0 and row.number < self.best.number)

    def launched(self, live_fe: float = 0.0, begun: float = 0.0) -> None:
        """Start the clock after the trials of earlier launches were counted.

        `live_fe` and `begun` are the cost and progress of those that resume.
        """
        self._began, self.used_before = time.monotonic(), self._used(live_fe, begun)

    def launched_elsewhere(self, seconds: float, used_before: float) -> None:
        """Set the clock to a launch of another process, which began so many seconds ago."""
        self._began, self.used_before = time.monotonic() - seconds, used_before

    @property
    def finished(self) -> int:
        """Trials that count."""
        return sum(self.outcomes[outcome] for outcome in ENDED)

    def spent(self, live_fe: float) -> bool:
        """Whether cost or time are at their end."""
        budget = self.budget
        costly = budget.fe_per_image is not None and (
            self.fe_per_image + live_fe >= budget.fe_per_image
        )
        late = budget.hours is not None and self.seconds >= 3600 * budget.hours
        return costly or late

    def room(self, live: int) -> bool:
        """Whether another trial may begin beside those that run."""
        trials = self.budget.trials
        return trials is None or self.finished + live < trials

    @property
    def seconds(self) -> float:
        """Of this launch."""
        return time.monotonic() - self._began

    def progress(
        self, running: tuple[Running, ...], live_fe: float, begun: float
    ) -> SweepProgress:
        """For the display."""
        return SweepProgress(
            finished=self.finished,
            budget=self.budget,
            outcomes=dict(self.outcomes),
            retries=self.retries,
            fe_per_image=self.fe_per_image + live_fe,
            seconds=self.seconds,
            seconds_left=self._left(live_fe, begun),
            best=self.best,
            running=running,
        )

    def _left(self, live_fe: float, begun: float) -> float | None:
        used = self._used(live_fe, begun) - self.used_before
        rest = 1 - self.used_before - used
        lefts = [] if used <= 0 else [max(0.0, self.seconds * rest / used)]
        if self.budget.hours is not None:
            lefts.append(max(0.0, 3600 * self.budget.hours - self.seconds))
        return min(lefts, default=None)

    def _used(self, live_fe: float, begun: float) -> float:
        """The share of trials or cost that is used up, whichever is further."""
        budget, used = self.budget, [0.0]
        if budget.trials is not None:
            used.append((self.finished + begun) / budget.trials)
        if budget.fe_per_image is not None:
            used.append((self.fe_per_image + live_fe) / budget.fe_per_image)
        return min(1.0, max(used))
