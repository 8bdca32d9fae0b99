"""The last launch of a sweep, in its study: where its driver runs, since when, and how it ended."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import optuna

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.signals import deferred

SILENT = 180.0  # seconds after which a driver elsewhere may be taken for dead
_BEAT = 60.0  # seconds between two records that a driver works
_LOOK = 5.0  # seconds between two looks at them
_KEY = "launch"  # user attribute of the study


@dataclass(frozen=True)
class Launch:
    """A driver's work on a sweep."""

    host: str
    began: float  # seconds since 1970
    used: float = 0.0  # share of the budget that earlier launches had used
    ended: float | None = None  # None as long as it lasts, and if its driver was killed
    how: Literal["finished", "interrupted"] | None = None
    seen: float | None = None  # when its driver last recorded that it works

    @property
    def latest(self) -> float:
        """When its driver last recorded anything of itself."""
        return self.began if self.seen is None else self.seen

    @classmethod
    def of(cls, study: optuna.Study) -> Launch | None:
        """The last launch of a study; None if it records none."""
        stored = study.user_attrs.get(_KEY)
        return None if stored is None else cls(**stored)


def wait_until_free(find: Callable[[], optuna.Study | None], patient: bool) -> None:
    """Check that no driver on another machine works on a sweep; on this one its outbox is locked.

    A driver records every minute that it works. One that was killed counts as at work until it has been
    silent for `SILENT` seconds, which is waited for if `patient`. `find` reads the study.

    Raises:
        RequestError: naming the machine, if it is at work and not waited for.
    """
    is_first = True
    while (launch := _at_work(find())) is not None:
        if not patient:
            raise RequestError(
                f"--resume: this sweep was at work on {launch.host} {time.time() - launch.latest:.0f} s ago; "
                f"expected one that has ended, or whose driver has been silent for {SILENT:.0f} s"
            )
        if is_first:
            log_line(
                f"raytrain: this sweep is at work on {launch.host}; waiting until that has ended, or has "
                f"been silent for {SILENT:.0f} s"
            )
        is_first = False
        time.sleep(_LOOK)


def _at_work(study: optuna.Study | None) -> Launch | None:
    """The launch of a driver on another machine that is not known to have ended."""
    launch = None if study is None else Launch.of(study)
    if launch is None or launch.ended is not None or launch.host == socket.gethostname():
        return None
    return launch if time.time() - launch.latest < SILENT else None


@contextmanager
def launched(study: optuna.Study, used: float) -> Iterator[None]:
    """Record in the study that a driver works on it within the block, and how that ended."""
    launch = Launch(socket.gethostname(), time.time(), used)
    study.set_user_attr(_KEY, asdict(launch))
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(study, launch, over), name="launch", daemon=True)
    beat.start()
    how = "interrupted"
    try:
        yield
        how = "finished"
    finally:
        with deferred():
            over.set()
            beat.join()
            study.set_user_attr(_KEY, asdict(replace(launch, ended=time.time(), how=how)))


def _beat(study: optuna.Study, launch: Launch, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        with suppress(Exception):  # of any database that does not answer: the next one may succeed
            study.set_user_attr(_KEY, asdict(replace(launch, seen=time.time())))
