"""Configuration of a run: one validated record of all that determines training, and where it runs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from raytrain.algorithms import AbstractAlgorithm, AbstractRecipe, Pgd, Recipe
from raytrain.config.names import (
    EXPERIMENT,
    EXPERIMENT_NAME,
    RUN_NAME,
    STORAGE,
    check_folder_name,
    check_name,
    check_text,
)
from raytrain.config.performance import Performance
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import is_url
from raytrain.core.network import Precision
from raytrain.core.optimizer import Sgd
from raytrain.core.schedules import Ramp
from raytrain.core.storage import local_root
from raytrain.core.threat_models import ThreatModel
from raytrain.core.types import ADDED, SCHEDULABLE, Spec
from raytrain.data.catalogue import SOURCES
from raytrain.data.spec import DataSpec
from raytrain.evaluation.sentinels import Sentinels
from raytrain.evaluation.validation import Evaluation
from raytrain.models import ModelSpec
from raytrain.outer import Outer, Plain

RUNTIME = frozenset(
    {
        "workers",
        "min_workers",
        "device",
        "cpus_per_worker",
        "gpus_per_worker",
        "max_failures",
        "storage",
        "experiment",
        "run_name",
        "tracking_uri",
        "registry",
        "checkpoint_every",
        "checkpoint_minutes",
        "performance",
    }
)
"""Fields that change what a run computes by rounding at most, and are not part of its signature."""

EXECUTION: dict[str, Any] = {**dict.fromkeys(RUNTIME, True), "data": {"in_memory": True}}
"""The same and such fields within others, as `exclude` of pydantic takes them."""


class EarlyStop(Spec):
    """End a run once validation robustness has not risen for `patience` validations in a row."""

    patience: Annotated[
        PositiveInt, Field(description="validations in a row without a gain, before the run ends")
    ]
    min_gain: Annotated[
        NonNegativeFloat, Field(description="a smaller rise than this does not count")
    ] = 0.0


def _folder_or_url(value: str | Path) -> str | Path:
    return value if is_url(value) else Path(value)


def _patience(value: Any) -> Any:
    return {"patience": value} if isinstance(value, int) and not isinstance(value, bool) else value


class RunConfig(Spec):
    """A training run. Every field can be set as `dotted.path=value` on the command line.

    >>> run = RunConfig.model_validate({"data": "cifar10", "algorithm": "trades", "workers": 2})
    >>> run.algorithm.name, run.threat.norm, round(255 * run.threat.eps)
    ('trades', 'linf', 8)
    >>> run.signature() == run.model_copy(update={"workers": 4}).signature()
    True
    """

    data: Annotated[
        DataSpec,
        Field(description="a data set, or the path of a .parquet file or of a folder of them"),
    ] = DataSpec()
    model: Annotated[
        ModelSpec, Field(description="the network; auto: by the size of the images")
    ] = ModelSpec()
    threat: Annotated[
        ThreatModel,
        Field(description="which perturbations are allowed"),
    ]
    algorithm: Annotated[Recipe, Field(description="see `raytrain algorithms`")] = Pgd()
    outer: Annotated[Outer, Field(description="how the weights are updated")] = Plain()
    optimizer: Annotated[Sgd, Field(description="stochastic gradient descent")] = Sgd()
    epochs: Annotated[PositiveInt, Field(description="passes over the training images")] = 15
    fe_per_image: Annotated[
        PositiveFloat | None,
        Field(description="train for this cost instead, in forward-equivalents per image"),
    ] = None
    curriculum: Annotated[
        dict[str, Ramp],
        Field(description="numbers that change over training: {eps: {start: 0, until: 0.3}}"),
    ] = {}
    batch_size: Annotated[
        PositiveInt, Field(description="images per weight update, over all workers together")
    ] = 128
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1, description="decay of averaged weights, which are then evaluated"),
    ] = None
    early_stop: Annotated[
        EarlyStop | None,
        BeforeValidator(_patience, json_schema_input_type=EarlyStop | PositiveInt | None),
        Field(description="validations without a gain in valid/robust before the run ends"),
    ] = None
    sentinels: Annotated[
        Sentinels | None,
        Field(
            description="signs of false robustness, looked for at validations; null: not at all"
        ),
    ] = Sentinels()
    precision: Annotated[
        Precision, Field(description="fp32, bf16 (autocast) or fp64; evaluation is never bf16")
    ] = "fp32"
    seed: Annotated[
        NonNegativeInt, Field(description="of weights, order, augmentation and noise")
    ] = 0
    evaluation: Annotated[Evaluation, Field(description="the attack of validation")] = Evaluation()

    workers: Annotated[PositiveInt, Field(description="processes, one model replica each")] = 1
    min_workers: Annotated[
        PositiveInt | None,
        Field(description="fewest workers that training goes on with; null: always `workers`"),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="auto: a GPU where there is one")
    ] = "auto"
    cpus_per_worker: Annotated[
        PositiveInt, Field(description="cores that Ray keeps for each worker")
    ] = 1
    gpus_per_worker: Annotated[
        PositiveFloat | None, Field(description="default: 1 on GPUs; below 1 shares one")
    ] = None
    max_failures: Annotated[
        NonNegativeInt,
        Field(description="restarts in a row after lost workers, without an epoch in between"),
    ] = 2
    storage: Annotated[
        str | Path,
        AfterValidator(_folder_or_url),
        Field(
            description="folder of checkpoints, on a cluster shared by all nodes; or a URL (s3://, ...)",
            validate_default=False,  # JSON has no Path
        ),
    ] = Path(STORAGE)
    experiment: Annotated[
        str, Field(min_length=1, description="MLflow experiment, and a folder below storage")
    ] = EXPERIMENT
    run_name: Annotated[str | None, Field(description="default: made of the configuration")] = None
    tracking_uri: Annotated[
        str | None,
        Field(description="default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"),
    ] = None
    registry: Annotated[
        bool, Field(description="make the network a version of a registered model in MLflow")
    ] = True
    checkpoint_every: Annotated[PositiveInt, Field(description="epochs; the last is always")] = 1
    checkpoint_minutes: Annotated[
        PositiveFloat | None,
        Field(description="minutes between checkpoints within a long epoch; null: none"),
    ] = 10.0
    performance: Annotated[
        Performance, Field(description="how steps are executed; graph needs a GPU")
    ] = Performance()

    @model_validator(mode="before")
    @classmethod
    def _customary_radius(cls, value: Any) -> Any:
        """Fill in the l-inf radius that is customary for the data set, where none is given."""
        if not isinstance(value, dict):
            return value
        threat = value.get("threat", {})
        if threat == "linf":
            threat = {"norm": "linf"}
        if isinstance(threat, dict) and threat.get("norm", "linf") == "linf":
            value = {**value, "threat": {"norm": "linf", "eps": _customary(value), **threat}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.threat.norm == "linf" and self.threat.eps > 1:
            raise ValueError(
                f"threat.eps: {self.threat.eps:g} is not in pixels of [0, 1]; did you mean "
                f"{self.threat.eps:g}/255?"
            )
        self._check_workers()
        if self.performance.mode == "graph" and self.device == "cpu":
            raise ValueError(
                "performance.mode: graph needs a GPU; expected auto, eager or compile"
            )
        try:
            self.algorithm.build(self.threat, self.outer)
        except ValidationError as error:  # of a part that the recipe is made of
            raise ValueError(f"algorithm: {_first(error)}") from None
        for name in self.curriculum:
            self._check_ramp(name)
        return self

    def _check_workers(self) -> None:
        if self.batch_size % self.workers:
            raise ValueError(
                f"workers: {self.workers} workers cannot share a batch_size of {self.batch_size} "
                "equally; expected a divisor of it"
            )
        least = self.workers if self.min_workers is None else self.min_workers
        if least > self.workers:
            raise ValueError(f"min_workers: expected at most the {self.workers} of workers")
        for count in range(least, self.workers):
            if self.batch_size % count:
                raise ValueError(
                    f"min_workers: {count} workers cannot share a batch_size of {self.batch_size} equally; "
                    "expected a batch_size that every number from min_workers to workers divides"
                )

    def _check_ramp(self, name: str) -> None:
        has = ["eps", *_schedulable(self.algorithm)]
        if name not in has:
            raise ValueError(
                f"curriculum.{name}: algorithm {self.algorithm.name} has no such number to change; "
                f"expected {' or '.join(has)}"
            )
        for quarter in range(5):
            try:
                self.algorithm_with(self.scheduled(quarter / 4))
            except ValidationError as error:
                raise ValueError(f"curriculum.{name}: {_first(error)}") from None
            except ValueError as error:
                raise ValueError(f"curriculum.{name}: {error}") from None

    def scheduled(self, progress: float) -> dict[str, float | str]:
        """Return the values of the curriculum's numbers at a share of training."""
        values = {
            name: ramp.at(progress, self._configured(name), self.threat.eps)
            for name, ramp in self.curriculum.items()
        }
        whole = {name for name in values if isinstance(getattr(self.algorithm, name, None), int)}
        return {
            name: round(value) if name in whole and isinstance(value, float) else value
            for name, value in values.items()
        }

    def algorithm_with(self, scheduled: Mapping[str, float | str]) -> AbstractAlgorithm:
        """Return the algorithm with these numbers replaced."""
        threat, recipe, given = self.threat, self.algorithm, dict(scheduled)
        if "eps" in given:
            threat = type(threat).model_validate({**threat.model_dump(), "eps": given.pop("eps")})
        if given:
            recipe = type(recipe).model_validate({**recipe.model_dump(), **given})
        return recipe.build(threat, self.outer)

    def _configured(self, name: str) -> float | str:
        value = self.threat.eps if name == "eps" else getattr(self.algorithm, name)
        if value is None:
            raise ValueError(
                f"algorithm.{name} has no value to move to or from; expected a number"
            )
        return value if isinstance(value, str) else float(value)

    def computed(self) -> dict[str, Any]:
        """The fields that decide what is computed, as plain values, without `ADDED` ones at default."""
        return _without_added(self, self.model_dump(mode="json", exclude=EXECUTION))

    def signature(self) -> str:
        """12 hexadecimal digits that change exactly when what is computed may change."""
        text = json.dumps(self.computed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def reason_to_stop(
        self, patience_count: int, sentinel_values: Mapping[str, float]
    ) -> str | None:
        """Why a run ends after a validation, as `field: value`; None if it continues.

        The reason is the level of a sentinel, or `patience` validations in a row without a gain.
        """
        alarm = None if self.sentinels is None else self.sentinels.alarm(sentinel_values)
        if (
            alarm is None
            and self.early_stop is not None
            and patience_count >= self.early_stop.patience
        ):
            return f"early_stop: {patience_count} validations without a gain"
        return alarm

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers of a group."""
        return self.workers if self.min_workers is None else self.min_workers, self.workers

    @property
    def root(self) -> Path:
        """The folder of `storage` on this machine; of a URL, its working copy.

        Raises:
            RequestError: naming `storage`, see `local_root`.
        """
        return local_root(self.storage)

    def check_names(self) -> None:
        """Raise for names that MLflow or a file system refuses; not called for runs that are read.

        Raises:
            RequestError: naming the field.
        """
        check_folder_name("experiment", self.experiment, EXPERIMENT_NAME)
        if self.run_name:
            check_name("run_name", self.run_name, RUN_NAME)
        check_text("storage", str(self.storage))
        if not is_url(self.storage) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(self.storage)):
            raise RequestError(
                f"storage: {str(self.storage)!r} is neither a folder nor a URL; expected a path, or "
                "s3://BUCKET/FOLDER and the like"
            )
        local_root(self.storage)

    def check_radius(self, shape: tuple[int, ...]) -> None:
        """Raise for a radius that covers the whole pixel cube, which is probably in another unit.

        Raises:
            RequestError: if eps is not below the norm's diameter of [0, 1]^shape.
        """
        widest = self.threat.diameter(math.prod(shape))
        if self.threat.eps >= widest:
            raise RequestError(
                f"threat.eps: {self.threat.eps:g} is as wide as the whole set of images "
                f"({self.threat.norm}: {widest:g}); expected pixels of [0, 1], such as "
                f"{self.threat.eps:g}/255"
            )


def _schedulable(recipe: AbstractRecipe) -> list[str]:
    """List the fields of a recipe that a curriculum may change."""
    fields = type(recipe).model_fields.items()
    return [name for name, field in fields if SCHEDULABLE in field.metadata]


def _without_added(value: Any, plain: Any) -> Any:
    """Return `plain`, the dump of `value`, without the `ADDED` fields that have their default."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: _without_added(getattr(value, name), one)
            for name, one in plain.items()
            if ADDED not in fields[name].metadata or getattr(value, name) != fields[name].default
        }
    if isinstance(value, Mapping):
        return {name: _without_added(value[name], one) for name, one in plain.items()}
    if isinstance(value, list | tuple):
        return [_without_added(*both) for both in zip(value, plain, strict=True)]
    return plain


def _first(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def _customary(value: dict[str, Any]) -> float:
    data = value.get("data", "digits")
    name = data if isinstance(data, str) else getattr(data, "name", None)
    if isinstance(data, dict):
        name = data.get("name", "digits")
    return SOURCES[str(name)].eps if str(name) in SOURCES else 8 / 255
