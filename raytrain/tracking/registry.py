"""Trained networks as versions of a registered model; the alias `best` follows the most robust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrain.tracking.stores import EXISTS, MISSING, code_of, patiently

ALIAS = "best"
ROBUST, JUDGE, WEIGHTS = "valid/robust", "judge", "weights"
"""Tags of a version: what it is ranked by, who measured that, and which weights it holds."""


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
    found = _versions(client, entry)
    return any(v.run_id == run_id and v.tags.get(WEIGHTS) == entry.weights for v in found)


def register(client: Any, entry: Entry, run_id: str, model_id: str) -> str:
    """Add a version made of a logged model; returns its number.

    Raises:
        MlflowException: if the store has no registry.
    """
    from mlflow.exceptions import MlflowException

    before = max((int(v.version) for v in _versions(client, entry)), default=0)
    try:
        patiently(lambda: client.create_registered_model(entry.model, description=entry.about))
    except MlflowException as error:
        if code_of(error) not in EXISTS:
            raise
    version = patiently(
        lambda: client.create_model_version(
            entry.model,
            f"models:/{model_id}",
            run_id,
            tags=entry.all_tags(),
            description=entry.note,
            await_creation_for=0,
            model_id=model_id,
        )
    )
    if entry.robust is not None and _leads(version, _best(client, entry)):
        _promote(client, entry, version, before)
    return str(version.version)


def _versions(client: Any, entry: Entry) -> list[Any]:
    return list(patiently(lambda: client.search_model_versions(f"name = '{entry.model}'")))


def _best(client: Any, entry: Entry) -> Any | None:
    """The version that the alias points to; None if there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return patiently(lambda: client.get_model_version_by_alias(entry.model, ALIAS))
    except MlflowException as error:
        if code_of(error) not in MISSING:
            raise
    return None


def _leads(version: Any, best: Any | None) -> bool:
    """Whether it is better than the best, where the two can be compared, or there is none."""
    if best is None:
        return True
    comparable = best.tags.get(JUDGE) == version.tags[JUDGE] and ROBUST in best.tags
    return comparable and float(version.tags[ROBUST]) > float(best.tags[ROBUST])


def _promote(client: Any, entry: Entry, version: Any, before: int) -> None:
    """Point the alias to a version, or to a better one that another process has added meanwhile.

    Of versions after `before`: each process looks again after it has set the alias, so the last one
    to set it has seen what the others added.
    """
    current = None
    while version.version != current:
        current = version.version
        number = str(current)
        patiently(lambda n=number: client.set_registered_model_alias(entry.model, ALIAS, n))
        rivals = [
            v
            for v in _versions(client, entry)
            if int(v.version) > before and v.tags.get(JUDGE) == entry.judge and ROBUST in v.tags
        ]
        version = max(rivals or [version], key=_rank)


def _rank(version: Any) -> tuple[float, int]:
    """By robustness; of equals, the earliest leads."""
    return float(version.tags[ROBUST]), -int(version.version)
