"""What evaluations on the test set found: from MLflow's metrics, and the files beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.evaluation.confidence import Share, wilson
from raytrain.evaluation.names import strongest_first

_METRIC = re.compile(r"(test(?:_last)?(?:_[^/]+)?)/(.+)")
_BESIDE = ("images", "fe", "seconds")  # metrics of a scope that are no accuracy
_FILES = {"flags": "flags.parquet", "examples": "examples.parquet"}


@dataclass(frozen=True)
class EvaluatedRun:
    """One checkpoint on one test set under one threat model."""

    scope: str  # such as test, test_last, test_linf-0.1
    checkpoint: str  # best or last
    contract: str  # hash of the threat model; empty: that of the training
    contract_text: str
    same_contract: bool  # the one it was trained for
    shares: Mapping[str, Share]  # `clean` and every attack
    images: int
    checked: bool = False  # whether it came with the findings of checks
    failed: tuple[str, ...] = ()  # sentences of the checks that failed
    digest: str = ""  # of the images; empty where it was not told
    flags: pa.Table | None = None
    examples: pa.Table | None = None

    @property
    def attacks(self) -> list[str]:
        """Those it was attacked with, strongest first."""
        return strongest_first([name for name in self.shares if name != "clean"])

    @property
    def test_set(self) -> str:
        """A fingerprint of the images that were used: of their labels, if no more is known."""
        if self.digest or self.flags is None:
            return self.digest
        table = self.flags.sort_by("index")
        text = json.dumps([table["index"].to_pylist(), table["label"].to_pylist()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_evaluations(
    client: Any, run: Any, folder: Path, complain: Callable[[str], None]
) -> tuple[EvaluatedRun, ...]:
    """All evaluations of a run; what is damaged is complained of and left out.

    Files are fetched into `folder`.
    """
    by_scope: dict[str, dict[str, float]] = {}
    for name, value in run.data.metrics.items():
        if match := _METRIC.fullmatch(name):
            by_scope.setdefault(match[1], {})[match[2]] = float(value)
    if not by_scope:
        return ()
    found = []
    for scope, metrics in sorted(by_scope.items()):
        try:
            files = _fetched(client, run.info.run_id, scope, folder)
        except Exception as error:  # each store its own: the metrics are here all the same
            complain(f"{run.info.run_name}: the files of {scope} cannot be fetched ({error})")
            files = None
        try:
            one = _evaluated(scope, metrics, files, complain, run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            complain(
                f"{run.info.run_name}: {scope} is not as raytrain writes it ({error!r}); left out"
            )
            one = None
        if one is not None:
            found.append(one)
    return tuple(found)


def _fetched(client: Any, run_id: str, scope: str, folder: Path) -> Path | None:
    inside = f"evaluation/{scope}"
    if inside not in {one.path for one in client.list_artifacts(run_id, "evaluation")}:
        return None
    return Path(client.download_artifacts(run_id, inside, str(_made(folder / run_id))))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _evaluated(
    scope: str,
    metrics: Mapping[str, float],
    files: Path | None,
    complain: Callable[[str], None],
    run: Any,
) -> EvaluatedRun | None:
    told = _told(files, complain, run)
    contract = told.get("contract", {})
    images = int(told.get("images") or metrics.get("images", 0))
    shares = {
        name: wilson(int(one["count"]), int(one["images"]))
        for name, one in told.get("accuracies", {}).items()
    } or {  # metrics may be of several evaluations, files are of one
        name: wilson(round(value * images), images)
        for name, value in metrics.items()
        if images > 0 and name not in _BESIDE and 0 <= value <= 1
    }
    if not shares:
        return None
    failed = tuple(
        f"{one['check']}: {one['sentence']}"
        for one in told.get("findings", ())
        if not one["passed"]
    )
    foreign = re.fullmatch(r"test(?:_last)?(?:_\d+)?_([a-z]\w*)-(.+)", scope)
    guess = f"{foreign[1]} eps {foreign[2]}" if foreign else ""
    return EvaluatedRun(
        scope=scope,
        checkpoint=told.get("checkpoint", "last" if scope.startswith("test_last") else "best"),
        contract=contract.get("hash", guess),
        contract_text=contract.get("text", guess),
        same_contract=told.get("same_contract", foreign is None),
        shares=shares,
        images=images,
        checked=bool(told.get("findings")),
        failed=failed or (() if told.get("trusted", True) else ("checks: not trusted",)),
        digest=told.get("key", {}).get("images", ""),
        **{name: _table(files, file, complain, run) for name, file in _FILES.items()},
    )


def _told(files: Path | None, complain: Callable[[str], None], run: Any) -> dict[str, Any]:
    if files is None or not (files / "evaluation.json").is_file():
        return {}
    try:
        told = json.loads((files / "evaluation.json").read_text())
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError) as error:
        complain(f"{run.info.run_name}: evaluation.json cannot be read ({error}); left out")
        return {}


def _table(
    files: Path | None, name: str, complain: Callable[[str], None], run: Any
) -> pa.Table | None:
    if files is None or not (files / name).is_file():
        return None
    try:
        return pq.read_table(files / name)
    except (OSError, pa.ArrowInvalid) as error:
        complain(f"{run.info.run_name}: {name} cannot be read ({error}); left out")
        return None
