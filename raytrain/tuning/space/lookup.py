"""What the names of an expression stand for in a configuration that is being put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from raytrain.config.request import override, validated
from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.types import StepSize, fraction, in_pixels
from raytrain.tuning.space.expressions import Absent

KINDS = ("name", "kind", "norm", "preset")  # fields that choose what other fields there are
_STEP_SIZE = TypeAdapter(StepSize)
_MOST = 1000  # settings remembered


class Lookup:
    """Fields of finished configurations of one base run: what was chosen, else the rest of the run."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._base = base
        self._known: dict[frozenset[Any], RunConfig] = {}

    def value(self, chosen: Mapping[str, Any], name: str) -> Any:
        """The field `name`, step sizes in pixels and records by their kind.

        Raises:
            Absent: if the configuration has no such field.
        """
        if name in chosen:
            found = chosen[name]
        elif name.startswith("$"):
            raise Absent(name)
        else:
            found = field_at(self._setting(chosen, name), name)
        return _plain(found, functools.partial(self.eps, chosen))

    def eps(self, chosen: Mapping[str, Any]) -> float:
        """The threat's radius."""
        return float(self.value(chosen, "threat.eps"))

    def _setting(self, chosen: Mapping[str, Any], name: str) -> RunConfig:
        """A run with the choices made so far: numbers do not decide what other fields are."""
        choices = {
            path: value
            for path, value in chosen.items()
            if not path.startswith("$")
            and (not isinstance(value, int | float) or name.startswith(f"{path}."))
        }
        key = frozenset(choices.items())
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = self._made(choices, chosen)
        return self._known[key]

    def _made(self, choices: Mapping[str, Any], chosen: Mapping[str, Any]) -> RunConfig:
        try:
            return validated(RunConfig, override(self._base, choices))
        except RequestError:  # choices that only make sense with the numbers beside them
            numbers = {path: value for path, value in chosen.items() if path[0] != "$"}
            return validated(RunConfig, override(self._base, numbers))


def field_at(run: BaseModel, path: str) -> Any:
    """A field of a run by its path, also within a curriculum; of a record, its name or kind.

    Raises:
        Absent: if there is none.
    """
    here: Any = run
    for part in path.split("."):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
            continue
        if not isinstance(here, BaseModel) or part not in type(here).model_fields:
            raise Absent(path)
        here = getattr(here, part)
    if isinstance(here, BaseModel):
        kinds = [getattr(here, kind) for kind in KINDS[:3] if kind in type(here).model_fields]
        return kinds[0] if kinds else here
    return here


def paths_of(record: BaseModel, prefix: str = "") -> Iterator[str]:
    """The paths of all fields of a run."""
    for field in type(record).model_fields:
        value = getattr(record, field)
        yield prefix + field
        if isinstance(value, BaseModel):
            yield from paths_of(value, f"{prefix}{field}.")


def field_value(run: RunConfig, path: str) -> Any:
    """A field of a finished run as expressions see it.

    Raises:
        Absent: if there is none.
    """
    return _plain(field_at(run, path), lambda: run.threat.eps)


def _plain(value: Any, eps: Callable[[], float]) -> Any:
    """Fractions as numbers, step sizes in pixels."""
    number = fraction(value)
    if not isinstance(number, str) or "eps" not in number:
        return number
    try:
        return in_pixels(_STEP_SIZE.validate_python(number), eps())
    except ValidationError:
        return number  # a word that happens to contain eps
