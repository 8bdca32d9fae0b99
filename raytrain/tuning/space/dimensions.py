"""What can stand for one path of a search space: a range, a choice, a branch, or a formula."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, final

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from raytrain.core.types import Number, fraction
from raytrain.tuning.space.base import (
    AbstractDimension,
    AbstractSearched,
    Option,
    Suggests,
    parses,
    same,
    shown,
)
from raytrain.tuning.space.expressions import Expression, parse

BETWEEN = "between"  # `also`: within the range, not one of the single values


class AbstractRange(AbstractSearched):
    """Numbers between two bounds; `also` are single values beside them (-1: never, null: unset)."""

    log: bool = False
    also: Annotated[list[Option], Field(description="single values beside the range")] = []

    @abstractmethod
    def ask(self, trial: Suggests, key: str) -> Any:
        """A number between the bounds."""

    @abstractmethod
    def number(self, value: Any, scale: float) -> Any:
        """The number between the bounds that stands for `value` in the run; None if none does."""

    def scaled(self, value: Any, scale: float) -> Any:
        """In the units of the run."""
        number = fraction(value)
        if not self.in_eps or isinstance(number, bool) or not isinstance(number, int | float):
            return value
        return number * scale

    def suggest(self, trial: Suggests, key: str, scale: float) -> Any:
        if self.also:
            picked = trial.suggest_categorical(_which(key), [BETWEEN, *self.also])
            if picked != BETWEEN:
                return self.scaled(picked, scale)
        return self.scaled(self.ask(trial, key), scale)

    def params(self, key: str, value: Any, scale: float) -> dict[str, Any] | None:
        for point in self.also:
            if same(fraction(self.scaled(point, scale)), value):
                return {_which(key): point}
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        number = self.number(value, scale)
        return None if number is None else self._between(key, number)

    def corners(self, key: str) -> list[dict[str, Any]]:
        points = [{_which(key): point} for point in self.also]
        return [self._between(key, end) for end in self.ends()] + points

    def _between(self, key: str, number: Any) -> dict[str, Any]:
        return {_which(key): BETWEEN, key: number} if self.also else {key: number}

    def _words(self, low: float | int, high: float | int, step: float | int | None) -> str:
        unit = " eps" if self.in_eps else ""
        log = ", log" if self.log else ""
        by = "" if step is None else f", step {step:g}"
        also = f", or {' or '.join(map(shown, self.also))}" if self.also else ""
        return f"{low:g} .. {high:g}{unit}{log}{by}{also}"


@final
class Real(AbstractRange):
    """`{float: [low, high], log: true}`; with `unit: eps` in multiples of the threat's radius."""

    bounds: Annotated[tuple[Number, Number], Field(alias="float")]
    step: Number | None = None
    unit: Literal["eps"] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Real:
        _check_bounds(*self.bounds, self.log)
        if self.log and self.step is not None:
            raise ValueError("log and step cannot both be given")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"expected a step above 0, found {self.step:g}")
        return self

    @property
    def in_eps(self) -> bool:
        return self.unit == "eps"

    def ends(self) -> Sequence[float]:
        return self.bounds

    def middle(self) -> float:
        low, high = self.bounds
        if self.log:
            return min(max(math.sqrt(low) * math.sqrt(high), low), high)
        if self.step is None:
            return (low + high) / 2
        return low + self.step * (math.floor((high - low) / self.step + 1e-9) // 2)

    def ask(self, trial: Suggests, key: str) -> float:
        return trial.suggest_float(key, *self.bounds, log=self.log, step=self.step)

    def number(self, value: Any, scale: float) -> float | None:
        if scale == 0:
            return None
        number, (low, high) = _divided(value, scale), self.bounds
        if self.step is not None:
            nearest = low + self.step * round((number - low) / self.step)
            if not math.isclose(number, nearest, rel_tol=1e-9, abs_tol=1e-9 * self.step):
                return None
            number = nearest
        kept = min(max(number, low), high)
        return kept if math.isclose(kept, number, rel_tol=1e-9) else None

    def words(self) -> str:
        return self._words(*self.bounds, self.step)


@final
class Whole(AbstractRange):
    """`{int: [low, high]}`, both ends included; `step` or `log` as wanted."""

    bounds: Annotated[tuple[int, int], Field(alias="int")]
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

    def middle(self) -> int:
        low, high = self.ends()
        if self.log:
            return round(math.sqrt(low) * math.sqrt(high))
        return low + (high - low) // self.step // 2 * self.step

    def ask(self, trial: Suggests, key: str) -> int:
        return trial.suggest_int(key, *self.bounds, log=self.log, step=self.step)

    def number(self, value: Any, scale: float) -> int | None:
        del scale
        low, high = self.ends()
        if value != int(value) or not low <= value <= high or (value - low) % self.step:
            return None
        return int(value)

    def words(self) -> str:
        return self._words(*self.bounds, None if self.step == 1 else self.step)


@final
class Choice(AbstractSearched):
    """`{choice: [a, b, c]}`: names, numbers, booleans or null (the field left unset), in no order."""

    options: Annotated[list[Option], Field(alias="choice", min_length=1)]

    def ends(self) -> Sequence[Any]:
        return self.options

    def middle(self) -> Any:
        return self.options[len(self.options) // 2]

    def suggest(self, trial: Suggests, key: str, scale: float) -> Any:
        del scale
        return trial.suggest_categorical(key, self.options)

    def params(self, key: str, value: Any, scale: float) -> dict[str, Any] | None:
        del scale
        found = [option for option in self.options if same(fraction(option), value)]
        return {key: found[0]} if found else None

    def words(self) -> str:
        return " | ".join(map(shown, self.options))


@final
class Branch(AbstractSearched):
    """`{branch: {pgd: {...}, trades: {...}}}`: a choice of names, each with a sub-space of its own."""

    options: Annotated[dict[str, dict[str, SpaceEntry]], Field(alias="branch", min_length=1)]

    def ends(self) -> Sequence[str]:
        return list(self.options)

    def middle(self) -> str:
        return list(self.options)[len(self.options) // 2]

    def suggest(self, trial: Suggests, key: str, scale: float) -> str:
        del scale
        return trial.suggest_categorical(key, list(self.options))

    def params(self, key: str, value: Any, scale: float) -> dict[str, Any] | None:
        del scale
        return {key: value} if isinstance(value, str) and value in self.options else None

    def words(self) -> str:
        return " | ".join(self.options)


@final
class Derived(AbstractDimension):
    """`{derive: "$reach * threat.eps / algorithm.steps"}`: computed, not searched."""

    derive: Annotated[str, AfterValidator(parses)]

    @property
    def formula(self) -> Expression:
        """What it is computed by."""
        return parse(self.derive)

    def words(self) -> str:
        return f"= {self.derive}"


_KINDS = {"float": Real, "int": Whole, "choice": Choice, "branch": Branch, "derive": Derived}


def _kind(value: Any) -> str | None:
    if isinstance(value, AbstractDimension):
        return f"{{{type(value).__name__}}}"
    if isinstance(value, list):
        return "{list}"
    found = [kind for key, kind in _KINDS.items() if isinstance(value, Mapping) and key in value]
    return f"{{{found[0].__name__}}}" if len(found) == 1 else None


_EXPECTED = (
    "Input should be one of {float: [low, high]}, {int: [low, high]}, {choice: [...]}, "
    "{branch: {name: {...}}} and {derive: formula}"
)
_One = (
    Annotated[Real, Tag("{Real}")]
    | Annotated[Whole, Tag("{Whole}")]
    | Annotated[Choice, Tag("{Choice}")]
    | Annotated[Branch, Tag("{Branch}")]
    | Annotated[Derived, Tag("{Derived}")]
)
_BY_KIND = Discriminator(_kind, custom_error_type="dimension", custom_error_message=_EXPECTED)
Dimension = Annotated[_One, _BY_KIND]
Several = Annotated[list[Dimension], Field(min_length=1), Tag("{list}")]
SpaceEntry = Annotated[_One | Several, _BY_KIND]
"""One dimension, or several with conditions that exclude one another."""
Branch.model_rebuild()


def _which(key: str) -> str:
    return f"{key} is"


def _divided(value: float | int, scale: float) -> float:
    """The number that gives `value` when multiplied by `scale`, exactly if there is one."""
    near = value / scale
    for number in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if number * scale == value:
            return number
    return near


def _check_bounds(low: float | int, high: float | int, log: bool) -> None:
    if low > high:
        raise ValueError(f"expected [low, high], found [{low:g}, {high:g}]")
    if log and low <= 0:
        raise ValueError(f"log needs a lower bound above 0, found {low:g}")
