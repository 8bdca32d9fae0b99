"""What was measured of a checkpoint on the test set: by `evaluate`, read from files and MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raytrain.core.console import log_line
from raytrain.evaluation.confidence import wilson
from raytrain.evaluation.names import strongest_first
from raytrain.evaluation.settings import CLEAN
from raytrain.tracking.lookup import Seen, look_up

FOLDER, FILE = "evaluation", "evaluation.json"  # evaluation/SCOPE/evaluation.json

_COUNTS = {"images", "fe", "seconds"}  # metrics of a scope that are no accuracies


class _Read(BaseModel):
    """Of a file whose other fields are not needed here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Accuracy(_Read):
    """`count` of `images`, with its 95 % interval: `value`, `low` and `high` in [0, 1]."""

    value: float
    low: float
    high: float
    count: int
    images: int


class RecordedFinding(_Read):
    """One check of whether the numbers can be believed."""

    check: str
    passed: bool
    sentence: str


_DOUBT = RecordedFinding(
    check="trusted", passed=False, sentence="The evaluation doubts its own numbers."
)


class RecordedContract(_Read):
    """The threat model under which the numbers were measured; eps in pixels of [0, 1]."""

    norm: str
    eps: float
    hash: str = ""
    text: str = ""


class RecordedEvaluation(_Read):
    """One evaluation of one checkpoint, by attack."""

    scope: str
    epoch: int | None = None  # None: not recorded
    contract: RecordedContract | None = None  # None: that of training
    same_contract: bool = True
    images: int
    accuracies: dict[str, Accuracy]
    findings: tuple[RecordedFinding, ...] = ()
    trusted: bool | None = None  # None: nothing was checked
    hardware: str | None = None

    @property
    def failed(self) -> list[RecordedFinding]:
        """The checks that say: do not believe these numbers."""
        failed = [finding for finding in self.findings if not finding.passed]
        return failed or ([_DOUBT] if self.trusted is False else [])

    def hardest(self) -> tuple[str, Accuracy] | None:
        """The attack with the lowest accuracy found, of equals the stronger; None without any attack.

        That need not be AutoAttack: other attacks find images that it does not.
        """
        names = strongest_first(name for name in self.accuracies if name != CLEAN)
        least = min(names, key=lambda name: self.accuracies[name].value, default=None)
        return None if least is None else (least, self.accuracies[least])


@dataclass(frozen=True)
class Record:
    """What is known of a checkpoint beside its weights.

    The first evaluation is under the threat model of training, if there is one of that kind.
    """

    tags: dict[str, str]  # of the run in MLflow; empty where it is not known
    evaluations: tuple[RecordedEvaluation, ...]
    texts: dict[str, str]  # the files they were read from, by scope

    @property
    def main(self) -> RecordedEvaluation | None:
        """The evaluation under the threat model of training."""
        return next((e for e in self.evaluations if e.same_contract), None)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed in any of the evaluations, each once."""
        names = (one.check for found in self.evaluations for one in found.failed)
        return tuple(dict.fromkeys(names))


def record_of(uri: str | None, run_id: str | None, folder: Path, which: str, epoch: int) -> Record:
    """The record of the checkpoint `which` of a run, of which `epoch` epochs are in the weights.

    Each evaluation is read from its file beside the checkpoint, or else from MLflow: the store may
    have been away when it was made. Numbers of another epoch, such as from before a resumption, are
    left out, and that is said.
    """
    seen = None if run_id is None else look_up(uri, run_id, FOLDER, FILE)
    stored = {Path(path).parent.name: text for path, text in seen.texts.items()} if seen else {}
    sources = {"beside the checkpoint": _files(folder), "in MLflow": stored}
    wanted = "test_last" if which == "last" else "test"
    scopes = sorted({scope for texts in sources.values() for scope in texts})
    found: list[RecordedEvaluation] = []
    kept: dict[str, str] = {}
    for scope in scopes:
        if not _is_of(scope, wanted):
            continue
        texts = {where: texts[scope] for where, texts in sources.items() if scope in texts}
        right = _right(scope, texts, epoch)
        if right is not None:
            found.append(right[0])
            kept[scope] = right[1]
    if not scopes and seen is not None:
        found = _from_metrics(seen, wanted)
    return Record(seen.tags if seen else {}, tuple(found), kept)


def _right(scope: str, texts: dict[str, str], epoch: int) -> tuple[RecordedEvaluation, str] | None:
    """The first text that is of the epoch; the ones before it are told, by where they are."""
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


def _is_of(scope: str, wanted: str) -> bool:
    """`test_linf-0.1` is another contract of `test`; `test_last` is another checkpoint."""
    last = scope == "test_last" or scope.startswith("test_last_")
    return last == (wanted == "test_last") and (scope == wanted or scope.startswith(f"{wanted}_"))


def _files(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in folder.glob(f"{FOLDER}/*/{FILE}")}


def _parsed(scope: str, text: str, where: str) -> RecordedEvaluation | None:
    try:
        return RecordedEvaluation.model_validate_json(text)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        log_line(
            f"raytrain: {FOLDER}/{scope}/{FILE} {where} is not of this version ({field}): left out"
        )
        return None


def _from_metrics(seen: Seen, scope: str) -> list[RecordedEvaluation]:
    """Shares without their files: the counts follow from the number of images."""
    shares = {
        name.removeprefix(f"{scope}/"): value
        for name, value in seen.metrics.items()
        if name.startswith(f"{scope}/")
    }
    images = round(shares.get("images", 0))
    if not images:
        return []
    counted = {
        name: wilson(round(value * images), images)
        for name, value in sorted(shares.items(), key=lambda item: item[0] != CLEAN)
        if name not in _COUNTS
    }
    accuracies = {name: Accuracy(**vars(share)) for name, share in counted.items()}
    checks = seen.tags.get("checks")
    words = [] if checks is None else checks.removeprefix("FAILED: ").split(", ")
    failed = [
        RecordedFinding(check=word, passed=False, sentence="see the run in MLflow")
        for word in words
        if checks != "passed"
    ]
    trusted = None if checks is None else not failed
    return [
        RecordedEvaluation(
            scope=scope,
            images=images,
            accuracies=accuracies,
            findings=tuple(failed),
            trusted=trusted,
        )
    ]
