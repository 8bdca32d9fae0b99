"""What every dimension of a search space has: a condition, and words for a reader."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import AfterValidator, ConfigDict, Field

from raytrain.core.types import Spec
from raytrain.tuning.space.expressions import Expression, parse

Option = str | bool | int | float | None


@runtime_checkable
class Suggests(Protocol):
    """The part of an Optuna trial that a space uses: its suggestion methods."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def parses(text: str) -> str:
    """The text of an expression, unchanged if it is one."""
    parse(text)
    return text


def _condition(value: Any) -> Any:
    return parses(value) if isinstance(value, str) else value


class AbstractDimension(Spec):
    """One field of the run; with `when`, only where that holds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    when: Annotated[
        dict[str, Any] | str,
        AfterValidator(_condition),
        Field(
            description="earlier path -> the value, or list of values, needed; or an expression"
        ),
    ] = {}

    @property
    def wanted(self) -> dict[str, list[Any]]:
        """The values that each path of the mapping form may have."""
        pairs = self.when.items() if isinstance(self.when, dict) else ()
        return {path: one if isinstance(one, list) else [one] for path, one in pairs}

    @property
    def condition(self) -> Expression | None:
        """The condition, where it is an expression."""
        return parse(self.when) if isinstance(self.when, str) else None

    @abstractmethod
    def words(self) -> str:
        """What it may be, for a reader."""


class AbstractSearched(AbstractDimension):
    """A dimension whose value a trial suggests."""

    @property
    def in_eps(self) -> bool:
        """Whether its numbers are multiples of the threat's radius."""
        return False

    @abstractmethod
    def suggest(self, trial: Suggests, key: str, scale: float) -> Any:
        """Suggest a value, in the units of the run, `scale` pixels to one of its own."""

    @abstractmethod
    def params(self, key: str, value: Any, scale: float) -> dict[str, Any] | None:
        """The parameters of a trial with this value of the run; None if it is never taken."""

    @abstractmethod
    def ends(self) -> Sequence[Any]:
        """Its extreme values, or all of them where they have no order."""

    @abstractmethod
    def middle(self) -> Any:
        """A value from the middle of it."""

    def corners(self, key: str) -> list[dict[str, Any]]:
        """Parameters of a trial that take it to each of its ends."""
        return [{key: end} for end in self.ends()]


def same(one: Any, other: Any) -> bool:
    """Whether two values of a field are equal: 1 and true are not, floats up to their last digits."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-12)
    return type(one) is type(other) and one == other


def shown(option: Option) -> str:
    """An option as YAML has it."""
    if option is None or isinstance(option, bool):
        return str(option).lower().replace("none", "null")
    return f"{option:g}" if isinstance(option, float) else str(option)
