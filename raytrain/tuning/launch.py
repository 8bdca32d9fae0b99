"""The last launch of a sweep, in its study: where its driver runs, since when, and how it ended."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import optuna

from raytrain.core.errors import RequestError
from raytrain.core.signals import deferred

SILENT = 180.0  # seconds after which a driver elsewhere may be taken for dead
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


def check_not_at_work(study: optuna.Study) -> None:
    """Check that no driver on another machine works on a sweep; on this one its outbox is locked.

    A driver that was killed counts as at work until it has recorded nothing for three minutes.

    Raises:
        RequestError: naming the machine.
    """
    launch = Launch.of(study)
    if launch is None or launch.ended is not None or launch.host == socket.gethostname():
        return
    rows = [trial.user_attrs.get("last", {}) for trial in study.get_trials(deepcopy=False)]
    last = max([launch.began, *(row["time"] for row in rows if row.get("time"))])
    if (seconds := time.time() - last) < SILENT:
        raise RequestError(
            f"--resume: {study.study_name} was at work on {launch.host} {seconds:.0f} s ago; expected a "
            f"sweep that has ended, or whose driver has recorded nothing for {SILENT:.0f} s"
        )


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
