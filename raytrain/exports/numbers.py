"""What was measured of a checkpoint on the test set: by `evaluate`, read from MLflow or from files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raytrain.evaluation.confidence import wilson
from raytrain.say import say
from raytrain.tracking.look import Seen, look_up

FOLDER, FILE = "evaluation", "evaluation.json"  # evaluation/SCOPE/evaluation.json

_COUNTS = {"images", "fe", "seconds"}  # metrics of a scope that are no accuracies
_ATTACKS = {
    "clean": "none (clean accuracy)",
    "fgsm": "FGSM",
    "apgd": "APGD-CE and APGD-T",
    "aa": "AutoAttack (standard)",
}


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


class Finding(_Read):
    """One check of whether the numbers can be believed."""

    check: str
    passed: bool
    sentence: str


_DOUBT = Finding(check="trusted", passed=False, sentence="The evaluation doubts its own numbers.")


class Contract(_Read):
    """The threat model under which the numbers were measured; eps in pixels of [0, 1]."""

    norm: str
    eps: float
    hash: str = ""
    text: str = ""


class Evaluated(_Read):
    """One evaluation of one checkpoint, by attack."""

    scope: str
    epoch: int | None = None  # None: not recorded
    contract: Contract | None = None  # None: that of training
    same_contract: bool = True
    images: int
    accuracies: dict[str, Accuracy]
    findings: tuple[Finding, ...] = ()
    trusted: bool | None = None  # None: nothing was checked
    hardware: str | None = None

    @property
    def failed(self) -> list[Finding]:
        """The checks that say: do not believe these numbers."""
        failed = [finding for finding in self.findings if not finding.passed]
        return failed or ([_DOUBT] if self.trusted is False else [])

    def hardest(self) -> tuple[str, Accuracy] | None:
        """The attack that left the least, AutoAttack before all others; None without any attack."""
        attacked = {name: got for name, got in self.accuracies.items() if name != "clean"}
        if "aa" in attacked:
            return "aa", attacked["aa"]
        return min(attacked.items(), key=lambda item: item[1].value, default=None)


@dataclass(frozen=True)
class Record:
    """What is known of a checkpoint beside its weights.

    The first evaluation is under the threat model of training, if there is one of that kind.
    """

    tags: dict[str, str]  # of the run in MLflow; empty where it is not known
    evaluations: tuple[Evaluated, ...]
    texts: dict[str, str]  # the files they were read from, by scope

    @property
    def main(self) -> Evaluated | None:
        """The evaluation under the threat model of training."""
        return next((e for e in self.evaluations if e.same_contract), None)


def attack_name(name: str) -> str:
    """An attack in words: `pgd20x5` is PGD of 20 steps with 5 random starts."""
    match = re.fullmatch(r"(pgd|cw)(\d+)(?:x(\d+))?(?:-.*)?", name)
    if match is None:
        return _ATTACKS.get(name, name)
    kind = "PGD" if match[1] == "pgd" else "PGD on the CW margin"
    starts = f", {match[3]} random starts" if match[3] else ""
    return f"{kind}, {match[2]} steps{starts}"


def record_of(uri: str | None, run_id: str | None, folder: Path, which: str, epoch: int) -> Record:
    """The record of the checkpoint `which` of a run, of which `epoch` epochs are in the weights.

    Read from MLflow if the run is known there, else from the files beside the checkpoint. Numbers
    of another epoch, such as from before a resumption, are left out, and that is said.
    """
    seen = None if run_id is None else look_up(uri, run_id, FOLDER, FILE)
    texts = {Path(path).parent.name: text for path, text in seen.texts.items()} if seen else {}
    texts = texts or _files(folder)
    wanted = "test_last" if which == "last" else "test"
    mine = {scope: text for scope, text in texts.items() if _is_of(scope, wanted)}
    found = [_parsed(scope, text) for scope, text in sorted(mine.items())]
    right = [one for one in found if one is not None and one.epoch in (epoch, None)]
    for one in found:
        if one is not None and one not in right:
            say(
                f"raytrain: the evaluation {one.scope} is of epoch {one.epoch}, not {epoch}: left out"
            )
    if not texts and seen is not None:
        right = _from_metrics(seen, wanted)
    kept = {one.scope: mine[one.scope] for one in right if one.scope in mine}
    return Record(seen.tags if seen else {}, tuple(right), kept)


def _is_of(scope: str, wanted: str) -> bool:
    """`test_linf-0.1` is another contract of `test`; `test_last` is another checkpoint."""
    last = scope == "test_last" or scope.startswith("test_last_")
    return last == (wanted == "test_last") and (scope == wanted or scope.startswith(f"{wanted}_"))


def _files(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in folder.glob(f"{FOLDER}/*/{FILE}")}


def _parsed(scope: str, text: str) -> Evaluated | None:
    try:
        return Evaluated.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        say(f"raytrain: {FOLDER}/{scope}/{FILE} is not of this version ({where}): left out")
        return None


def _from_metrics(seen: Seen, scope: str) -> list[Evaluated]:
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
        for name, value in sorted(shares.items(), key=lambda item: item[0] != "clean")
        if name not in _COUNTS
    }
    accuracies = {name: Accuracy(**vars(share)) for name, share in counted.items()}
    checks = seen.tags.get("checks")
    words = [] if checks is None else checks.removeprefix("FAILED: ").split(", ")
    failed = [
        Finding(check=word, passed=False, sentence="see the run in MLflow")
        for word in words
        if checks != "passed"
    ]
    trusted = None if checks is None else not failed
    return [
        Evaluated(
            scope=scope,
            images=images,
            accuracies=accuracies,
            findings=tuple(failed),
            trusted=trusted,
        )
    ]
