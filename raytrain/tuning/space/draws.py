"""Stand-ins for a trial: at random, from given parameters, and through a whole grid."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raytrain.core.errors import RequestError


class Draw:
    """A trial that draws at random, but for the parameters that are `fixed`; `params` are all of them."""

    def __init__(self, seed: int, fixed: Mapping[str, Any]) -> None:
        self._source, self._fixed = random.Random(seed), fixed
        self.params: dict[str, Any] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        def draw() -> float:
            if step is not None:
                return low + step * self._source.randrange(_points(low, high, step))
            if log:
                drawn = math.exp(self._source.uniform(math.log(low), math.log(high)))
                return min(max(drawn, low), high)
            return self._source.uniform(low, high)

        return self._keep(name, draw)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        def draw() -> int:
            if log:
                return round(math.exp(self._source.uniform(math.log(low), math.log(high))))
            return self._source.randrange(low, high + 1, step)

        return self._keep(name, draw)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._keep(name, lambda: self._source.choice(choices))

    def _keep(self, name: str, draw: Callable[[], Any]) -> Any:
        self.params[name] = self._fixed[name] if name in self._fixed else draw()
        return self.params[name]


class Replay:
    """A trial whose parameters are known."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        del low, high, step, log
        return self._known(name)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        del low, high, step, log
        return self._known(name)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        del choices
        return self._known(name)

    def _known(self, name: str) -> Any:
        if name not in self._params:
            raise RequestError(f"the trial has no parameter {name!r}; expected one of this space")
        return self._params[name]


class Walk:
    """A trial at the point of a grid that `taken` leads to: the numbers of the points taken so far,
    the first ones from there on. `after` is the way to the next.
    """

    def __init__(self, taken: Sequence[int]) -> None:
        self._way, self._lengths = list(taken), list[int]()
        self.params: dict[str, Any] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        del log
        width = high - low if step is None else step
        count = 1 if low == high else _points(low, high, width)
        return self._take(name, [low + width * number for number in range(count)])

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        del log
        return self._take(name, range(low, high + 1, step))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._take(name, choices)

    def after(self) -> list[int] | None:
        """The way to the next point; None after the last."""
        way, lengths = list(self._way), list(self._lengths)
        while way and way[-1] + 1 == lengths[-1]:
            way.pop()
            lengths.pop()
        return [*way[:-1], way[-1] + 1] if way else None

    def _take(self, name: str, points: Sequence[Any]) -> Any:
        if len(self._lengths) == len(self._way):
            self._way.append(0)
        taken = points[self._way[len(self._lengths)]]
        self._lengths.append(len(points))
        self.params[name] = taken
        return taken


def _points(low: float, high: float, step: float) -> int:
    return math.floor((high - low) / step + 1e-9) + 1
