"""The evaluation record: the schema of `evaluation.json`, the metrics in MLflow, and the scopes that
both are named after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share, wilson
from raytrain.evaluation.contract import Contract
from raytrain.evaluation.names import strongest_first
from raytrain.evaluation.settings import CLEAN

FOLDER = "evaluation"
"""Of a checkpoint's folder and of a run's artifacts: `evaluation/SCOPE/` holds the files."""
RECORD, FLAGS, EXAMPLES = "evaluation.json", "flags.parquet", "examples.parquet"

_COSTS = ("images", "fe", "seconds")  # metrics of a scope that are no accuracies
_SCOPE = re.compile(r"test(_last)?(?:_\d+)?(?:_([a-z]\w*)-(.+))?")
_PASSED, _FAILED = "passed", "FAILED: "  # the tag `checks`


class Recorded(BaseModel):
    """Part of a record; fields of other versions are ignored."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", arbitrary_types_allowed=True, ser_json_inf_nan="constants"
    )


class Normaliser(Recorded):
    """Per-channel mean and standard deviation, applied inside the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class RecordedContract(Recorded):
    """The threat model of an evaluation, see `Contract`; `eps` in pixels of `input_range`."""

    norm: str
    eps: float
    input_range: tuple[float, float] = (0.0, 1.0)
    normaliser: Normaliser | None = None  # None: not recorded
    bn: str = "eval"
    hash: str = ""
    text: str = ""

    @classmethod
    def of(cls, contract: Contract) -> RecordedContract:
        """The record of a contract."""
        return cls(
            norm=contract.norm,
            eps=contract.eps,
            input_range=contract.input_range,
            normaliser=Normaliser(mean=contract.mean, std=contract.std),
            bn=contract.bn,
            hash=contract.hash,
            text=contract.text,
        )


class EvaluationRecord(Recorded):
    """One evaluation of one checkpoint on the test set.

    Fields with a default may be missing: in a file of an earlier version, or where only the metrics
    of MLflow are known.
    """

    scope: str  # see `scope_of`
    checkpoint: str = ""  # stem of the file: best or last
    epoch: int | None = None
    contract: RecordedContract | None = None  # None: that of the training
    same_contract: bool = True  # as in training
    images: int
    accuracies: Mapping[str, Share]  # `clean` and every attack, weak to strong
    findings: tuple[Finding, ...] = ()
    trusted: bool | None = None  # None: not recorded
    fe: int = 0  # forward-equivalents
    seconds: float = 0.0  # of attack, summed over processes and launches
    hardware: str | None = None
    versions: Mapping[str, str] = {}
    key: Mapping[str, Any] = {}  # weights, images, contract, seed, batch size and code
    seed: int | None = None

    @property
    def attacks(self) -> list[str]:
        """All names but `clean`, strongest first."""
        return strongest_first(name for name in self.accuracies if name != CLEAN)

    @property
    def strongest(self) -> str | None:
        """The attack with the lowest accuracy, of equals the stronger by name; None without attacks.

        That need not be AutoAttack: other attacks may find images that it does not.
        """
        return min(self.attacks, key=lambda name: self.accuracies[name].value, default=None)

    @property
    def failed(self) -> list[Finding]:
        """The failed checks; one named `trusted` if the record names none but is not trusted."""
        failed = [finding for finding in self.findings if not finding.passed]
        return failed or ([_NOT_TRUSTED] if self.trusted is False else [])

    def metrics(self) -> dict[str, float]:
        """As logged to MLflow: accuracies in [0, 1] and costs as `SCOPE/NAME`."""
        shares = {name: share.value for name, share in self.accuracies.items()}
        values = {**shares, **{name: float(getattr(self, name)) for name in _COSTS}}
        return {f"{self.scope}/{name}": value for name, value in values.items()}

    @classmethod
    def from_metrics(
        cls, scope: str, metrics: Mapping[str, float], checks: str | None = None
    ) -> EvaluationRecord | None:
        """The record of one scope of `metrics_by_scope`, for want of a file; None without accuracies.

        Counts follow from the number of images. `checks` is the run's tag of that name.
        """
        images = round(metrics.get("images", 0))
        names = sorted(set(metrics) - set(_COSTS), key=lambda name: (name != CLEAN, name))
        shares = {
            name: wilson(round(metrics[name] * images), images)
            for name in names
            if images > 0 and 0 <= metrics[name] <= 1
        }
        found = _SCOPE.fullmatch(scope)
        if found is None or not shares:
            return None
        last, norm, eps = found.groups()
        text = f"{norm} eps {eps}"
        other = (
            None
            if norm is None
            else RecordedContract(norm=norm, eps=float(eps), hash=text, text=text)
        )
        failed = checks.removeprefix(_FAILED).split(", ") if checks not in (None, _PASSED) else []
        return cls(
            scope=scope,
            checkpoint="last" if last else "best",
            contract=other,
            same_contract=other is None,
            images=images,
            accuracies=shares,
            findings=tuple(Finding(name, False, "see the run in MLflow") for name in failed),
            trusted=None if checks is None else not failed,
        )


_NOT_TRUSTED = Finding("trusted", False, "The evaluation is recorded as not trusted.")


def scope_of(checkpoint: str, images: int | None, contract: Contract, trained: Contract) -> str:
    """The name of an evaluation's metrics and folder, such as `test_last_1000_linf-0.1`.

    `images` is None for the whole test set; `trained` is the contract of the training.
    """
    which = "test_last" if checkpoint == "last" else "test"
    some = "" if images is None else f"_{images}"
    other = "" if contract == trained else f"_{contract.norm}-{contract.eps:g}"
    return which + some + other


def is_of_last(scope: str) -> bool | None:
    """Whether a scope is of the last checkpoint, not the best; None if it is no scope."""
    found = _SCOPE.fullmatch(scope)
    return None if found is None else found[1] is not None


def metrics_by_scope(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of a run's evaluations, without the scope in their names."""
    found: dict[str, dict[str, float]] = {}
    for name, value in sorted(metrics.items()):
        scope, slash, rest = name.partition("/")
        if slash and _SCOPE.fullmatch(scope):
            found.setdefault(scope, {})[rest] = float(value)
    return found


def checks_tag(failed: Iterable[str]) -> str:
    """The tag `checks` of a run, from the names of the checks that failed."""
    names = ", ".join(failed)
    return _FAILED + names if names else _PASSED


def read_records(folder: Path) -> dict[str, str]:
    """The texts of the records in the folder of a checkpoint, by scope."""
    return {file.parent.name: file.read_text() for file in folder.glob(f"{FOLDER}/*/{RECORD}")}
