"""Population-based training: members train side by side, and the worst go on from the best.

Jaderberg et al. 2017 (arXiv 1711.09846). A member is a trial of the study for all of its life. It pauses
at every interval; if its score there is among the worst, it takes the checkpoint of one of the best and
that member's numbers, changed a little. Scores are compared at equal cost. Tune's own scheduler is not
used: it keeps its population in memory, and a killed driver would lose it.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raytrain.core.errors import RequestError
from raytrain.core.storage import pull, push, remove
from raytrain.core.types import mix
from raytrain.distributed.jobs import Job
from raytrain.training.run_folder import BEST, LAST, ROWS
from raytrain.tuning.history import current_params
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import Population
from raytrain.tuning.trial_manager import Live, TrialManager

_MOVABLE = ("optimizer", "algorithm", "outer", "curriculum", "threat")
_KINDS = ("name", "kind", "norm")  # these choose other memories: a checkpoint would not fit
_STATE = (LAST, BEST, ROWS)  # what a member is, on disk
_TRIES = 20  # perturbations that may break the constraints, before the donor's numbers are kept


def check_population(space: SearchSpace) -> None:
    """Refuse to change in a running trial what its checkpoint is made of.

    Raises:
        RequestError: naming the dimension.
    """
    for path, _, condition in space.rows():
        root, last = path.split(".")[0], path.rsplit(".", 1)[-1]
        if path.startswith("$"):
            continue
        if root not in _MOVABLE or path == root or last in _KINDS or condition:
            raise RequestError(
                f"space.{path}: pbt changes numbers of running trials; expected unconditional "
                f"fields of {', '.join(_MOVABLE)}, and no choice of another kind"
            )


class PopulationManager(TrialManager):
    """A trial manager whose trials pause at every interval."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._paused: deque[Live] = deque()
        # intervals passed -> member -> its score there, and the epoch of its checkpoint
        self._scores: dict[int, dict[int, tuple[float, int]]] = {}

    @property
    def _rules(self) -> Population:
        return self.space.search.population

    def begin(self, tune_id: str) -> dict[str, Any] | None:
        if self._budget_state.spent(self._live_fe()):
            while self._paused:
                self._cut(self._paused.popleft())
        # Members not begun come first: with fewer slots than members each would else train to its end
        # without another at the same cost to compare with.
        if not self._paused or self._budget_state.room(len(self._under_way())):
            return super().begin(tune_id)
        live = self._paused.popleft()
        live.resumes = True
        self._exchange(live)
        return self._start(tune_id, live)

    def recover(self) -> int:
        for trial in self.history.trials():
            for passed, score in trial.user_attrs.get("scores", {}).items():
                member = trial.user_attrs["origin"]
                self._scores.setdefault(int(passed), {})[member] = (score[0], score[1])
        return super().recover()

    # ---------------------------------------------------------------- within

    def _under_way(self) -> list[Live]:
        return [*super()._under_way(), *self._paused]

    def _begun(self, trial: Any, values: dict[str, Any]) -> Live | None:
        now = trial.user_attrs.get("now")
        if now is None:
            return super()._begun(trial, values)
        live = super()._begun(trial, self.space.values(now["params"]))
        if live is not None:
            live.offset = now["offset"]
            self._take(live.origin, now["params"])
        return live

    def _job(self, live: Live) -> Job:
        until = min(1.0, (self._passed(live) + 1) * self._share)
        return Job.of(live.run, self._folder_of(live.origin), live.resumes, until - 1e-9)

    @property
    def _share(self) -> float:
        """Of a run, between exchanges."""
        length = self._rules.interval or self.fidelity.length / 10
        return min(1.0, length / self.fidelity.length)

    def _passed(self, live: Live) -> int:
        """Whole intervals behind a member: those with as many had cost the same, within an epoch."""
        return math.floor(live.progress / self._share + 1e-6)

    def _ended(self, live: Live, result: dict[str, Any]) -> None:
        if result.get("final") or live.cut:
            super()._ended(live, result)
            self._forget_states()
            return
        self._record(live, result)
        value = self._value(live)
        if value is not None and math.isfinite(value):
            self._keep_state(live)
            self._keep_score(live, value)
        self._paused.append(live)

    def _keep_state(self, live: Live) -> None:
        """The checkpoints of this interval, kept for later copies: links, which take no space until
        the member has trained on.
        """
        for name in _STATE:
            source = self._folder_of(live.origin) / name
            pull(source)
            if source.is_file():
                kept = self._state(live.origin, self._passed(live), name)
                kept.unlink(missing_ok=True)
                kept.hardlink_to(source)

    def _state(self, member: int, passed: int, name: str) -> Path:
        return self._folder_of(member) / f"at{passed}-{name}"

    def _forget_states(self) -> None:
        """Drop the checkpoints of intervals that every member has left behind."""
        lowest = min((self._passed(live) for live in self._under_way()), default=math.inf)
        begun = self._budget_state.finished + len(self._under_way())
        if begun < self._rules.size:
            return
        for passed in [passed for passed in self._scores if passed < lowest]:
            for member in self._scores.pop(passed):
                for name in _STATE:
                    remove(self._state(member, passed, name))

    def _keep_score(self, live: Live, value: float) -> None:
        score = (value, live.epoch - live.offset)
        self._scores.setdefault(self._passed(live), {})[live.origin] = score
        mine = {str(k): of[live.origin] for k, of in self._scores.items() if live.origin in of}
        live.trial.set_user_attr("scores", mine)

    def _exchange(self, live: Live) -> None:
        """Go on from a better member, as it was at the same cost, if this one is among the worst."""
        passed = self._passed(live)
        scores = self._scores.get(passed, {})
        donor = self._donor(live, {member: score for member, (score, _) in scores.items()})
        if donor is None or not self._state(donor, passed, LAST).is_file():
            return
        params = self._changed(donor, mix(self.space.search.seed, live.origin, live.epoch))
        for name in _STATE:
            source = self._state(donor, passed, name)
            if source.is_file():
                shutil.copyfile(source, self._copy_for(live.origin, params, name))
        live.offset = live.epoch - scores[donor][1]
        # With this it is decided: the rest is done, if need be, by `_begun`.
        live.trial.set_user_attr("now", {"params": params, "offset": live.offset})
        self._take(live.origin, params)
        live.values = self.space.values(params)
        live.trial.set_user_attr("values", live.values)
        live.run = self.space.run(live.values)
        self._note(live, donor)
        self._forget_states()

    def _copy_for(self, member: int, params: Mapping[str, Any], name: str) -> Path:
        """Where a donor's checkpoint waits until these parameters are the member's."""
        number = mix(json.dumps(dict(params), sort_keys=True))
        return self._folder_of(member) / f".{name}.{number:x}"

    def _take(self, member: int, params: Mapping[str, Any]) -> None:
        """Put the copies that wait for these parameters in place; any other was never decided on."""
        for name in _STATE:
            copy = self._copy_for(member, params, name)
            if copy.is_file():
                target = copy.replace(self._folder_of(member) / name)
                push(target)

    def _donor(self, live: Live, scores: Mapping[int, float]) -> int | None:
        sign = self.space.objective[0].sign
        ranked = sorted(scores, key=lambda member: (sign * scores[member], member))
        few = max(1, int(self._rules.share * len(ranked)))
        if len(ranked) < 2 or live.origin not in ranked[:few]:
            return None
        draw = random.Random(mix(self.space.search.seed, "donor", live.origin, live.epoch))
        donor = draw.choice(ranked[-few:])
        return donor if sign * scores[donor] > sign * scores[live.origin] else None

    def _changed(self, donor: int, seed: int) -> dict[str, Any]:
        """The donor's parameters, each drawn anew or moved by the factor."""
        attempts = [t for t in self.history.trials() if t.user_attrs.get("origin") == donor]
        params = current_params(attempts[-1])
        shapes, draw = attempts[0].distributions, random.Random(seed)
        for _ in range(_TRIES):
            changed = {
                key: perturbed(value, shapes[key], self._rules, draw)
                for key, value in params.items()
            }
            if self._makes_a_run(changed):
                return changed
        return dict(params)

    def _makes_a_run(self, params: Mapping[str, Any]) -> bool:
        try:
            values = self.space.values(params)
            self.space.run(values)
        except RequestError:
            return False
        return all(amount <= 0 for amount in self.space.violations(values).values())

    def _note(self, live: Live, donor: int) -> None:
        numbers = {path: v for path, v in live.values.items() if isinstance(v, int | float)}
        metrics = {f"population/{path}": float(value) for path, value in numbers.items()}
        self._mlflow_runs.note(
            self._handle(live), {**metrics, "population/from": float(donor)}, live.epoch
        )
        line = {"member": live.origin, "epoch": live.epoch, "from": donor, "values": live.values}
        with Path(self.folder / "population.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


def perturbed(value: Any, shape: BaseDistribution, rules: Population, draw: random.Random) -> Any:
    """A parameter of a donor, for the member that copies it: within its bounds, on its grid."""
    if isinstance(shape, CategoricalDistribution):
        return draw.choice(shape.choices) if draw.random() < rules.resample else value
    assert isinstance(shape, FloatDistribution | IntDistribution)
    if draw.random() < rules.resample:
        return _drawn(shape, draw)
    factor = rules.factor if draw.random() < 0.5 else 1 / rules.factor
    moved = min(max(value * factor, shape.low), shape.high)
    if shape.step and _on_grid(moved, shape) == value:  # the grid is coarser than the factor
        moved = min(max(value + (1 if factor > 1 else -1) * shape.step, shape.low), shape.high)
    return _on_grid(moved, shape)


def _drawn(shape: FloatDistribution | IntDistribution, draw: random.Random) -> Any:
    if shape.log:
        drawn = math.exp(draw.uniform(math.log(shape.low), math.log(shape.high)))
    else:
        drawn = draw.uniform(shape.low, shape.high)
    return _on_grid(min(max(drawn, shape.low), shape.high), shape)


def _on_grid(value: float | int, shape: FloatDistribution | IntDistribution) -> Any:
    if shape.step:
        steps = round((value - shape.low) / shape.step)
        value = min(shape.low + steps * shape.step, shape.high)
    return round(value) if isinstance(shape, IntDistribution) else float(value)
