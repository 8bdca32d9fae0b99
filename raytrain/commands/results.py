"""Results of commands: how they are shown, and how later commands take them in place of a word."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Protocol


class ShownResult:
    """A result whose representation is its name and its main numbers, a line each; a table in notebooks."""

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, and a text by label."""
        raise NotImplementedError

    def __repr__(self) -> str:
        name, rows = self.summary()
        width = max(map(len, rows), default=0)
        lines = (f"  {label:{width}}  {text}" for label, text in rows.items())
        return "\n".join([f"{type(self).__name__} {name}", *lines])

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        name, rows = self.summary()
        cells = (
            f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>"
            for label, text in rows.items()
        )
        caption = f"<caption>{type(self).__name__} {escape(name)}</caption>"
        return f"<table>{caption}{''.join(cells)}</table>"


class Result(Protocol):
    """A result of `train`, `tune` or `evaluate`, which other commands take in place of a word."""

    @property
    def weights(self) -> Path:
        """The checkpoint, or the folder of a run's checkpoints; of a sweep, of its best trial's."""
        ...

    @property
    def recorded(self) -> str:
        """The id of its run, or the name of its sweep."""
        ...

    @property
    def tracking_uri(self) -> str | None:
        """The store that has it."""
        ...


def word_of(run: Result | str | Path) -> str:
    """What `run_of` takes for a run.

    Raises:
        RequestError: if it is a sweep without a best trial.
    """
    return str(run if isinstance(run, str | Path) else run.weights)
