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

_METRIC = re.compile(r"(test(?:_last)?(?:_[^/]+)?)/(.+)")
_BESIDE = ("images", "fe", "seconds")  # metrics of a scope that are no accuracy
_FILES = {"flags": "flags.parquet", "examples": "examples.parquet"}


@dataclass(frozen=True)
class Evaluated:
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
    epoch: int | None = None
    flags: pa.Table | None = None
    examples: pa.Table | None = None

    @property
    def attacks(self) -> list[str]:
        """Those it was attacked with, strongest first."""
        return strongest([name for name in self.shares if name != "clean"])

    @property
    def test_set(self) -> str:
        """A fingerprint of the images that were used, as far as it is known."""
        if self.flags is None:
            return ""
        table = self.flags.sort_by("index")
        text = json.dumps([table["index"].to_pylist(), table["label"].to_pylist()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_evaluations(
    client: Any, run: Any, folder: Path, complain: Callable[[str], None]
) -> tuple[Evaluated, ...]:
    """All evaluations of a run; what is damaged is complained of and left out.

    Files are fetched into `folder`.
    """
    by_scope: dict[str, dict[str, float]] = {}
    for name, value in run.data.metrics.items():
        if match := _METRIC.fullmatch(name):
            by_scope.setdefault(match[1], {})[match[2]] = float(value)
    if not by_scope:
        return ()
    run_id = run.info.run_id
    there = {Path(one.path).name for one in client.list_artifacts(run_id, "evaluation")}
    found = []
    for scope, metrics in sorted(by_scope.items()):
        files = Path()
        if scope in there:
            inside = f"evaluation/{scope}"
            files = Path(client.download_artifacts(run_id, inside, str(_made(folder / run_id))))
        one = _evaluated(scope, metrics, files if scope in there else None, complain, run)
        if one is not None:
            found.append(one)
    return tuple(found)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _evaluated(
    scope: str,
    metrics: Mapping[str, float],
    files: Path | None,
    complain: Callable[[str], None],
    run: Any,
) -> Evaluated | None:
    told = _told(files, complain, run)
    contract = told.get("contract", {})
    images = int(told.get("images") or metrics.get("images", 0))
    shares = {name: _share(value, images) for name, value in metrics.items() if _is_share(name)}
    if images == 0 or not shares:
        return None
    for name, one in told.get("accuracies", {}).items():
        shares[name] = wilson(int(one["count"]), int(one["images"]))
    failed = tuple(
        f"{one['check']}: {one['sentence']}"
        for one in told.get("findings", ())
        if not one["passed"]
    )
    foreign = re.fullmatch(r"test(?:_last)?(?:_\d+)?_([a-z]\w*)-(.+)", scope)
    guess = f"{foreign[1]} eps {foreign[2]}" if foreign else ""
    return Evaluated(
        scope=scope,
        checkpoint=told.get("checkpoint", "last" if scope.startswith("test_last") else "best"),
        contract=contract.get("hash", guess),
        contract_text=contract.get("text", guess),
        same_contract=told.get("same_contract", foreign is None),
        shares=shares,
        images=images,
        checked=bool(told.get("findings")),
        failed=failed or (() if told.get("trusted", True) else ("checks: not trusted",)),
        epoch=told.get("epoch"),
        **{name: _table(files, file, complain, run) for name, file in _FILES.items()},
    )


def _is_share(name: str) -> bool:
    return name not in _BESIDE and not name.startswith("_")


def _share(value: float, images: int) -> Share:
    return wilson(round(value * images), images) if images else Share(value, value, value, 0, 0)


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


def strongest(attacks: list[str]) -> list[str]:
    """Attacks from the strongest to the weakest, as far as their names tell."""
    return sorted(dict.fromkeys(attacks), key=_strength, reverse=True)


def _strength(attack: str) -> tuple[int, int, int]:
    if attack in ("aa", "apgd"):
        return (5 if attack == "aa" else 4, 0, 0)
    match = re.fullmatch(r"(pgd|cw)(\d+)(?:x(\d+))?", attack)
    if match is None:
        return (1 if attack == "fgsm" else 0, 0, 0)
    return (3 if match[1] == "pgd" else 2, int(match[3] or 1), int(match[2]))


def called(attack: str) -> str:
    """An attack as papers call it."""
    plain = {"aa": "AutoAttack", "apgd": "APGD-CE + T", "fgsm": "FGSM", "clean": "clean"}
    match = re.fullmatch(r"(pgd|cw)(\d+)(?:x(\d+))?", attack)
    if match is None:
        return plain.get(attack, attack)
    again = f" x{match[3]}" if match[3] and match[3] != "1" else ""
    return f"{match[1].upper()}-{match[2]}{again}"
