"""The output of `raytrain evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.cli.common import is_terminal, line, progress_bar
from raytrain.core.console import log_line
from raytrain.core.storage import shown
from raytrain.evaluation.names import attack_title
from raytrain.evaluation.runner import StageProgress
from raytrain.evaluation.settings import CLEAN, NOISE

if TYPE_CHECKING:
    from raytrain.commands.evaluate import EvalResult

_STAGES = {
    NOISE: "random noise (a check)",
    "aa.apgd-ce": "APGD-CE",
    "aa.apgd-t": "APGD-T",
    "aa.fab-t": "FAB-T",
    "aa.square": "Square",
}


def title(stage: str) -> str:
    """The title of a stage or an attack."""
    return _STAGES.get(stage) or attack_title(stage)


class Stages:
    """Progress of an evaluation, called after every work item."""

    def __init__(self) -> None:
        self._bar = progress_bar("{task.description:<24}")
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, now: StageProgress) -> None:
        note = f"{now.left} of {now.evaluated} left"
        if is_terminal():
            if now.stage not in self._tasks:
                self._tasks[now.stage] = self._bar.add_task(
                    title(now.stage), total=now.work_items, note=""
                )
            self._bar.update(self._tasks[now.stage], completed=now.done, note=note)
        elif now.done == now.work_items or now.done % max(1, now.work_items // 10) == 0:
            log_line(f"{title(now.stage)}  {now.done}/{now.work_items}  {note}")


def evaluate_summary(result: EvalResult) -> Callable[[], None]:
    """The end of `raytrain evaluate`."""

    def show() -> None:
        contract = result.contract
        assert contract is not None
        console = Console()
        console.print(_table(result, f"{contract.norm} {contract.eps:g}"))
        if not result.same_contract:
            console.print(Text("another contract than the training's", style="bold yellow"))
        for finding in result.findings:
            if not finding.passed:
                console.print(Text(f"CHECK FAILED  {finding.check}", style="bold red"))
                console.print(f"  {finding.sentence}")
        passed = sum(finding.passed for finding in result.findings)
        if result.findings and passed == len(result.findings):
            line(console, "checks", f"{passed} of {passed} passed")
        elif not result.findings:
            line(console, "checks", "not run: false robustness is not excluded")
        line(console, "contract", f"{contract.text}  ({contract.hash})")
        line(console, "checkpoint", f"{shown(result.file)} (epoch {result.epoch})")
        line(console, "per sample", shown(result.folder / "flags.parquet"))

    return show


def _table(result: EvalResult, threat: str) -> Table:
    table = Table(
        title=f"test set, {result.images} images, {threat}",
        title_justify="left",
    )
    table.add_column("attack")
    table.add_column("accuracy", justify="right")
    table.add_column("95 %", justify="right")
    for name, share in result.accuracies.items():
        mark = "" if result.trusted or name == CLEAN else " (!)"
        limits = f"{share.low:.2%} to {share.high:.2%}"
        table.add_row(title(name), f"{share.value:.2%}{mark}", limits)
    table.caption = f"{result.fe:,} forward-equivalents, {result.seconds:,.0f} s"
    table.caption_justify = "left"
    return table
