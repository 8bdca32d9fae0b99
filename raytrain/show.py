"""What a person sees: progress on stderr, a live line on a terminal; results on stdout."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raytrain.algorithms import CATALOGUE
from raytrain.config import RunConfig
from raytrain.outer import OUTERS
from raytrain.record import Report
from raytrain.say import say
from raytrain.types import RequestError

if TYPE_CHECKING:
    from raytrain.api import EvalResult, TrainResult
    from raytrain.sweep import SweepProgress, TuneResult


_KINDS = {**CATALOGUE, **OUTERS}


class Epochs:
    """Progress of one training: call it after every epoch."""

    def __init__(self) -> None:
        self._bar = _bar("%")
        self._task: Any = None

    def __enter__(self) -> Epochs:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, run: RunConfig, report: Report) -> None:
        line = f"loss {report.loss:.3f}"
        if report.clean is not None and report.robust is not None:
            line += f"  clean {report.clean:.3f}  robust {report.robust:.3f}"
        line += f"  steps {report.inner_steps:.1f}  FOSC {report.fosc:.3f}"
        line += f"  {report.fe / report.samples:.1f} FE/sample"
        if _is_terminal():
            if self._task is None:
                self._task = self._bar.add_task(run.algorithm.name, total=100, note="")
            self._bar.update(self._task, completed=round(100 * report.progress), note=line)
        else:
            say(f"{_where(run, report)}  {line}")
        if report.stopped_early:
            waited = 0 if run.early_stop is None else run.early_stop.patience
            said = (
                f"stopped early after {_where(run, report)}: {waited} validations without a gain"
            )
            self._bar.console.print(said) if _is_terminal() else say(said)


class Trials:
    """Progress of a sweep: call it after every result."""

    def __init__(self) -> None:
        self._bar = _bar("trials")
        self._task: Any = None
        self._said = 0
        self._began = time.monotonic()

    def __enter__(self) -> Trials:
        self._bar.start()
        if _is_terminal():
            self._task = self._bar.add_task("trials", total=None, note="starting Ray and MLflow")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: SweepProgress) -> None:
        best = (
            "-" if progress.best is None else f"{progress.best:.4f} (trial {progress.best_trial})"
        )
        line = f"best {best}  stopped early {progress.pruned}  failed {progress.failed}"
        if _is_terminal():
            self._bar.update(
                self._task, total=progress.budget, completed=progress.finished, note=line
            )
        elif progress.finished > self._said:
            self._said = progress.finished
            seconds = time.monotonic() - self._began
            say(f"trial {progress.finished}/{progress.budget}  {line}  {seconds:.0f} s")


def _where(run: RunConfig, report: Report) -> str:
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
                table.add_row(name, _number(value))
        console = Console()
        console.print(table)
        console.print(f"checkpoints  {result.checkpoints}", soft_wrap=True, highlight=False)
        console.print(f"test set     raytrain evaluate {result.run_id}", highlight=False)
        console.print(_open_ui(result.tracking_uri), soft_wrap=True, highlight=False)

    return show


def tune_summary(result: TuneResult) -> Callable[[], None]:
    """The end of `raytrain tune`: every trial, the best one, and where to look next."""

    def show() -> None:
        console = Console()
        console.print(_trials_table(result))
        if result.best is None:
            console.print("no trial finished")
        else:
            console.print(
                f"best: trial {result.best.number}, {result.metric} {result.best.value:.4f}"
            )
            for path, value in result.best.params.items():
                console.print(f"  {path} = {_number(value)}", highlight=False)
            again = f"raytrain train {result.best_file}"
            console.print(f"train it    {again}", soft_wrap=True, highlight=False)
            console.print(f"test set    raytrain evaluate {result.best.run_id}", highlight=False)
        again = f"raytrain tune {result.space_file} --resume {result.name}"
        console.print(f"continue    {again}", soft_wrap=True, highlight=False)
        console.print(_open_ui(result.tracking_uri), soft_wrap=True, highlight=False)

    return show


def evaluate_summary(result: EvalResult) -> Callable[[], None]:
    """The end of `raytrain evaluate`."""

    def show() -> None:
        report = result.report
        table = Table(title=f"test set, {report.images} images, {result.threat}")
        for column in ("clean", report.attack):
            table.add_column(column, justify="right")
        table.add_row(f"{report.clean:.2%}", f"{report.robust:.2%}")
        console = Console()
        console.print(table)
        console.print(f"checkpoint  {result.checkpoint}", soft_wrap=True, highlight=False)
        console.print(f"per sample  {result.flags}", soft_wrap=True, highlight=False)

    return show


def catalogue() -> Callable[[], None]:
    """All algorithms and outer updates, a line each."""

    def show() -> None:
        for title, kinds in (("algorithm.name", CATALOGUE), ("outer.name", OUTERS)):
            table = Table(title=title, title_justify="left")
            for column in ("name", "rule", "cost per image"):
                table.add_column(column)
            for name, kind in kinds.items():
                table.add_row(name, escape(kind.card.rule), escape(kind.card.cost))
            Console().print(table)

    return show


def catalogue_json() -> dict[str, Any]:
    """The same for scripts."""
    return {name: algorithm_json(name) for name in _KINDS}


def algorithm(name: str) -> Callable[[], None]:
    """One algorithm: paper, rule, cost, hyperparameters and the ranges to search."""
    told = algorithm_json(name)

    def show() -> None:
        console = Console()
        for key in ("name", "paper", "rule", "cost", "memory", "norms"):
            value = ", ".join(told[key]) if isinstance(told[key], list) else told[key]
            console.print(f"[bold]{key:8}[/bold] {escape(value)}", highlight=False)
        table = Table()
        for column in ("hyperparameter", "default", "range to search", "meaning"):
            table.add_column(column)
        for row in told["hyperparameters"]:
            table.add_row(*(escape(str(row[k])) for k in ("name", "default", "range", "meaning")))
        console.print(table)
        console.print(_paragraph(_KINDS[name]), markup=False, highlight=False)

    return show


def algorithm_json(name: str) -> dict[str, Any]:
    """The same for scripts.

    Raises:
        RequestError: if there is no such algorithm.
    """
    if name not in _KINDS:
        raise RequestError(f"{name}: expected one of {', '.join(_KINDS)}")
    recipe = _KINDS[name]
    card = recipe.card
    rows = []
    for field, info in recipe.model_fields.items():
        if field == "name":
            continue
        default = "required" if info.is_required() else _default(info.default)
        rows.append(
            {
                "name": field,
                "default": default,
                "range": card.ranges.get(field, ""),
                "meaning": info.description or "",
            }
        )
    deeper = [path for path in card.ranges if "." in path]
    rows += [
        {"name": path, "default": "", "range": card.ranges[path], "meaning": ""} for path in deeper
    ]
    return {
        "name": name,
        "paper": card.paper,
        "rule": card.rule,
        "cost": card.cost,
        "memory": card.memory,
        "norms": list(card.norms),
        "hyperparameters": rows,
    }


def _default(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return ", ".join(f"{v}" if k in {"kind", "name"} else f"{k}={v}" for k, v in value)
    return str(value)


def _paragraph(recipe: type) -> str:
    """Its docstring, each paragraph and each list item on one line for the terminal to wrap."""
    text = "\n".join(line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).replace("**", "")


def _trials_table(result: TuneResult) -> Table:
    table = Table(title=f"sweep {result.name}", title_justify="left", min_width=72)
    for column in ("trial", "state", result.metric, "clean", "epochs", "FE/sample", "seconds"):
        table.add_column(column, justify="left" if column == "state" else "right")
    ranked = sorted(
        result.trials, key=lambda t: (t.value is None, -(t.value or 0.0) * result.direction)
    )
    for trial in ranked:
        best = result.best is not None and trial.number == result.best.number
        table.add_row(
            f"{trial.number}{' *' if best else ''}",
            trial.state,
            "-" if trial.value is None else f"{trial.value:.4f}",
            _number(trial.metrics.get("valid/clean")),
            str(trial.epochs),
            _number(trial.metrics.get("cost/fe_per_sample")),
            _number(trial.metrics.get("cost/seconds")),
            style="bold" if best else None,
        )
    return table


def _open_ui(uri: str) -> str:
    return f"MLflow UI   raytrain ui{'' if uri.endswith('/mlflow.db') else f' --uri {uri}'}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not _is_terminal(),
    )


def _is_terminal() -> bool:
    return sys.stderr.isatty()
