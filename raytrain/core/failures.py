"""Errors that end a training: message, kind, and whether the processes are still usable."""

from __future__ import annotations

import sysconfig
import traceback
from importlib.util import find_spec
from pathlib import Path

from raytrain.core.errors import Diverged, ModelFailed, RequestError, TrainingFailed, WorkersLost

_PACKAGES = ("site-packages", "dist-packages")
_PYTHON = sysconfig.get_paths()["stdlib"]
_TORCH = find_spec("torch")  # not imported for it
assert _TORCH is not None and _TORCH.origin is not None
_OURS = [str(Path(__file__).parents[1]), str(Path(_TORCH.origin).parent)]
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
"""Parts of the messages of errors after which the process, or a peer of it, is unusable."""

_KINDS = {kind.__name__: kind for kind in (RequestError, Diverged, WorkersLost, TrainingFailed)}


def is_lost(error: BaseException) -> bool:
    """Whether an error is caused by the processes or devices and not by the configuration."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or any(mark in str(error) for mark in _LOST)


def as_failure(error: Exception) -> RequestError | TrainingFailed:
    """Convert any error to a RequestError or TrainingFailed with its kind, message, file and line."""
    if isinstance(error, RequestError | TrainingFailed):
        return error
    return TrainingFailed(str(error) if isinstance(error, ModelFailed) else error_summary(error))


def kind_and_message(error: RequestError | TrainingFailed) -> tuple[str, str]:
    """Return kind and message, to send to another process."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
    return kind, str(error)


def from_kind_and_message(kind: str, sentence: str) -> RequestError | TrainingFailed:
    """Rebuild the error from the result of `kind_and_message`."""
    return _KINDS[kind](sentence)


def error_summary(error: BaseException) -> str:
    """Return the kind of an error, its message in one line, and where it was raised."""
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

    User code is code outside site-packages or, if no frame is, code of an installed package.
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
