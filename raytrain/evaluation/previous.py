"""The earlier evaluation of the same network on the same images, merged into a new one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share
from raytrain.evaluation.record import FLAGS, RECORD, EvaluationRecord
from raytrain.evaluation.settings import CLEAN

_SAME_NETWORK = ("weights", "images", "contract")  # of a key


@dataclass(frozen=True)
class Earlier:
    """Flags, accuracies and findings under the same key: weights, images, contract, seed, batches, code."""

    flags: pa.Table | None = None
    shares: Mapping[str, Share] | None = None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, folder: Path, key: Mapping[str, Any]) -> Earlier:
        """Read the evaluation in a folder; empty if it has another `key` or is damaged.

        Failed checks are kept for the same network, images and contract, whatever the rest of the key.
        """
        try:
            record = _read(folder / RECORD)
            if record.key == key:
                return cls(pq.read_table(folder / FLAGS), record.accuracies, record.findings)
        except (OSError, ValueError, pa.ArrowInvalid):
            return cls()
        if any(record.key.get(part) != key[part] for part in _SAME_NETWORK):
            return cls()
        return cls(findings=tuple(finding for finding in record.findings if not finding.passed))

    @staticmethod
    def failed_beside(folder: Path) -> list[str]:
        """Checks that failed in the other evaluations of a run, on other images or checkpoints.

        Under the run's own threat model, such as `black_box (test_1000)`.
        """
        failed = []
        for file in sorted(folder.parent.glob(f"*/{RECORD}")):
            if file.parent == folder:
                continue
            with suppress(OSError, ValueError):
                record = _read(file)
                if record.same_contract:
                    names = [finding.check for finding in record.findings if not finding.passed]
                    failed += [f"{name} ({file.parent.name})" for name in names]
        return failed

    def with_flags(self, new: pa.Table) -> pa.Table:
        """The new table, and columns that only the earlier one has."""
        if self.flags is None:
            return new
        for name in self.flags.column_names:
            if name not in new.column_names:
                new = new.append_column(name, self.flags[name])
        return new

    def with_shares(self, new: Mapping[str, Share]) -> dict[str, Share]:
        """All accuracies, those that are new last."""
        kept = {k: v for k, v in (self.shares or {}).items() if k == CLEAN or k not in new}
        return {**kept, **new}

    def with_findings(self, new: list[Finding]) -> list[Finding]:
        """The new findings, but a check that has failed stays failed: fewer attacks show less."""
        failed = {finding.check: finding for finding in self.findings if not finding.passed}
        kept = [failed.pop(finding.check, finding) for finding in new]
        return [*kept, *failed.values()]


def _read(file: Path) -> EvaluationRecord:
    return EvaluationRecord.model_validate_json(file.read_text())
