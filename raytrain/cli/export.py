"""The output of `raytrain export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from raytrain.cli.common import line

if TYPE_CHECKING:
    from raytrain.commands.export import ExportResult


def export_summary(result: ExportResult) -> Callable[[], None]:
    """The end of `raytrain export`."""

    def show() -> None:
        console = Console()
        line(console, "exported", f"{result.checkpoint}, epoch {result.epoch}")
        line(console, "folder", str(result.folder))
        for name, how in result.checked.items():
            line(console, name, how.sentence())
        for name, why in result.skipped.items():
            line(console, name, f"left out: {why}")
        line(console, "card", f"{result.folder / 'README.md'}; {_believed(result)}")

    return show


def _believed(result: ExportResult) -> str:
    if result.failed_checks:
        return f"CHECKS FAILED ({', '.join(result.failed_checks)}): do not believe its numbers"
    if not result.evaluated:
        return "no test-set numbers: `raytrain evaluate` makes them"
    return "with test-set numbers"
