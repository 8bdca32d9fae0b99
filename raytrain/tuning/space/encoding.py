"""From a run back to the parameters of a trial: what a sweep can be started from."""

from __future__ import annotations

from typing import Any

from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.tuning.space.base import AbstractSearched, same
from raytrain.tuning.space.dimensions import Branch, Choice
from raytrain.tuning.space.draws import Replay
from raytrain.tuning.space.expressions import Absent
from raytrain.tuning.space.labels import ALGORITHM
from raytrain.tuning.space.lookup import field_at, field_value
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.variables import Variable


def encode(space: SearchSpace, run: RunConfig) -> dict[str, Any] | None:
    """The parameters with which `space` gives the run's values at all its paths, or None.

    A `$name` is no field of the run: it is taken from the middle of its range, and what is derived
    from it must then come out as the run has it.
    """
    params: dict[str, Any] = {}

    def answer(variable: Variable, entry: AbstractSearched, scale: float) -> Any:
        found = _params(run, variable, entry, scale)
        if found is None:
            raise RequestError(f"space.{variable.path}: the run's value is outside")
        params.update(found)
        return entry.suggest(Replay(found), variable.key, scale)

    try:
        space.walk(answer)
        values = space.values(params)
        again = space.run(values)
        reproduced = all(same(field_value(again, path), field_value(run, path)) for path in values)
    except (RequestError, Absent):
        return None
    return params if reproduced else None


def defaults(space: SearchSpace) -> list[dict[str, Any]]:
    """The base run, and every algorithm that is searched with its own defaults."""
    choices = [
        {variable.path: option}
        for variable in space.variables
        if variable.path in ALGORITHM and isinstance(variable.entry, Choice | Branch)
        for option in variable.entry.ends()
    ]
    found: list[dict[str, Any]] = []
    for choice in [{}, *choices]:
        try:
            params = encode(space, space.run(choice))
        except RequestError:
            continue
        if params is not None and params not in found and space.allows(space.values(params)):
            found.append(params)
    return found


def _params(
    run: RunConfig, variable: Variable, entry: AbstractSearched, scale: float
) -> dict[str, Any] | None:
    if variable.path.startswith("$"):
        return entry.params(variable.key, entry.middle(), 1.0)
    found = entry.params(variable.key, field_value(run, variable.path), scale)
    if found is None:  # an option may be written as the run has it: eps/4
        found = entry.params(variable.key, field_at(run, variable.path), scale)
    return found
