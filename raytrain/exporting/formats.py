"""Which formats there are, and which of them this network and this installation allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.exporting.check import Checked
from raytrain.exporting.onnx import check_packages, write_onnx
from raytrain.exporting.robustbench import namesake, write_robustbench
from raytrain.exporting.safetensors import write_tensors
from raytrain.exporting.subject import Subject

FORMATS: dict[str, Callable[[Subject, Path], Checked]] = {
    "safetensors": write_tensors,
    "robustbench": write_robustbench,
    "onnx": write_onnx,
}


def chosen(wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The formats by name, in the catalogue's order; None means all.

    Raises:
        RequestError: for a name that is none.
    """
    for name in wanted or ():
        if name not in FORMATS:
            raise RequestError(
                f"--format: no format is called {name!r}; expected some of {', '.join(FORMATS)}"
                f"{nearest(name, FORMATS)}"
            )
    if wanted is not None and not wanted:
        raise RequestError(f"--format: expected some of {', '.join(FORMATS)}, found none")
    return tuple(name for name in FORMATS if wanted is None or name in wanted)


def possible(
    subject: Subject, wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The formats to write, and the reasons for the others; formats given by name must be possible.

    Raises:
        RequestError: if it is not.
    """
    skipped: dict[str, str] = {}
    for name in chosen(wanted):
        try:
            _must_be_possible(name, subject)
        except RequestError as error:
            if wanted is not None:
                raise
            skipped[name] = str(error).removeprefix("--format: ")
    return tuple(name for name in chosen(wanted) if name not in skipped), skipped


def _must_be_possible(name: str, subject: Subject) -> None:
    if name == "robustbench":
        namesake(subject)
    if name == "onnx":
        check_packages()
