"""The trials that a new sweep begins with: a whole grid, published defaults, equally many of each algorithm,
what earlier runs found.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import optuna

from raytrain.config.request import override, validated, value_of
from raytrain.config.run import RunConfig
from raytrain.core.epoch_metrics import IN_EPS
from raytrain.core.errors import RequestError
from raytrain.core.types import mix
from raytrain.tracking import finished_runs, provenance
from raytrain.tuning.history import queued_params
from raytrain.tuning.outcome import amounts
from raytrain.tuning.space.base import same
from raytrain.tuning.space.encoding import defaults, encode
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.trial_manager import TrialManager

_PLANNED = "planned"  # set once all of this is in the study
_EARLIER = "earlier"  # the outcome of what is no trial of this sweep


def plan_first(manager: TrialManager, space: SearchSpace, tracking_uri: str) -> None:
    """Queue them, once in the life of a sweep.

    Raises:
        RequestError: if a grid was asked for and is not finite, or there is no such experiment.
    """
    study = manager.study
    if study.user_attrs.get(_PLANNED):
        return
    queued = {_key(queued_params(trial)) for trial in manager.history.trials()}
    for params in _first(space):
        if _key(params) not in queued:  # a kill in the middle of a long grid
            queued.add(_key(params))
            manager.enqueue(params)
    if space.search.earlier is not None:
        _learn(manager, space, finished_runs(tracking_uri, space.search.earlier), queued)
    study.set_user_attr(_PLANNED, True)


def _first(space: SearchSpace) -> Iterator[dict[str, Any]]:
    if space.search.sampler == "grid":
        yield from space.grid()
    elif space.search.sampler != "pbt":
        first = defaults(space) if space.search.defaults else []
        yield from first
        yield from _of_every_algorithm(space, first)


def _of_every_algorithm(
    space: SearchSpace, before: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Random configurations in the place of a sampler's random start, equally many of each algorithm.

    With those of `before`, each algorithm has `startup` divided by the number of algorithms, rounded up.
    A fixed function of the space and its seed. Their order changes from round to round: pruners keep
    what comes first more readily.
    """
    if space.algorithms is None:
        return
    key, names = space.algorithms
    had = Counter(params[key] for params in before)
    for number in range(-(-space.search.startup // len(names))):
        for name in random.Random(mix(space.search.seed, number)).sample(names, len(names)):
            if had[name] <= number and (drawn := space.draw(number, {key: name})) is not None:
                yield drawn


def _learn(
    manager: TrialManager,
    space: SearchSpace,
    runs: list[tuple[dict[str, str], dict[str, float]]],
    queued: set[str],
) -> None:
    """Add earlier runs that this sweep could have made to the study; queue the best of the others."""
    trials = manager.history.trials()
    before = {_key(t.params) for t in trials if t.user_attrs.get("outcome") == _EARLIER}
    usable = list(_usable(space, runs))
    seen: set[str] = set()
    for params, metrics, comparable in usable:
        if comparable and _key(params) not in seen:
            seen.add(_key(params))
            if _key(params) not in before:  # a kill in the middle of this
                _tell(manager.study, space, params, metrics)
    first = space.objective[0]
    others = [(first.sign * metrics[first.metric], params) for params, metrics, _ in usable]
    others.sort(key=lambda found: -found[0])
    left = space.search.earlier_best
    for _, params in others:
        if left > 0 and _key(params) not in seen:
            seen.add(_key(params))
            left -= 1
            if _key(params) not in queued:
                manager.enqueue(params)


def _usable(
    space: SearchSpace, runs: list[tuple[dict[str, str], dict[str, float]]]
) -> Iterator[tuple[dict[str, Any], dict[str, float], bool]]:
    """Runs whose values this space can propose, and whether they are runs that it would make of them."""
    wanted = [one.metric for one in space.objective]
    for flat, metrics in runs:
        run = _run_of(flat)
        params = None if run is None else encode(space, run)
        if run is not None and params is not None and _finite(metrics, wanted):
            yield params, metrics, _comparable(space.run(space.values(params)), run)


def _comparable(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs compute the same. MLflow has their step sizes in pixels, not as shares of eps."""
    mine, its = provenance.parameters(one), provenance.parameters(other)
    return mine.keys() == its.keys() and all(same(mine[path], its[path]) for path in mine)


def _finite(metrics: Mapping[str, float], wanted: list[str]) -> bool:
    return all(math.isfinite(metrics.get(metric, math.nan)) for metric in wanted)


def _tell(
    study: optuna.Study, space: SearchSpace, params: dict[str, Any], metrics: Mapping[str, float]
) -> None:
    """A finished trial of the study that cost nothing and is no trial of this sweep."""
    fixed = optuna.trial.FixedTrial(params)
    values = space.sample(fixed)
    study.add_trial(
        optuna.trial.create_trial(
            params=fixed.params,
            distributions=fixed.distributions,
            values=[metrics[one.metric] for one in space.objective],
            user_attrs={"outcome": _EARLIER, "metrics": dict(metrics)},
            constraints=amounts(metrics, space.feasible, space.violations(values)),
        )
    )


def _run_of(flat: Mapping[str, str]) -> RunConfig | None:
    """The configuration that a run's flat MLflow parameters stand for; None if it is no longer valid."""
    try:
        own = {path: value for path, value in flat.items() if not path.endswith(IN_EPS)}
        values = {path: value_of(path, value) for path, value in own.items()}
        return validated(RunConfig, override({}, values))
    except RequestError:
        return None


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))
