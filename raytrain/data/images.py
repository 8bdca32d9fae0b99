"""One split of a data set, whole, in memory; and where in a file an error was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Int64, UInt8
from torch import Tensor

from raytrain.types import RequestError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """Pixels 0..255, one label per image, and what the labels are called."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Location:
    """Where in a file: `row` counts from 0 within the file."""

    file: Path
    column: str
    row: int = 0

    def error(self, sentence: str, row: int | None = None) -> RequestError:
        """The error a user meets; `row` is counted from this location."""
        where = f"{self.file}: column '{self.column}'"
        if row is not None:
            where += f", row {self.row + row}"
        return RequestError(f"{where}: {sentence}")
