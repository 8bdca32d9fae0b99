"""Descriptions of runs, which a person may rewrite and then keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from raytrain.tracking.experiment import NOTE

DIGEST = "raytrain.note"
"""The tag that records whether a description is still the one that was written here."""

_LONGEST = 8000  # characters of a tag


def tags_of(text: str, run_id: str) -> dict[str, str]:
    """A description as tags; `{run_id}` in it becomes the run's own."""
    text = text.replace("{run_id}", run_id)[:_LONGEST]
    return {NOTE: text, DIGEST: _digest(text)}


def rewrite(client: Any, run_id: str, text: str) -> None:
    """Replace the description of a run, unless it was edited by hand."""
    from mlflow.entities import RunTag

    if is_ours(client.get_run(run_id).data.tags):
        tags = [RunTag(key, value) for key, value in tags_of(text, run_id).items()]
        client.log_batch(run_id, tags=tags)


def is_ours(tags: Mapping[str, str]) -> bool:
    """Whether the description is unchanged since it was written here, or there is none."""
    return not tags.get(NOTE) or _digest(tags[NOTE]) == tags.get(DIGEST)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
