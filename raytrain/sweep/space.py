"""A search space: a base run, what varies in it, the objective and the budget. One YAML file per study."""

from __future__ import annotations

import hashlib
import json
import math
import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, final, runtime_checkable

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from raytrain.config import RUNTIME, RunConfig
from raytrain.record import METRICS
from raytrain.request import override, parse_overrides, read_yaml, validated
from raytrain.types import Number, RequestError, Spec

_TRIES = 200  # random configurations that must all be valid before a sweep begins


@runtime_checkable
class Suggests(Protocol):
    """What a space asks of a trial: Optuna's own suggestion methods."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class AbstractDimension(Spec):
    """One field of the run that varies; with `when`, only while earlier fields have these values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    when: Annotated[
        dict[str, Any], Field(description="earlier path -> the value, or list of values, needed")
    ] = {}

    @abstractmethod
    def suggest(self, trial: Suggests, path: str) -> Any:
        """Ask the trial for a value."""

    @abstractmethod
    def ends(self) -> Sequence[Any]:
        """Its extreme values, or all of them where they have no order."""

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the conditions hold among the values chosen so far."""
        return all(
            path in chosen and chosen[path] in (wanted if isinstance(wanted, list) else [wanted])
            for path, wanted in self.when.items()
        )


@final
class Real(AbstractDimension):
    """`{float: [low, high], log: true}`; with `unit: eps` in multiples of the threat's radius."""

    bounds: Annotated[tuple[Number, Number], Field(alias="float")]
    log: bool = False
    step: Number | None = None
    unit: Literal["eps"] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Real:
        _check_bounds(*self.bounds, self.log)
        if self.log and self.step is not None:
            raise ValueError("log and step cannot both be given")
        return self

    def ends(self) -> Sequence[float]:
        return self.bounds

    def suggest(self, trial: Suggests, path: str) -> float:
        return trial.suggest_float(path, *self.bounds, log=self.log, step=self.step)


@final
class Whole(AbstractDimension):
    """`{int: [low, high]}`, both ends included; `step` or `log` as wanted."""

    bounds: Annotated[tuple[int, int], Field(alias="int")]
    log: bool = False
    step: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Whole:
        _check_bounds(*self.bounds, self.log)
        if self.log and self.step != 1:
            raise ValueError("log and step cannot both be given")
        return self

    def ends(self) -> Sequence[int]:
        low, high = self.bounds
        return low, low + (high - low) // self.step * self.step

    def suggest(self, trial: Suggests, path: str) -> int:
        return trial.suggest_int(path, *self.bounds, log=self.log, step=self.step)


@final
class Choice(AbstractDimension):
    """`{choice: [a, b, c]}`: names, numbers, booleans or null (the field left unset), in no order."""

    options: Annotated[list[str | bool | int | float | None], Field(alias="choice", min_length=1)]

    def ends(self) -> Sequence[Any]:
        return self.options

    def suggest(self, trial: Suggests, path: str) -> Any:
        return trial.suggest_categorical(path, self.options)


def _kind(value: Any) -> str | None:
    if isinstance(value, AbstractDimension):
        return type(value).__name__
    kinds = {"float": "Real", "int": "Whole", "choice": "Choice"}
    found = [kinds[key] for key in kinds if isinstance(value, Mapping) and key in value]
    return found[0] if len(found) == 1 else None


Dimension = Annotated[
    Annotated[Real, Tag("Real")]
    | Annotated[Whole, Tag("Whole")]
    | Annotated[Choice, Tag("Choice")],
    Discriminator(
        _kind,
        custom_error_type="dimension",
        custom_error_message="Input should be one of {float: [low, high]}, {int: [low, high]} "
        "and {choice: [...]}",
    ),
]


class Objective(Spec):
    """What a trial is judged by: a metric of the run, at its last epoch."""

    metric: str = "valid/robust"
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="after")
    def _is_a_metric(self) -> Objective:
        if self.metric not in METRICS:
            raise ValueError(f"metric: {self.metric} is not one of {', '.join(METRICS)}")
        return self


class Search(Spec):
    """How configurations are proposed, and which trials are stopped early."""

    sampler: Annotated[Literal["tpe", "random"], Field(description="tpe learns from trials")] = (
        "tpe"
    )
    startup: Annotated[
        PositiveInt, Field(description="random trials before TPE has enough to learn from")
    ] = 10
    pruner: Annotated[
        Literal["asha", "none"],
        Field(description="asha: at each rung only the best 1/reduction go on"),
    ] = "asha"
    min_epochs: Annotated[PositiveInt, Field(description="first rung of asha")] = 2
    reduction: Annotated[int, Field(ge=2, description="share that goes on is 1/reduction")] = 3
    seed: int = 0


class Budget(Spec):
    """When a sweep ends."""

    trials: Annotated[
        PositiveInt, Field(description="finished trials, early-stopped included")
    ] = 20
    concurrent: Annotated[
        PositiveInt | None, Field(description="trials at once; default: what fits the cluster")
    ] = None


class SearchSpace(Spec):
    """A study: `base` with the fields of `space` varied, to the best of `objective`."""

    name: str
    description: str = ""
    base: dict[str, Any] = {}
    space: dict[str, Dimension] = {}
    objective: Objective = Objective()
    search: Search = Search()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _conditions_look_back(self) -> SearchSpace:
        seen: set[str] = set()
        for path, dimension in self.space.items():
            for needed in dimension.when:
                if needed not in seen:
                    raise ValueError(f"space.{path}.when: {needed} is not a path listed before it")
                _check_reachable(path, needed, dimension.when[needed], self.space[needed])
            seen.add(path)
        return self

    @property
    def base_run(self) -> RunConfig:
        """The run that nothing has been varied in."""
        return validated(RunConfig, self.base, "base.")

    def sample(self, trial: Suggests) -> dict[str, Any]:
        """The values a trial varies, by path: its conditional fields only where they apply."""
        chosen: dict[str, Any] = {}
        for path, dimension in self.space.items():
            if dimension.applies(chosen):
                chosen[path] = dimension.suggest(trial, path)
        return chosen

    def run(self, chosen: Mapping[str, Any]) -> RunConfig:
        """The run with these values.

        Raises:
            RequestError: if they do not make a valid one.
        """
        return validated(RunConfig, override(self.base, self.in_pixels(chosen)))

    def in_pixels(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen values in the units of the run: multiples of eps become pixels."""
        in_eps = {path for path in chosen if getattr(self.space.get(path), "unit", None) == "eps"}
        if not in_eps:
            return dict(chosen)
        eps = chosen.get("threat.eps", self.base_run.threat.eps)
        return {path: value * eps if path in in_eps else value for path, value in chosen.items()}

    def check(self) -> None:
        """Try random configurations and the corners of the space.

        Raises:
            RequestError: for the first that is not a valid run.
        """
        _ = self.base_run
        for path, dimension in self.space.items():
            if path.split(".")[0] == "threat" and getattr(dimension, "unit", None) == "eps":
                raise RequestError(f"space.{path}.unit: eps cannot be a multiple of itself")
        ends = [
            {**self._met(path), path: end}
            for path, dimension in self.space.items()
            for end in dimension.ends()
        ]
        for attempt, fixed in enumerate([*ends, *({} for _ in range(_TRIES))]):
            try:
                self.run(self.sample(_Draw(random.Random(attempt), fixed)))
            except RequestError as error:
                raise RequestError(f"space: {error}") from None

    def _met(self, path: str) -> dict[str, Any]:
        """Values of earlier fields with which this one applies."""
        fixed: dict[str, Any] = {}
        for needed, wanted in self.space[path].when.items():
            fixed |= self._met(needed)
            fixed[needed] = wanted[0] if isinstance(wanted, list) else wanted
        return fixed

    def hash(self) -> str:
        """Changes when trials would no longer be comparable: not with name, budget or place of work."""
        shown = self.model_dump(
            mode="json",
            by_alias=True,
            exclude={"name": True, "description": True, "budget": True, "base": set(RUNTIME)},
        )
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:12]


def read_space(file: Path, overrides: Iterable[str] = ()) -> SearchSpace:
    """A search space from YAML; `key=value` words change fields of its base run.

    Raises:
        RequestError: naming the file, the path and what was expected.
    """
    values = {"name": file.stem, **read_yaml(file)}
    base = values.get("base") or {}
    if isinstance(base, dict):  # anything else is for the validation to refuse
        values["base"] = override(base, parse_overrides(overrides))
    space = validated(SearchSpace, values, f"{file}: ")
    try:
        space.check()
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None
    return space


class _Draw:
    """A trial that draws at random, but for the values that are `fixed`."""

    def __init__(self, source: random.Random, fixed: Mapping[str, Any]) -> None:
        self._source, self._fixed = source, fixed

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if name in self._fixed:
            return self._fixed[name]
        if step is not None:
            return low + step * self._source.randint(0, math.floor((high - low) / step + 1e-9))
        if log:
            drawn = math.exp(self._source.uniform(math.log(low), math.log(high)))
            return min(max(drawn, low), high)
        return self._source.uniform(low, high)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        if name in self._fixed:
            return self._fixed[name]
        if log:
            return round(math.exp(self._source.uniform(math.log(low), math.log(high))))
        return self._source.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._fixed.get(name, self._source.choice(choices))


def _check_reachable(path: str, needed: str, wanted: Any, dimension: AbstractDimension) -> None:
    for value in wanted if isinstance(wanted, list) else [wanted]:
        if isinstance(dimension, Choice) and value not in dimension.options:
            raise ValueError(f"space.{path}.when: {needed} is never {value!r}")


def _check_bounds(low: float | int, high: float | int, log: bool) -> None:
    if low > high:
        raise ValueError(f"expected [low, high], found [{low:g}, {high:g}]")
    if log and low <= 0:
        raise ValueError(f"log needs a lower bound above 0, found {low:g}")
