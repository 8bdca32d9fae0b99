"""What every command's output shares: numbers, tables, and whether somebody is looking."""

from __future__ import annotations

import sys
from shlex import quote
from typing import Any

from rich.console import Console

from raytrain.tracking import tracking_uri


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


def line(console: Console, label: str, text: str) -> None:
    """A labelled line that is never broken, so that it can be copied."""
    console.print(f"{label:<11} {text}", soft_wrap=True, highlight=False, markup=False)


def open_ui(uri: str) -> str:
    """The command that shows what was recorded, as a shell takes it."""
    return "raytrain ui" if uri == tracking_uri(None) else f"raytrain ui --uri {quote(uri)}"


def is_terminal() -> bool:
    """Whether progress is watched, and may be redrawn."""
    return sys.stderr.isatty()
