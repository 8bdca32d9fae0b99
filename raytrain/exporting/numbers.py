"""The evaluations of a checkpoint on the test set, read from the files beside it and from MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from raytrain.core.console import log_line
from raytrain.evaluation.record import (
    FOLDER,
    RECORD,
    EvaluationRecord,
    is_of_last,
    metrics_by_scope,
    read_records,
)
from raytrain.tracking.lookup import look_up


@dataclass(frozen=True)
class Record:
    """The tags of a checkpoint's run and its evaluations.

    The first evaluation is under the threat model of training, if there is one of that kind.
    """

    tags: dict[str, str]  # of the run in MLflow; empty where it is not known
    evaluations: tuple[EvaluationRecord, ...]
    texts: dict[str, str]  # the files they were read from, by scope

    @property
    def main(self) -> EvaluationRecord | None:
        """The evaluation under the threat model of training."""
        return next((e for e in self.evaluations if e.same_contract), None)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed in any of the evaluations, each once."""
        names = (one.check for found in self.evaluations for one in found.failed)
        return tuple(dict.fromkeys(names))


def record_of(uri: str | None, run_id: str | None, folder: Path, which: str, epoch: int) -> Record:
    """The record of the checkpoint `which` of a run, of which `epoch` epochs are in the weights.

    Each evaluation is read from its file beside the checkpoint, or else from MLflow, which may have
    been out of reach when it was made. Numbers of another epoch, such as from before a resumption,
    are left out with a line on stderr.
    """
    seen = None if run_id is None else look_up(uri, run_id, FOLDER, RECORD)
    stored = {Path(path).parent.name: text for path, text in seen.texts.items()} if seen else {}
    sources = {"beside the checkpoint": read_records(folder), "in MLflow": stored}
    scopes = sorted({scope for texts in sources.values() for scope in texts})
    found: list[EvaluationRecord] = []
    kept: dict[str, str] = {}
    for scope in scopes:
        if is_of_last(scope) is not (which == "last"):
            continue
        texts = {where: texts[scope] for where, texts in sources.items() if scope in texts}
        right = _right(scope, texts, epoch)
        if right is not None:
            found.append(right[0])
            kept[scope] = right[1]
    if not scopes and seen is not None:
        scope = "test_last" if which == "last" else "test"
        metrics = metrics_by_scope(seen.metrics).get(scope, {})
        one = EvaluationRecord.from_metrics(scope, metrics, seen.tags.get("checks"))
        found = [] if one is None else [one]
    return Record(seen.tags if seen else {}, tuple(found), kept)


def _right(scope: str, texts: dict[str, str], epoch: int) -> tuple[EvaluationRecord, str] | None:
    """The first text of the epoch; those before it are named on stderr."""
    for where, text in texts.items():
        found = _parsed(scope, text, where)
        if found is None:
            continue
        if found.epoch in (epoch, None):
            return found, text
        log_line(
            f"raytrain: the evaluation {scope} {where} is of epoch {found.epoch}, not {epoch}: "
            "left out"
        )
    return None


def _parsed(scope: str, text: str, where: str) -> EvaluationRecord | None:
    try:
        return EvaluationRecord.model_validate_json(text)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        log_line(
            f"raytrain: {FOLDER}/{scope}/{RECORD} {where} is not of this version ({field}): left out"
        )
        return None
