"""The output of `raytrain train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from raytrain.cli.common import is_terminal, line, number, open_ui, progress_bar
from raytrain.config.run import RunConfig
from raytrain.core.console import log_line
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.training.profiling import TABLE, TRACE

if TYPE_CHECKING:
    from raytrain.commands.train import TrainResult


_SECONDS_BETWEEN_LINES = 30.0


class Epochs:
    """Progress of one training: call it after every epoch."""

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task: Any = None
        self._line = time.monotonic()  # when the last one was written

    def __enter__(self) -> Epochs:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, run: RunConfig, share: float) -> None:
        """Move the bar within an epoch; where stderr is no terminal, write a line now and then."""
        if is_terminal():
            self._bar.update(self._added(run), completed=100 * share)
        elif time.monotonic() - self._line >= _SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            log_line(f"{share:.0%} of training")

    def __call__(self, run: RunConfig, report: EpochMetrics) -> None:
        note = f"loss {report.loss:.3f}"
        if report.clean is not None and report.robust is not None:
            note += f"  clean {report.clean:.3f}  robust {report.robust:.3f}"
        note += f"  steps {report.inner_steps:.1f}  FOSC {report.fosc:.3f}"
        note += f"  {report.fe / report.samples:.1f} FE/sample"
        if report.images_per_second is not None:
            note += f"  {report.images_per_second:,.0f} images/s"
        if is_terminal():
            self._bar.update(self._added(run), completed=100 * report.progress, note=note)
        else:
            self._line = time.monotonic()
            log_line(f"{_where(run, report)}  {note}")
        if report.stopped_early:
            said = f"stopped early after {_where(run, report)}: {report.stopped_by}"
            self._bar.console.print(said) if is_terminal() else log_line(said)

    def _added(self, run: RunConfig) -> Any:
        """The task of the bar."""
        if self._task is None:
            self._task = self._bar.add_task(run.algorithm.name, total=100, note="")
        return self._task


def _where(run: RunConfig, report: EpochMetrics) -> str:
    if run.fe_per_image is None:
        return f"epoch {report.epoch}/{run.epochs}"
    return f"epoch {report.epoch}, {report.progress:.0%} of {run.fe_per_image:g} FE/image"


def train_summary(result: TrainResult) -> Callable[[], None]:
    """The end of `raytrain train`."""

    def show() -> None:
        table = Table(title=f"{result.name}  ({result.signature})", title_justify="left")
        table.add_column("metric")
        table.add_column("last epoch", justify="right")
        for name, value in result.metrics.items():
            if not name.startswith("fosc_histogram/"):  # for figures
                table.add_row(name, number(value))
        console = Console()
        console.print(table)
        if result.profile is not None:
            console.print(Markdown((result.profile / TABLE).read_text(encoding="utf-8")))
            line(console, "trace", str(result.profile / TRACE))
        line(console, "checkpoints", str(result.checkpoints))
        line(console, "test set", f"raytrain evaluate {result.run_id}")
        line(console, "MLflow UI", open_ui(result.tracking_uri, result.run_id, result.page))

    return show
