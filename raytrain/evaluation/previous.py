"""What an earlier evaluation of the same network on the same images found, beside a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share

_SAME_NETWORK = ("weights", "images", "contract")  # of a key

FLAGS, RECORD = "flags.parquet", "evaluation.json"


@dataclass(frozen=True)
class Earlier:
    """Flags, accuracies and findings under the same key: weights, images, contract, seed, batches, code."""

    flags: pa.Table | None = None
    shares: Mapping[str, Share] | None = None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, folder: Path, key: Mapping[str, Any]) -> Earlier:
        """What lies in a folder, if it belongs to `key`; nothing if it does not, or is damaged.

        What failed a check is remembered of the same network, images and contract under any key.
        """
        try:
            record = json.loads((folder / RECORD).read_text())
            findings = tuple(Finding(**finding) for finding in record["findings"])
            if record["key"] == key:
                shares = {name: Share(**share) for name, share in record["accuracies"].items()}
                return cls(pq.read_table(folder / FLAGS), shares, findings)
            if any(record["key"][part] != key[part] for part in _SAME_NETWORK):
                return cls()
            return cls(findings=tuple(finding for finding in findings if not finding.passed))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return cls()

    @staticmethod
    def failed_beside(folder: Path) -> list[str]:
        """Checks that failed in the other evaluations of a run, on other images or checkpoints.

        Under the run's own threat model, such as `black_box (test_1000)`.
        """
        failed = []
        for file in sorted(folder.parent.glob(f"*/{RECORD}")):
            if file.parent == folder:
                continue
            with suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads(file.read_text())
                names = [one["check"] for one in record["findings"] if not one["passed"]]
                failed += [
                    f"{name} ({file.parent.name})" for name in names if record["same_contract"]
                ]
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
        kept = {k: v for k, v in (self.shares or {}).items() if k == "clean" or k not in new}
        return {**kept, **new}

    def with_findings(self, new: list[Finding]) -> list[Finding]:
        """The new findings, but a check that has failed stays failed: fewer attacks show less."""
        failed = {finding.check: finding for finding in self.findings if not finding.passed}
        kept = [failed.pop(finding.check, finding) for finding in new]
        return [*kept, *failed.values()]
