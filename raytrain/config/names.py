"""Names that people give: what MLflow takes, and what may become a folder."""

from __future__ import annotations

import os
import unicodedata

from raytrain.core.types import RequestError

RUN_NAME = 250
"""Characters of a run's name that every store of MLflow keeps."""
EXPERIMENT_NAME = 500
"""The same of an experiment."""

_COMPONENT = 255  # bytes of one folder's name, on all common file systems
_TAKEN = ("", ".", "..", ".mlflow")  # the last is where records of trainings wait
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode: control characters, halves of others, ends of lines


def check_text(field: str, text: str) -> None:
    """Refuse what is not one line of text.

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
    """Refuse what MLflow refuses, or keeps only a part of.

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
    """`check_name`, of a name that becomes a folder: slashes make folders inside it.

    Raises:
        RequestError: if that folder would be elsewhere, or cannot be made.
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
