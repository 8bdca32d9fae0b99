"""The problem of a study: data, network and budgets, the methods, and the questions, from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from raytrain.config.documents import read_file
from raytrain.config.request import override, validated
from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.types import Spec
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.tuning.space.search_space import SearchSpace

HERE = Path(__file__).parent
_PROBLEMS, _SHARED = HERE / "problems", HERE / "methods.yaml"
SPACES = HERE.parents[1] / "search_spaces"

_OF_METHOD = ("algorithm", "outer")  # what a method takes of the base run of its space
_SHAPED_BY = ("base", "space", "constraints", "feasible")


class Method(Spec):
    """An algorithm with an outer update, and the published search space of its hyperparameters."""

    space: Annotated[str, Field(description="file in search_spaces/, without .yaml")]
    fixed: Annotated[
        dict[str, Any],
        Field(description="dimensions of the space that are not searched, by dotted path"),
    ] = {}


class Tuning(Spec):
    """The search of every method's hyperparameters: the same number of trials, each at the same cost."""

    trials: Annotated[PositiveInt, Field(description="the first has the published defaults")]
    fe_per_image: Annotated[PositiveFloat, Field(description="cost of a trial")]
    seed: Annotated[int, Field(ge=0, description="of all trials; none of those of the runs")] = (
        1000
    )


class Question(Spec):
    """Whether a method is more robust than each of others, at equal cost."""

    claim: str
    source: Annotated[str, Field(description="where it is claimed")]
    method: str
    against: Annotated[list[str], Field(min_length=1)]


class Problem(Spec):
    """All that a study depends on. The methods are compared under the last attack of each evaluation."""

    name: str
    title: str
    base: Annotated[
        dict[str, Any],
        Field(
            description="fields of every run, or the path of a run file, from the problem's file"
        ),
    ]
    methods: dict[str, Method]
    tuning: Annotated[
        Tuning | None, Field(description="none: all runs have the hyperparameters of `base`")
    ] = None
    budgets: Annotated[
        list[PositiveFloat],
        Field(min_length=1, description="costs of runs, FE per training image"),
    ]
    seeds: PositiveInt
    evaluations: Annotated[
        list[EvaluationSettings], Field(min_length=1, description="one after the other")
    ]
    questions: list[Question]

    _drawn: dict[tuple[str, int], dict[str, Any]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _questions_are_about_methods(self) -> Problem:
        for question in self.questions:
            for name in (question.method, *question.against):
                if name not in self.methods:
                    known = ", ".join(self.methods)
                    raise ValueError(f"questions: expected one of {known}, found {name}")
        if self.tuning is not None and self.tuning.seed < self.seeds:
            raise ValueError(
                f"tuning.seed: expected none of the {self.seeds} seeds of the runs, found {self.tuning.seed}"
            )
        return self

    @cached_property
    def spaces(self) -> Mapping[str, SearchSpace]:
        """The search space of each method on this problem."""
        return {name: self._space(name, method) for name, method in self.methods.items()}

    def _space(self, name: str, method: Method) -> SearchSpace:
        file = SPACES / f"{method.space}.yaml"
        if not file.is_file():
            raise RequestError(
                f"methods.{name}.space: expected a file in search_spaces/, found no {file.name}"
            )
        published = {k: v for k, v in _content(file).items() if k in _SHAPED_BY}
        own = {k: v for k, v in published["base"].items() if k in _OF_METHOD}
        base = override(override(self.base, _dotted(own)), method.fixed)
        if self.tuning is not None:
            base |= {"fe_per_image": self.tuning.fe_per_image, "seed": self.tuning.seed}
        return validated(SearchSpace, {**published, "name": name, "base": base})

    def trial(self, method: str, number: int) -> RunConfig:
        """A trial of a method's search.

        Raises:
            RequestError: if the space of the method has no valid configuration.
        """
        return self._configured(method, self.hyperparameters(method, number))

    def run(self, method: str, trial: int, budget: float, seed: int) -> RunConfig:
        """The run of a method with the hyperparameters of one of its trials."""
        changes = {"fe_per_image": budget, "seed": seed}
        return self._configured(method, self.hyperparameters(method, trial) | changes)

    def hyperparameters(self, method: str, number: int) -> dict[str, Any]:
        """What a trial varies, by dotted path: nothing in trial 0, which has the published defaults; else
        a random configuration of the space.

        Raises:
            RequestError: if the space has no valid configuration.
        """
        if number == 0:
            return {}
        if (method, number) not in self._drawn:
            space = self.spaces[method]
            params = space.draw(number, self.methods[method].fixed)
            if params is None:
                raise RequestError(
                    f"methods.{method}: no random configuration of its space is valid"
                )
            self._drawn[method, number] = space.values(params)
        return self._drawn[method, number]

    def _configured(self, method: str, values: Mapping[str, Any]) -> RunConfig:
        return self.spaces[method].run(values)


def read_problem(word: str) -> Problem:
    """A problem by the name of a file in problems/, or the path of one elsewhere.

    Methods and questions are by default those of methods.yaml.

    Raises:
        RequestError: if there is none, or naming its field.
    """
    file = Path(word) if word.endswith(".yaml") else _PROBLEMS / f"{word}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(found.stem for found in _PROBLEMS.glob("*.yaml")))
        raise RequestError(f"PROBLEM: expected one of {known}, or a file; found {word}")
    values = {"name": file.stem, **_content(_SHARED), **_content(file)}
    if isinstance(values.get("base"), str):
        values["base"] = _content(file.parent / values["base"])
    return validated(Problem, values)


def _content(file: Path) -> dict[str, Any]:
    return read_file(file, lambda path: False)[0]


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@dataclass(frozen=True)
class Task:
    """One training of a study, and which of its evaluations is due after it."""

    problem: str
    phase: str  # `tune` or `run`
    method: str
    trial: int  # whose hyperparameters it has
    budget: float  # FE per training image
    seed: int
    evaluation: int | None = None  # number of the evaluation; None in `tune`

    @property
    def key(self) -> str:
        """The name of its record."""
        return self.training if self.evaluation is None else f"{self.training}-{self.evaluation}"

    @property
    def training(self) -> str:
        """The name of the training: that of all evaluations of it."""
        return f"{self.phase}-{self.method}-{self.trial}-{self.budget:g}-{self.seed}"
