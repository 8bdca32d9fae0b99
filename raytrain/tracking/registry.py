"""Trained networks as versions of a registered model; the alias `best` follows the most robust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALIAS = "best"
ROBUST, JUDGE, WEIGHTS = "valid/robust", "judge", "weights"
"""Tags of a version: what it is ranked by, who measured that, and which weights it holds."""

_EXISTS = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Entry:
    """A version to be: versions are ranked by `robust` among those of the same `judge`."""

    model: str  # the registered model
    about: str  # of the registered model, in Markdown
    note: str  # of the version, in Markdown
    judge: str  # what two numbers must share to be compared: contract, images, attack
    weights: str  # a digest: the same weights of the same run are registered once
    robust: float | None = None  # on the validation images
    tags: Mapping[str, str] = field(default_factory=dict)

    def all_tags(self) -> dict[str, str]:
        """Tags of the version."""
        measured = {} if self.robust is None else {ROBUST: f"{self.robust:.6g}"}
        return {**self.tags, **measured, JUDGE: self.judge, WEIGHTS: self.weights}


def is_registered(client: Any, entry: Entry, run_id: str) -> bool:
    """Whether these weights of this run are there.

    Raises:
        MlflowException: if the store has no registry.
    """
    found = client.search_model_versions(f"name = '{entry.model}'")
    return any(v.run_id == run_id and v.tags.get(WEIGHTS) == entry.weights for v in found)


def register(client: Any, entry: Entry, run_id: str, model_id: str) -> str:
    """Add a version made of a logged model; returns its number.

    Raises:
        MlflowException: if the store has no registry.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(entry.model, description=entry.about)
    except MlflowException as error:
        if error.error_code not in _EXISTS:
            raise
    version = client.create_model_version(
        entry.model,
        f"models:/{model_id}",
        run_id,
        tags=entry.all_tags(),
        description=entry.note,
        await_creation_for=0,
        model_id=model_id,
    )
    if entry.robust is not None and _leads(client, entry):
        client.set_registered_model_alias(entry.model, ALIAS, version.version)
    return str(version.version)


def _leads(client: Any, entry: Entry) -> bool:
    """Whether it is better than the best, or there is none yet, or that one was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        best = client.get_model_version_by_alias(entry.model, ALIAS)
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
        return True
    comparable = best.tags.get(JUDGE) == entry.judge and ROBUST in best.tags
    return comparable and (entry.robust or 0.0) > float(best.tags[ROBUST])
