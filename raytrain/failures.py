"""What made a training fail: its sentence, its kind, and whether the processes can go on."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from raytrain.types import Diverged, RequestError, TrainingFailed, WorkersLost

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
    first = (str(error).splitlines() or [""])[0]
    return TrainingFailed(f"{type(error).__name__} in {_where(error)}: {first}")


def plain(error: RequestError | TrainingFailed) -> tuple[str, str]:
    """Kind and sentence, to send to another process."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
    return kind, str(error)


def from_plain(kind: str, sentence: str) -> RequestError | TrainingFailed:
    """The error that `plain` was made of."""
    return _KINDS[kind](sentence)


def _where(error: Exception) -> str:
    """File and line of the innermost code that is no installed library's."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = sysconfig.get_paths()["purelib"]
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"
