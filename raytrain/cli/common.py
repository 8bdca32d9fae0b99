"""Parts of every command's output: numbers, lines, progress bars."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import join, quote
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from raytrain.config.names import STORAGE
from raytrain.tracking import tracking_uri
from raytrain.training.run_folder import option

RUNS = Path(STORAGE)
"""Where commands look for checkpoints by default."""


def number(value: Any) -> str:
    """Four digits; whole numbers in full, thousands grouped."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def span(seconds: float | None) -> str:
    """A length of time: `2:05`, `3:10:00`; a dash for an unknown one."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """A number of bytes: `614 MB`, in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def line(console: Console, label: str, text: str) -> None:
    """A labelled line that is never broken, so that it can be copied."""
    console.print(f"{label:<11} {text}", soft_wrap=True, highlight=False, markup=False)


def is_server(uri: str) -> bool:
    """Whether a store is an MLflow server, which has a UI of its own."""
    return uri.startswith(("http:", "https:"))


def full_link(server: str, page: str) -> str:
    """The address of a page of the MLflow UI."""
    return f"{server.rstrip('/')}/{page}"


def evaluate_command(run: str, storage: str, uri: str) -> str:
    """The command that evaluates a run or a sweep of these places, as a shell takes it."""
    elsewhere = "" if uri == tracking_uri(None) else f" {quote(f'tracking_uri={uri}')}"
    return f"raytrain evaluate {quote(run)}{option(storage)}{elsewhere}"


def open_ui(uri: str, name: str, page: str) -> str:
    """What shows a run or a sweep: the link of a server, else the command, as a shell takes it."""
    if is_server(uri):
        return full_link(uri, page)
    words = ["raytrain", "ui", name]
    return join(words if uri == tracking_uri(None) else [*words, "--uri", uri])


def progress_bar(description: str = "{task.description}") -> Progress:
    """A bar on stderr for tasks with a field `note`; hidden where stderr is no terminal."""
    return Progress(
        TextColumn(description),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not is_terminal(),
    )


def is_terminal() -> bool:
    """Whether stderr is a terminal, on which progress may be redrawn."""
    return sys.stderr.isatty()
