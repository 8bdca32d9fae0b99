"""What is tried before a sweep begins: names, corners, and random configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.tuning.space.base import AbstractSearched
from raytrain.tuning.space.draws import Draw
from raytrain.tuning.space.expressions import Absent, parse
from raytrain.tuning.space.lookup import KINDS, paths_of
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.variables import Variable

_VALID = 200  # random configurations that must all be valid
_TRIES = 1000  # to find configurations that a condition or the constraints allow
_FEW = 20  # ... with one dimension at its end


def check(space: SearchSpace) -> None:
    """Try names, corners and random configurations.

    Raises:
        RequestError: for the first that is wrong, with its place in the space.
    """
    _ = space.base_run
    _check_names(space)
    for values in corners(space):
        _must_run(space, values)
    _check_draws(space)


def corners(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """A configuration for each end of each range and each option of each choice, at random beside it;
    none for those that the constraints never allow.
    """
    for number, variable in enumerate(space.variables):
        entry = variable.entry
        if not isinstance(entry, AbstractSearched):
            continue
        needed = _context(variable, space.variables[:number])
        for corner in entry.corners(variable.key):
            values = _found(space, variable, {**needed, **corner})
            if values is not None:
                yield values


def _check_draws(space: SearchSpace) -> None:
    valid = 0
    for seed in range(_TRIES):
        values = space.sample(Draw(seed, {}))
        if space.allows(values):
            _must_run(space, values)
            valid += 1
        if valid == _VALID:
            return
    if not valid:
        raise RequestError(
            f"constraints: none of {_TRIES} random configurations meets them", ("constraints",)
        )


def _found(
    space: SearchSpace, variable: Variable, fixed: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A configuration that this dimension is part of and the constraints allow."""
    met = 0
    for seed in range(_TRIES):
        chosen = space.walk(Draw(seed, fixed))
        if not variable.applies(chosen, lambda name, of=chosen: space.lookup(of, name)):
            continue
        values = {path: value for path, value in chosen.items() if path[0] != "$"}
        if space.allows(values):
            return values
        met += 1
        if met == _FEW:
            return None
    if not met:
        raise RequestError(
            f"space.{variable.path}.when: not met by any of {_TRIES} random configurations",
            (*variable.where, "when"),
        )
    return None


def _context(variable: Variable, before: tuple[Variable, ...]) -> dict[str, Any]:
    """Parameters of earlier dimensions with which this one applies, as far as they are listed."""
    fixed: dict[str, Any] = {}
    for path, wanted in variable.needs().items():
        for number, other in enumerate(before):
            entry = other.entry
            if other.path != path or not isinstance(entry, AbstractSearched):
                continue
            params = entry.params(other.key, wanted[0], 1.0)
            if params is not None and other.meets(variable):
                fixed |= {**_context(other, before[:number]), **params}
    return fixed


def _must_run(space: SearchSpace, values: Mapping[str, Any]) -> None:
    try:
        space.run(values)
    except RequestError as error:
        raise placed(space, values, error) from None


def placed(space: SearchSpace, values: Mapping[str, Any], error: RequestError) -> RequestError:
    """The complaint about a run, with the dimension that is to blame."""
    said = ".".join(error.path) or str(error).partition(":")[0]
    there = [
        variable
        for variable in space.variables
        if variable.path in values
        and variable.applies(values, lambda name: space.lookup(values, name))
    ]
    blames = (
        lambda path: path == said,
        lambda path: said.startswith(f"{path}."),
        lambda path: path in [f"{said}.{kind}" for kind in KINDS],
        lambda path: path.startswith(f"{said}.") and "no such field" in str(error),
    )
    for blame in blames:
        for variable in there:
            if blame(variable.path):
                return RequestError(f"space.{error}", variable.where)
    return RequestError(f"space: {error}", ("space",))


def _check_names(space: SearchSpace) -> None:
    """Every name in an expression is a field of some configuration."""
    paths = {variable.path for variable in space.variables}
    written = [one for one in _expressions(space) if one[2] not in paths]
    for seed in range(_VALID):
        if not written:
            return
        chosen: dict[str, Any] = {}
        with contextlib.suppress(RequestError):  # a formula over an unknown name
            space.walk(Draw(seed, {}), chosen)
        written = [one for one in written if not _exists(space, chosen, one[2])]
    if written:
        at, where, name = written[0]
        near = nearest(name, [*paths, *_fields(space)])
        raise RequestError(f"{at}: {name}: no configuration has this field{near}", where)


def _expressions(space: SearchSpace) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Every name in every expression: what to call its place, the place, the name."""
    for variable in space.variables:
        for field, expression in variable.expressions():
            for name in sorted(expression.names):
                yield f"space.{variable.path}.{field}", (*variable.where, field), name
    for number, text in enumerate(space.constraints):
        for name in sorted(parse(text).names):
            yield "constraints", ("constraints", str(number)), name


def _exists(space: SearchSpace, chosen: Mapping[str, Any], name: str) -> bool:
    try:
        space.lookup(chosen, name)
    except Absent:
        return False
    except RequestError:  # not a valid run: corners and draws report it
        return True
    return True


def _fields(space: SearchSpace) -> Iterator[str]:
    """Paths of the fields that some configurations have."""
    yield from paths_of(space.base_run)
    for seed in range(_FEW):
        with contextlib.suppress(RequestError):
            yield from paths_of(space.run(space.sample(Draw(seed, {}))))
