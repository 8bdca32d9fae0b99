"""The trials of an Optuna study as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import optuna
from optuna.trial import FrozenTrial, TrialState

from raytrain.tuning.budget import ENDED, BudgetState, TrialRow
from raytrain.tuning.space.settings import Budget, Limit, Objectives, Search

if TYPE_CHECKING:
    from raytrain.config.run import RunConfig


@runtime_checkable
class Describes(Protocol):
    """The part of a search space by which trials are described."""

    @property
    def objective(self) -> Objectives: ...
    def values(self, params: Mapping[str, Any]) -> dict[str, Any]: ...


@runtime_checkable
class Proposes(Describes, Protocol):
    """The part of a search space by which trials are proposed."""

    @property
    def feasible(self) -> Mapping[str, Limit]: ...
    @property
    def search(self) -> Search: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def base_run(self) -> RunConfig: ...
    def sample(self, trial: Any) -> dict[str, Any]: ...
    def violations(self, values: Mapping[str, Any]) -> dict[str, float]: ...
    def run(self, values: Mapping[str, Any]) -> RunConfig: ...


class History:
    """The trials of a study; those that are attempts at one another count as one."""

    def __init__(self, study: optuna.Study, space: Describes, prefix: str = "t") -> None:
        self.study, self.space, self._prefix = study, space, prefix

    def trials(self) -> list[FrozenTrial]:
        """All attempts, not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def rows(self) -> list[TrialRow]:
        """Every trial that began, under the number of its first attempt, with the state of its last."""
        return [self.row(trial) for trial in self.attempts()]

    def attempts(self) -> list[FrozenTrial]:
        """The last attempt of every trial that began, in the order of their first ones."""
        last: dict[int, FrozenTrial] = {}
        for trial in self.trials():
            if "origin" in trial.user_attrs:
                last[trial.user_attrs["origin"]] = trial
        return [trial for _, trial in sorted(last.items())]

    def count(
        self, state: BudgetState, cost: Callable[[Mapping[str, Any]], float]
    ) -> list[FrozenTrial]:
        """Count the trials that ended or were lost in `state`; return those that are queued.

        `cost` is that of a trial with this last row, in forward-equivalents per image.
        """
        trials = self.trials()
        again, queued = followed(trials), []
        for trial in trials:
            outcome = trial.user_attrs.get("outcome")
            if trial.state == TrialState.WAITING:
                queued.append(trial)
            elif trial.number in again:  # whatever it was about to end as
                state.retries += outcome != "cut" and "origin" in trial.user_attrs
            elif outcome in ENDED or outcome == "rejected":
                state.ended(self.row(trial), cost(trial.user_attrs.get("last", {})))
        return queued

    def under_way(self) -> list[FrozenTrial]:
        """The attempts that have begun and not ended, as far as the study has it."""
        trials = self.trials()
        again = followed(trials)
        begun = (t for t in trials if t.state == TrialState.RUNNING and "origin" in t.user_attrs)
        return [trial for trial in begun if trial.number not in again]

    def front(self) -> list[TrialRow]:
        """The finished, feasible trials that no other one beats."""
        done = [row for row in self.rows() if row.state == "complete"]
        signs = [one.sign for one in self.space.objective]
        return [row for row in done if not any(_beats(other, row, signs) for other in done)]

    def row(self, trial: FrozenTrial) -> TrialRow:
        """One attempt."""
        attributes = trial.user_attrs
        last = attributes.get("last", {})
        metrics = last.get("metrics", {})
        origin = attributes.get("origin", trial.number)
        waits = trial.state == TrialState.WAITING
        return TrialRow(
            number=origin,
            state="cut" if waits else attributes.get("outcome", "running"),
            values=self.objectives(metrics),
            params=self.values(trial),
            metrics=metrics,
            epochs=last.get("epoch", 0),
            handle=self.handle(origin),
            error=attributes.get("error"),
        )

    def objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The values that a trial with these metrics is judged by; empty if one is missing."""
        wanted = [one.metric for one in self.space.objective]
        return tuple(metrics[name] for name in wanted) if metrics.keys() >= set(wanted) else ()

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial varies, by path, in the units of the run."""
        params = current_params(trial)
        return self.space.values(params) if params else {}

    def handle(self, origin: int) -> str:
        """What a trial is called in MLflow's outbox and on disk."""
        return f"{self._prefix}{origin:04d}"


def followed(trials: list[FrozenTrial]) -> set[int | None]:
    """Numbers of the attempts that have been queued again."""
    return {trial.user_attrs.get("resume_of") for trial in trials}


def current_params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters a trial has now: a member of a population changes them."""
    now = trial.user_attrs.get("now")
    return queued_params(trial) if now is None else now["params"]


def queued_params(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was queued with and has been given since: whole, even if it died while sampled."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _beats(one: TrialRow, other: TrialRow, signs: list[int]) -> bool:
    """Nowhere worse, somewhere better."""
    pairs = [
        (sign * a, sign * b) for sign, a, b in zip(signs, one.values, other.values, strict=True)
    ]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
