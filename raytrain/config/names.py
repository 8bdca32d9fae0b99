"""Validation of run and experiment names: for MLflow, and as names of folders."""

from __future__ import annotations

import os
import unicodedata

from raytrain.core.errors import RequestError

STORAGE, EXPERIMENT = "runs", "raytrain"
"""The defaults of `storage` and `experiment`."""
RUN_NAME = 250
"""Longest name of a run, in characters, in every store of MLflow."""
EXPERIMENT_NAME = 500
"""Longest name of an experiment."""

_COMPONENT = 255  # bytes of one folder's name, on all common file systems
_TAKEN = ("", ".", "..", ".mlflow")  # the last is the outbox
_CONTROL = (
    "Cc",
    "Cs",
    "Zl",
    "Zp",
)  # Unicode: control characters, surrogates, line and paragraph separators


def check_text(field: str, text: str) -> None:
    """Raise if `text` is not one line of text.

    Raises:
        RequestError: if it has a control character or a byte that is no UTF-8.
    """
    for character in text:
        if unicodedata.category(character) in _CONTROL:
            raise RequestError(
                f"{field}: found the character {ascii(character)} in {_short(text)}; expected one "
                "line of printable text"
            )


def check_name(field: str, name: str, longest: int) -> None:
    """Raise if MLflow refuses or truncates the name.

    Raises:
        RequestError: if it is blank, longer than this many characters, or not one line of text.
    """
    if not name.strip():
        raise RequestError(f"{field}: found {name!r}; expected a name")
    if len(name) > longest:
        raise RequestError(
            f"{field}: found a name of {len(name)} characters; expected at most {longest}"
        )
    check_text(field, name)


def check_folder_name(field: str, name: str, longest: int) -> None:
    """Apply `check_name` to the name of a folder, in which slashes separate nested folders.

    Raises:
        RequestError: if that folder would be outside the storage, or cannot be created.
    """
    check_name(field, name, longest)
    for part in name.split("/"):
        if part.strip() in _TAKEN:
            raise RequestError(
                f"{field}: {_short(name)} is no name for a folder of its own; expected one without a "
                "slash at its ends, and without '.', '..', '.mlflow' or nothing between slashes"
            )
        if len(os.fsencode(part)) > _COMPONENT:
            raise RequestError(
                f"{field}: {_short(part)} has {len(os.fsencode(part))} bytes; expected at most "
                f"{_COMPONENT}, since it names a folder"
            )


def _short(text: str) -> str:
    shown = ascii(text) if not text.isprintable() else repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
