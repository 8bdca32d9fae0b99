"""The last launch of a sweep, in its study: where its driver runs, since when, and how it ended."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import optuna

from raytrain.core.signals import deferred

_KEY = "launch"  # user attribute of the study


@dataclass(frozen=True)
class Launch:
    """A driver's work on a sweep."""

    host: str
    began: float  # seconds since 1970
    used: float = 0.0  # share of the budget that earlier launches had used
    ended: float | None = None  # None as long as it lasts, and if its driver was killed
    how: Literal["finished", "interrupted"] | None = None

    @classmethod
    def of(cls, study: optuna.Study) -> Launch | None:
        """The last launch of a study; None if it records none."""
        stored = study.user_attrs.get(_KEY)
        return None if stored is None else cls(**stored)


@contextmanager
def launched(study: optuna.Study, used: float) -> Iterator[None]:
    """Record in the study that a driver works on it within the block, and how that ended."""
    launch = Launch(socket.gethostname(), time.time(), used)
    study.set_user_attr(_KEY, asdict(launch))
    how = "interrupted"
    try:
        yield
        how = "finished"
    finally:
        with deferred():
            study.set_user_attr(_KEY, asdict(replace(launch, ended=time.time(), how=how)))
