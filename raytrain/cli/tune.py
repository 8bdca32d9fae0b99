"""The output of `raytrain tune`: one screen while it runs, a plain log elsewhere, a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raytrain.cli.common import evaluate_command, is_terminal, line, number, open_ui, span
from raytrain.cli.trials_table import trials_table
from raytrain.core.console import log_line
from raytrain.core.storage import shown
from raytrain.tracking import tracking_uri
from raytrain.tuning.space.labels import describe

if TYPE_CHECKING:
    from raytrain.commands.tune import TuneResult
    from raytrain.tuning.budget import SweepProgress
    from raytrain.tuning.preview import Preview

_RUNNING = 12  # trials under way on the screen
_MORE = 20  # trials of a continuation that is proposed
_ERRORS = 3  # of different kinds
_IMPORTANT = 6  # parameters
_SECONDS = 0.2  # between two drawings
_SECONDS_BETWEEN_LINES = 30.0  # at most


class Trials:
    """Progress of a sweep: call it after every result, and about once a second in between."""

    def __init__(self) -> None:
        self._live = Live(
            Text("starting Ray and MLflow ..."), console=Console(stderr=True), transient=True
        )
        self._ended = -1
        self._drawn = 0.0

    def __enter__(self) -> Trials:
        if is_terminal():
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, progress: SweepProgress) -> None:
        now = time.monotonic()
        if is_terminal():
            if now - self._drawn >= _SECONDS:
                self._drawn = now
                self._live.update(screen(progress))
        elif progress.finished > self._ended or now - self._drawn >= _SECONDS_BETWEEN_LINES:
            self._ended, self._drawn = progress.finished, now
            log_line(plain(progress))


def plain(progress: SweepProgress) -> str:
    """One line of a log."""
    best = "-" if progress.best is None else f"{progress.best.value:.4f} ({progress.best.handle})"
    return (
        f"trial {_of(progress.finished, progress.budget.trials)}  best {best}  "
        f"{_outcomes(progress)}{_running(progress)}  {_cost(progress)}  {span(progress.seconds)}"
        f"{_left(progress)}"
    )


def _running(progress: SweepProgress) -> str:
    if not progress.running:
        return ""
    done = sum(one.progress for one in progress.running) / len(progress.running)
    epochs = [one.epoch for one in progress.running]
    first, last = min(epochs), max(epochs)
    where = f"epoch {last}" if first == last else f"epochs {first} to {last}"
    return f"  {len(progress.running)} running ({where}, {done:.1%} of training)"


def screen(progress: SweepProgress) -> Group:
    """All that matters, on one screen."""
    head = Text.assemble(
        (f"{_of(progress.finished, progress.budget.trials)} trials", "bold"),
        f"   {_outcomes(progress)}   {_cost(progress)}   {span(progress.seconds)}{_left(progress)}",
    )
    rows = [head]
    if progress.best is not None:
        best = progress.best
        said = f"{best.value:.4f}  {best.handle}  {describe(best.params, '  ')}"
        rows.append(Text.assemble(("best  ", "bold"), said, overflow="ellipsis", no_wrap=True))
    table = Table.grid(padding=(0, 2))
    for one in progress.running[:_RUNNING]:
        value = "" if one.value is None else f"{one.value:.4f}"
        bar = ProgressBar(total=1.0, completed=one.progress, width=20)
        params = Text(describe(one.params, "  "), no_wrap=True)
        table.add_row(f"t{one.number:04d}", bar, f"epoch {one.epoch}", value, params)
    more = len(progress.running) - _RUNNING
    tail = [Text(f"and {more} more", style="dim")] if more > 0 else []
    return Group(*rows, table, *tail)


def tune_summary(result: TuneResult) -> Callable[[], None]:
    """The end of `raytrain tune`: the best trials, what mattered, and where to look next."""

    def show() -> None:
        console = Console()
        console.print(trials_table(result, console.width))
        _say_errors(console, result)
        _say_best(console, result)
        _say_importances(console, result)
        _say_finals(console, result)
        if result.warning is not None:
            line(console, "warning", result.warning)
        line(console, "all rows", shown(result.table))
        line(console, "figures", shown(result.folder / "figures"))
        _say_next(console, result)

    return show


def preview(space: Preview) -> Callable[[], None]:
    """`raytrain tune --dry-run`: the space, some of its configurations, and what they would cost."""

    def show() -> None:
        console = Console()
        table = Table(title=f"space {space.name}", title_justify="left")
        for column in ("path", "range", "when"):
            table.add_column(column, overflow="fold")
        for row in space.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for text in space.constraints:
            line(console, "constraint", text)
        samples = Table(title="samples", title_justify="left")
        samples.add_column("FE per image", justify="right")
        samples.add_column("configuration")
        for values, price in space.samples:
            samples.add_row(number(price), Text(describe(values, "  ")))
        console.print(samples)
        for label, text in space.words().items():
            line(console, label, text)

    return show


def _say_errors(console: Console, result: TuneResult) -> None:
    """What went wrong, each kind once."""
    said: dict[str, list[str]] = {}
    for row in result.trials:
        if row.error is not None and row.state in ("diverged", "failed"):
            said.setdefault(row.error, []).append(row.handle)
    for error, handles in list(said.items())[:_ERRORS]:
        more = f" and {len(handles) - 1} more" if len(handles) > 1 else ""
        line(console, "failed", f"{handles[0]}{more}: {error}")


def _say_best(console: Console, result: TuneResult) -> None:
    if result.best is None:
        console.print("no trial finished")
        return
    if result.front:
        console.print(f"Pareto front: {len(result.front)} trials (*)")
    said = f"{result.best.handle}, {result.objectives[0]} {result.best.value:.4f}"
    line(console, "best", f"{said}: {describe(result.best.params)}".removesuffix(": "))


def _say_next(console: Console, result: TuneResult) -> None:
    """The commands of the next steps, each as a shell takes it."""
    if result.best is not None:
        command = evaluate_command(result.name, result.storage, result.tracking_uri)
        line(console, "test set", command)
        if not result.finals:
            line(console, "new seeds", f"{result.again} --final 3")
        line(console, "retrain", f"raytrain train {quote(str(result.best_file))}")
    where = "" if _is_store_in_use(result) else f" --uri {quote(result.tracking_uri)}"
    line(console, "compare", f"raytrain compare {quote(result.name)}{where}")
    if result.extensible:
        line(console, "more trials", f"{result.again} --trials {result.progress.finished + _MORE}")
    line(console, "MLflow UI", open_ui(result.tracking_uri, result.name, result.page))


def _is_store_in_use(result: TuneResult) -> bool:
    """Whether a command that is given no other store finds the sweep."""
    return result.tracking_uri == tracking_uri(None)


def _say_importances(console: Console, result: TuneResult) -> None:
    """What mattered, with the trials it is based on."""
    from raytrain.tuning.importance import most_telling

    equal = result.importances_at_equal_cost
    found = most_telling(result.importances, equal)
    if not found:
        return
    some = [one for one in found[:_IMPORTANT] if one.value >= 0.005]
    said = "  ".join(f"{one.key} {one.value:.2f}" for one in some)
    base = f"{max(one.trials for one in found)} finished trials"
    if equal is not None and found is equal.importances:
        base = f"{equal.trials} finished and stopped trials at {equal.cost:,.0f} FE per image"
    line(console, "importance", f"{said}  ({base})")


def _say_finals(console: Console, result: TuneResult) -> None:
    if not result.finals:
        return
    seeds, attack = result.finals[0].seeds, result.finals[0].attack
    table = Table(title=f"test set, {seeds} seeds, by rank in validation", title_justify="left")
    for column in ("rank", "trial", f"{attack} ± std", "clean ± std", "FE/sample"):
        table.add_column(column, justify="right")
    for row in result.finals:
        table.add_row(
            str(row.rank),
            f"t{row.trial:04d}",
            f"{100 * row.robust:.2f} ± {100 * row.robust_std:.2f}",
            f"{100 * row.clean:.2f} ± {100 * row.clean_std:.2f}",
            number(row.fe_per_sample),
        )
    console.print(table)


def _outcomes(progress: SweepProgress) -> str:
    counts = [f"{count} {outcome}" for outcome, count in progress.outcomes.items() if count]
    retries = [f"{progress.retries} retried"] if progress.retries else []
    return ", ".join([*counts, *retries]) or "none ended"


def _cost(progress: SweepProgress) -> str:
    budget = progress.budget.fe_per_image
    spent = f"{progress.fe_per_image:,.0f}"
    return f"{spent} FE/image" if budget is None else f"{spent} of {budget:,.0f} FE/image"


def _left(progress: SweepProgress) -> str:
    return "" if progress.seconds_left is None else f", about {span(progress.seconds_left)} left"


def _of(count: int, budget: int | None) -> str:
    return str(count) if budget is None else f"{count}/{budget}"
