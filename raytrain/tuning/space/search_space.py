"""A search space: a base run, what varies in it, the objective and the budget. One YAML file per study."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from raytrain.config.request import override, validated
from raytrain.config.run import EXECUTION, RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.types import Spec, mix
from raytrain.evaluation.sentinels import Sentinels
from raytrain.tuning.space.base import AbstractSearched, Suggests
from raytrain.tuning.space.dimensions import Branch, Choice, Derived, Real, SpaceEntry
from raytrain.tuning.space.draws import Draw, Replay, Walk
from raytrain.tuning.space.expressions import Absent, parse
from raytrain.tuning.space.labels import ALGORITHM
from raytrain.tuning.space.lookup import Lookup
from raytrain.tuning.space.settings import (
    CATASTROPHIC,
    Budget,
    Limit,
    Objective,
    Objectives,
    Search,
    check_limits,
    check_plan,
)
from raytrain.tuning.space.variables import Variable, lay_out

Choose = Callable[[Variable, AbstractSearched, float], Any]
"""Who decides the value of a dimension, given how many pixels its unit is."""

_NOTHING: Mapping[str, Any] = {}
_TRIES = 100  # draws for a configuration, until the constraints hold
_PASSWORD = re.compile(r"^[^:/]*://[^:/]*:[^@]*@|[?&](password|passwd|passphrase)=", re.IGNORECASE)
"""In a URL, where SQLAlchemy would look for one."""


class SearchSpace(Spec):
    """A study: `base` with the fields of `space` varied, to the best of `objective`.

    `sample`, `values`, `grid` and `encoding.encode` walk through the same dimensions in the same order and
    differ only in the source of the values. Raw parameters go by a dimension's `key`, values in the
    units of the run by its path.

    >>> space = SearchSpace(
    ...     name="steps", base={"algorithm": "pgd"}, space={"algorithm.steps": {"int": [1, 3]}}
    ... )
    >>> space.run(space.values({"algorithm.steps": 2})).algorithm.steps
    2
    >>> space.objective[0].metric
    'valid/robust'
    """

    name: Annotated[str, Field(description="default: that of the file")]
    description: Annotated[str, Field(description="shown in MLflow")] = ""
    base: Annotated[dict[str, Any], Field(description="fields of every run")] = {}
    space: Annotated[
        dict[str, SpaceEntry],
        Field(description="what varies, by the dotted path of a field, or $name for a variable"),
    ] = {}
    constraints: Annotated[
        list[str], Field(description="conditions; what breaks one is never trained")
    ] = []
    objective: Annotated[Objectives, Field(description="one, or a list: a Pareto front")] = (
        Objective(),
    )
    feasible: Annotated[
        dict[str, Limit],
        Field(
            description="bounds on metrics of the last epoch; beyond them, a trial is infeasible"
        ),
    ] = CATASTROPHIC
    search: Annotated[Search, Field(description="how configurations are proposed")] = Search()
    budget: Annotated[Budget, Field(description="when the sweep ends")] = Budget()
    study: Annotated[
        str | None,
        Field(
            description="database URL, or a journal file, PATH.log; default: a journal beside the trials"
        ),
    ] = None

    _laid_out: tuple[Any, Any, tuple[Variable, ...], Lookup] | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _levels_are_limits(cls, values: Any) -> Any:
        """What ends a run makes its trial infeasible, unless `feasible` bounds that metric itself."""
        if not isinstance(values, dict):
            return values
        given = values.get("feasible", CATASTROPHIC)
        levels = _levels(values.get("base"))
        if not levels or not isinstance(given, dict):
            return values
        limits = {metric: Limit(max=level) for metric, level in levels.items()}
        merged = {**limits, **given} if "feasible" in values else {**given, **limits}
        return {**values, "feasible": merged}

    @model_validator(mode="after")
    def _makes_sense(self) -> SearchSpace:
        check_plan(self.search, self.objective)
        check_limits(self.feasible)
        if self.study is not None and _PASSWORD.search(self.study):
            raise ValueError(
                "study: the file is kept and shown in MLflow; expected a URL without a password, which "
                "belongs to the driver's own means (PGPASSWORD, ~/.pgpass, ?read_default_file=~/.my.cnf)"
            )
        return self

    @model_validator(mode="after")
    def _in_order(self) -> SearchSpace:
        _ = self.variables
        for number, text in enumerate(self.constraints):
            where = ("constraints", str(number))
            try:
                names = parse(text).names
            except ValueError as error:
                raise RequestError(f"constraints: {error}", where) from None
            if hidden := sorted(name for name in names if name.startswith("$")):
                raise RequestError(
                    f"constraints: {text!r} is about {hidden[0]}, which is no field of the run; "
                    "expected conditions on what is derived from it",
                    where,
                )
        return self

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Every dimension, branches included, in the order in which they are decided."""
        return self._plan()[0]

    @property
    def algorithms(self) -> tuple[str, tuple[Any, ...]] | None:
        """The parameter by which every configuration chooses among several algorithms, and its options.

        None if all have the same one, or choose under a condition.
        """
        found = [variable for variable in self.variables if variable.path in ALGORITHM]
        if len(found) != 1 or found[0].said():
            return None
        entry = found[0].entry
        if not isinstance(entry, Choice | Branch) or len(entry.ends()) < 2:
            return None
        return found[0].key, tuple(entry.ends())

    @property
    def base_run(self) -> RunConfig:
        """The run that nothing has been varied in."""
        try:
            return validated(RunConfig, self.base)
        except RequestError as error:
            raise RequestError(f"base.{error}", ("base", *error.path)) from None

    def sample(self, trial: Suggests) -> dict[str, Any]:
        """What a trial varies, by path and in the units of the run, derived values included.

        Raises:
            RequestError: if a formula has no value for what the trial proposes.
        """
        return {path: one for path, one in self.walk(trial).items() if path[0] != "$"}

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What `sample` gave for the trial with these parameters.

        Raises:
            RequestError: if they are not those of a trial of this space.
        """
        return self.sample(Replay(params))

    def draw(self, number: int, fixed: Mapping[str, Any] = _NOTHING) -> dict[str, Any] | None:
        """The parameters of a random configuration that makes a valid run; None if none is found.

        A function of the search's seed, of `number` and of the parameters that are `fixed`.
        """
        for attempt in range(_TRIES):
            draw = Draw(mix(self.search.seed, "start", repr(fixed), number, attempt), fixed)
            try:
                values = self.sample(draw)
                if self.allows(values):
                    self.run(values)
                    return draw.params
            except RequestError:
                continue
        return None

    def run(self, values: Mapping[str, Any]) -> RunConfig:
        """The run with these values by path.

        Raises:
            RequestError: if they do not make a valid one.
        """
        return validated(RunConfig, override(self.base, values))

    def violations(self, values: Mapping[str, Any]) -> dict[str, float]:
        """By how much each constraint is broken: at most 0 where it holds.

        One about fields that the configuration does not have holds.
        """
        return {text: self._excess(text, values) for text in self.constraints}

    def allows(self, values: Mapping[str, Any]) -> bool:
        """Whether all constraints hold."""
        return all(self._excess(text, values) <= 0 for text in self.constraints)

    def grid(self) -> Iterator[dict[str, Any]]:
        """The parameters of every configuration that the constraints allow.

        Raises:
            RequestError: if there are infinitely many.
        """
        for variable in self.variables:
            entry = variable.entry
            if (
                isinstance(entry, Real)
                and entry.step is None
                and entry.ends()[0] < entry.ends()[1]
            ):
                raise RequestError(f"space.{variable.path}: a grid needs a step", variable.where)
        way: list[int] | None = []
        while way is not None:
            walk = Walk(way)
            if self.allows(self.sample(walk)):
                yield walk.params
            way = walk.after()

    def rows(self) -> list[tuple[str, str, str]]:
        """What varies, as a table: path, range, condition."""
        return [(v.path, v.entry.words(), v.said()) for v in self.variables]

    def units(self) -> dict[str, str]:
        """The units of raw parameters that have one."""
        return {
            variable.key: "eps"
            for variable in self.variables
            if isinstance(variable.entry, AbstractSearched) and variable.entry.in_eps
        }

    def hash(self) -> str:
        """Changes when trials would no longer be comparable: not with name, budget or place of work."""
        shown = self.model_dump(
            mode="json",
            by_alias=True,
            exclude={
                "name": True,
                "description": True,
                "budget": True,
                "study": True,
                "base": EXECUTION,
            },
        )
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:12]

    def walk(
        self, trial: Suggests | Choose, chosen: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The values of all dimensions that apply, `$names` included, filled into `chosen`."""

        def suggested(variable: Variable, entry: AbstractSearched, scale: float) -> Any:
            return entry.suggest(trial, variable.key, scale)  # pyright: ignore[reportArgumentType]

        choose = suggested if isinstance(trial, Suggests) else trial
        chosen = {} if chosen is None else chosen
        variables, lookup = self._plan()
        for variable in variables:
            try:
                self._decide(variable, chosen, lookup, choose)
            except RequestError:
                raise
            except (ValueError, Absent) as error:
                missing = "this configuration has no " if isinstance(error, Absent) else ""
                raise RequestError(
                    f"space.{variable.path}: {missing}{error}", variable.where
                ) from None
        return chosen

    def lookup(self, values: Mapping[str, Any], name: str) -> Any:
        """What a name stands for in the configuration with these values.

        Raises:
            Absent: if it has no such field.
        """
        return self._plan()[1].value(values, name)

    def _plan(self) -> tuple[tuple[Variable, ...], Lookup]:
        """The dimensions laid out; anew for a copy with another base or space."""
        known = self._laid_out
        if known is None or known[0] is not self.base or known[1] is not self.space:
            known = (self.base, self.space, lay_out(self.space), Lookup(self.base))
            self._laid_out = known
        return known[2], known[3]

    def _decide(
        self, variable: Variable, chosen: dict[str, Any], lookup: Lookup, choose: Choose
    ) -> None:
        values = functools.partial(lookup.value, chosen)
        entry, path = variable.entry, variable.path
        if not variable.applies(chosen, values):
            return
        if path in chosen:
            raise ValueError("two of its dimensions apply at once; their conditions must differ")
        if isinstance(entry, Derived):
            chosen[path] = entry.formula.value(values)
        elif isinstance(entry, AbstractSearched):
            scale = lookup.eps(chosen) if entry.in_eps else 1.0
            chosen[path] = choose(variable, entry, scale)

    def _excess(self, text: str, values: Mapping[str, Any]) -> float:
        try:
            return parse(text).excess(functools.partial(self.lookup, values))
        except Absent:
            return -1.0
        except RequestError:
            raise
        except ValueError as error:
            where = ("constraints", str(self.constraints.index(text)))
            raise RequestError(f"constraints: {error}", where) from None


def _levels(base: Any) -> dict[str, float]:
    """The levels of sentinels in a base run, by metric; none where it is not understood."""
    sentinels = base.get("sentinels") if isinstance(base, dict) else None
    if sentinels is None:
        return {}
    try:
        return Sentinels.model_validate(sentinels).stop.limits()
    except ValidationError:  # the validation of the base run reports it
        return {}
