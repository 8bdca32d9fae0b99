"""The output of `raytrain train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from raytrain.cli.common import (
    evaluate_command,
    is_terminal,
    line,
    number,
    open_ui,
    progress_bar,
    size,
    span,
)
from raytrain.config.run import RunConfig
from raytrain.core.console import log_line
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import without_secrets
from raytrain.core.storage import shown
from raytrain.training.profiling import TABLE, TRACE
from raytrain.training.progress import StepProgress
from raytrain.training.run_folder import short_id

if TYPE_CHECKING:
    from raytrain.commands.train import TrainResult
    from raytrain.config.field_list import RunField
    from raytrain.training.preview import RunPreview


_SECONDS_BETWEEN_LINES = 30.0
_GROUND = 0.02  # share of training from which its speed gives the time left


class Epochs:
    """Progress of one training: a bar and a line per epoch on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task: Any = None
        self._line = time.monotonic()  # when the last one was written
        self._speed = _Speed()

    def __enter__(self) -> Epochs:
        if is_terminal():
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, note="reading data")
        return self

    def start(self, run: RunConfig, run_id: str, num_images: int) -> None:
        """Write what is trained, and what a star means in the lines of epochs."""
        images = f"{num_images:,} images of {without_secrets(run.data.name)}"
        said = f"{run.algorithm.name} on {images}, run {short_id(run_id)}"
        self._say(f"training: {said}; * highest robust accuracy so far")

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, run: RunConfig, done: StepProgress) -> None:
        """Show where training is within an epoch; where stderr is no terminal, now and then."""
        rate = self._speed.at(done.step * run.batch_size)
        left = self._speed.seconds_left(done.share)
        note = f"epoch {done.epoch}" if run.fe_per_image else f"epoch {done.epoch}/{run.epochs}"
        note += "" if done.loss is None else f"  loss {done.loss:.3f}"
        note += "" if rate is None else f"  {rate:,.0f} images/s"
        if is_terminal():
            self._update(run, done.share, note)
        elif time.monotonic() - self._line >= _SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            about = "" if left is None else f"  about {span(left)} left"
            log_line(f"{note}  {done.share:.0%} of training{about}")

    def __call__(self, run: RunConfig, report: EpochMetrics) -> None:
        note = f"loss {report.loss:.3f}"
        if report.clean is not None and report.robust is not None:
            note += f"  clean {report.clean:.3f}  robust {report.robust:.3f}"
        note += f"  steps {report.inner_steps:.1f}  FOSC {report.fosc:.3f}"
        note += f"  {report.fe / report.samples:.1f} FE/sample"
        if report.images_per_second is not None:
            note += f"  {report.images_per_second:,.0f} images/s"
        self._line = time.monotonic()
        self._say(f"{_where(run, report)}{' *' if report.improved else '  '}  {note}")
        if is_terminal():
            self._update(run, report.progress, "" if report.final else "starting the next epoch")
        if report.stopped_early:
            self._say(f"stopped early after {_where(run, report)}: {report.stopped_by}")
        self._speed.pause()

    def _say(self, text: str) -> None:
        """Write a line that stays."""
        if is_terminal():
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            log_line(text)

    def _update(self, run: RunConfig, share: float, note: str) -> None:
        completed = 100 * share
        self._bar.update(
            self._task, description=run.algorithm.name, total=100, completed=completed, note=note
        )


class _Speed:
    """Images per second since the epoch began, and time left from two percent of training on."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None  # of the epoch: time, images
        self._first: tuple[float, float] | None = None  # of the training: time, share

    def at(self, samples: int) -> float | None:
        """Images per second, from the second step of the epoch on."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, samples
            return None
        seconds = now - self._began[0]
        return (samples - self._began[1]) / seconds if seconds > 0 else None

    def pause(self) -> None:
        """Leave out what happens until the next step: a validation."""
        self._began = None

    def seconds_left(self, share: float) -> float | None:
        """Seconds that are left at the speed since this was first called."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, share
        began, before = self._first
        if share - before < _GROUND:
            return None
        return (now - began) * (1 - share) / (share - before)


def _where(run: RunConfig, report: EpochMetrics) -> str:
    if run.fe_per_image is None:
        return f"epoch {report.epoch}/{run.epochs}"
    return f"epoch {report.epoch}, {report.progress:.0%} of {run.fe_per_image:g} FE/image"


def check_dry(profile: bool) -> None:
    """Refuse to profile what is not trained.

    Raises:
        RequestError: naming the option.
    """
    if profile:
        raise RequestError("--profile: --dry-run trains nothing; expected one of them")


def preview(run: RunPreview) -> Callable[[], None]:
    """`raytrain train --dry-run`: the configuration, what differs from the defaults marked, and its cost."""

    def show() -> None:
        console = Console()
        table = Table(title=f"run {run.run.signature()}", title_justify="left")
        for column in ("", "field", "value", "default"):
            table.add_column(column, overflow="fold")
        for field in run.fields:
            own = field.value != {} and not (field.record and isinstance(field.value, dict))
            if field.there and not field.selects and own:
                table.add_row(*map(Text, _cells(field)), style="bold" if field.changed else None)
        console.print(table)
        for label, text in _preview_lines(run).items():
            line(console, label, text)

    return show


def _cells(field: RunField) -> tuple[str, str, str, str]:
    """Mark, path, value, and the default of what is marked."""
    mark = "*" if field.changed else ""
    default = field.shown(field.default) if field.changed and not field.required else ""
    return mark, field.path, field.shown(field.value), default


def _preview_lines(run: RunPreview) -> dict[str, str]:
    config, most, about = run.run, "at most " if run.bound else "", "about " * _by_cost(run.run)
    steps = run.epochs * run.steps_per_epoch
    lines = {
        "data": f"{run.images:,} training images, {run.validation_images:,} for validation",
        "steps": f"{run.steps_per_epoch:,} of {config.batch_size} images per epoch, "
        f"{about}{run.epochs} epochs, {about}{steps:,} in all",
        "cost": f"{most}{run.fe_per_image:,.0f} FE per image, {number(run.fe)} FE in all",
        "validation": "AutoAttack's, not counted",
        "memory": _memory(run),
        "execution": str(run.execution),
        "time": _time(run),
    }
    if config.data.extra is not None:
        share = config.data.extra.per_batch(config.batch_size)
        lines["data"] += (
            f", {run.additional_images:,} additional images: {share} of the "
            f"{config.batch_size} of a batch"
        )
    if run.resumed_after:
        lines = {"resumes": f"after {run.resumed_after} epochs, of the whole run:", **lines}
    if run.flops is not None:
        lines["cost"] += (
            f", {run.flops:.2g} floating-point operations in matrix products and convolutions"
        )
    if run.validation_fe is not None:
        lines["validation"] = f"at most {number(run.validation_fe)} FE beside these"
    return lines


def _by_cost(run: RunConfig) -> bool:
    return run.fe_per_image is not None


def _memory(run: RunPreview) -> str:
    named = [f"{name} {size(amount)}" for name, amount in run.memory.items() if amount]
    kept = [f"{name} {size(amount)}" for name, amount in run.algorithm_memory.items() if amount]
    each = f" (images and state of the algorithm over {run.run.workers} workers)"
    return (
        f"{', '.join(named)}; state of the algorithm: {', '.join(kept) or 'none'}"
        f"{each if run.run.workers > 1 else ''}; activations and libraries come on top"
    )


def _time(run: RunPreview) -> str:
    if run.measured is None or run.seconds is None:
        return "not estimated: steps are measured only where this process trains"
    said = f"{'at most ' if run.bound else 'about '}{span(run.seconds)} ({run.measured}, "
    said += "validation at the same rate" if run.validation_fe is not None else "no validation"
    compiled = ", steps not compiled" if run.execution.mode == "compile" else ""
    return f"{said}{compiled})"


def _evaluate(result: TrainResult) -> str:
    """The command that evaluates it: by the beginning of its id; by its folder where that was moved."""
    is_moved = result.checkpoints.name != result.run_id
    name = str(result.checkpoints) if is_moved else short_id(result.run_id)
    return evaluate_command(name, result.storage, result.tracking_uri)


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
        line(console, "checkpoints", shown(result.checkpoints))
        line(console, "test set", _evaluate(result))
        line(
            console,
            "MLflow UI",
            open_ui(result.tracking_uri, short_id(result.run_id), result.page),
        )

    return show
