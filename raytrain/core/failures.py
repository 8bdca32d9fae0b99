"""What made a training fail: its sentence, its kind, and whether the processes can go on."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch

from raytrain.core.types import Diverged, ModelFailed, RequestError, TrainingFailed, WorkersLost

_PACKAGES = ("site-packages", "dist-packages")
_PYTHON = sysconfig.get_paths()["stdlib"]
_OURS = [str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)]
_OURS.append(f"{_OURS[-1]}vision")
_LONGEST = 300  # characters of a message

_LOST = (
    "CUDA error",
    "cuDNN error",
    "NCCL error",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)
"""In messages of errors after which a process cannot be trusted with more work, or a peer is gone."""

_KINDS = {kind.__name__: kind for kind in (RequestError, Diverged, WorkersLost, TrainingFailed)}


def is_lost(error: BaseException) -> bool:
    """Whether an error is about the processes and not about what they were asked to do."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or any(mark in str(error) for mark in _LOST)


def as_failure(error: Exception) -> RequestError | TrainingFailed:
    """An error of any kind as one of ours: what was raised, and in which line of whose code."""
    if isinstance(error, RequestError | TrainingFailed):
        return error
    return TrainingFailed(str(error) if isinstance(error, ModelFailed) else error_summary(error))


def plain(error: RequestError | TrainingFailed) -> tuple[str, str]:
    """Kind and sentence, to send to another process."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
    return kind, str(error)


def from_plain(kind: str, sentence: str) -> RequestError | TrainingFailed:
    """The error that `plain` was made of."""
    return _KINDS[kind](sentence)


def error_summary(error: BaseException) -> str:
    """The kind of an error, its message in one line, and where it was raised."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # its own __str__ fails
        text = ""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)[:_LONGEST]
    kind = type(error).__name__
    return (f"{kind} ({line})" if line else kind) + _where(error)


def _where(error: BaseException) -> str:
    """` at file:line` of the innermost frame that belongs to the user, if there is one.

    That is code which is not installed; for a network of an installed package, code of a package.
    """
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" at {error.filename}:{error.lineno}"
    found: dict[bool, str] = {}
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        packaged = any(part in _PACKAGES for part in Path(file).parts)
        # Generated code and the import system have names in angle brackets.
        if not (file.startswith(("<", *_OURS)) or (file.startswith(_PYTHON) and not packaged)):
            found[packaged] = f" at {file}:{line}"
    return found.get(False) or found.get(True, "")
