"""What an earlier evaluation of the same network on the same images found, beside a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share

FLAGS, RECORD = "flags.parquet", "evaluation.json"


@dataclass(frozen=True)
class Earlier:
    """Flags, accuracies and findings under the same key: weights, images, contract, seed and batches."""

    flags: pa.Table | None = None
    shares: Mapping[str, Share] | None = None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, folder: Path, key: Mapping[str, Any]) -> Earlier:
        """What lies in a folder, if it belongs to `key`; nothing if it does not, or is damaged."""
        try:
            record = json.loads((folder / RECORD).read_text())
            if record["key"] != key:
                return cls()
            return cls(
                pq.read_table(folder / FLAGS),
                {name: Share(**share) for name, share in record["accuracies"].items()},
                tuple(Finding(**finding) for finding in record["findings"]),
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
            return cls()

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
