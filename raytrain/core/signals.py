"""Handling of SIGINT, SIGTERM and SIGHUP: a command records what is finished and exits with status 130.

The first signal raises KeyboardInterrupt inside `interruptible` blocks and ends the process elsewhere;
a second signal always ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_STATUS = 130

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FORWARDED = 0.3  # seconds in which `timeout`, `uv run` or a terminal may deliver one signal twice


class _Interrupt:
    """The handler of all three signals, and its state."""

    installed = False
    received = False
    working = 0  # how many `interruptible` blocks the main thread is in
    deferred = 0  # how many `deferred` blocks
    status: int | None = None  # of a command that is over

    def __call__(self, number: int = 0, frame: Any = None) -> None:
        del number, frame
        if self.status is not None:
            os._exit(self.status)
        if self.received:
            return  # a second one is handled by the watching thread
        self.received = True
        if not self.working:
            _exit("interrupted; what had finished is recorded")
        if not self.deferred:
            raise KeyboardInterrupt


_interrupt = _Interrupt()


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals within the block; in another thread than the main one, do nothing.

    A signal that is ignored (`nohup`, a shell's background jobs) stays ignored.
    """
    if _interrupt.installed or not _is_main():
        yield
        return
    ours = [each for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, _interrupt) for each in ours}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _interrupt.installed, _interrupt.received = True, False
    try:
        yield
    finally:
        if _interrupt.status is None:
            _interrupt.installed = False
            signal.set_wakeup_fd(descriptor)
            for each, handler in before.items():
                signal.signal(each, handler)
            os.close(writer)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at a first signal within the block, for work that writes records."""
    with handled():
        raise_if_interrupted()
        main = _is_main()
        _interrupt.working += main
        try:
            yield
        finally:
            _interrupt.working -= main


class Interrupted(KeyboardInterrupt):
    """A signal ended a command that `command` continues, as a shell takes it."""

    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command


@contextmanager
def continued_by() -> Iterator[Callable[[str], None]]:
    """Raise Interrupted where a signal ends the block, once the command that continues it was given."""
    known: list[str] = []
    try:
        yield known.append
    except BaseException as error:
        if known and (isinstance(error, KeyboardInterrupt) or interrupted()):
            raise Interrupted(known[-1]) from error
        raise


@contextmanager
def deferred() -> Iterator[None]:
    """Finish the block before a first signal raises KeyboardInterrupt."""
    before, main = _interrupt.received, _is_main()
    _interrupt.deferred += main
    try:
        yield
    finally:
        _interrupt.deferred -= main
    if not before:
        raise_if_interrupted()


def interrupted() -> bool:
    """Whether a signal has been received: an error after that is its consequence.

    KeyboardInterrupt may be raised inside an import or a callback that catches every error, and leave
    a partly initialised module.
    """
    return _interrupt.installed and _interrupt.received


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that a library has caught, in the main thread."""
    if interrupted() and _is_main() and not _interrupt.deferred:
        raise KeyboardInterrupt


def exit_with(status: int) -> NoReturn:
    """Raise SystemExit: the command is over, and a signal while Python shuts down ends it at once."""
    _interrupt.status = status
    raise SystemExit(status)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit(why: str) -> NoReturn:
    os.write(2, f"raytrain: {why}\n".encode())
    os._exit(EXIT_STATUS)


def _watch(reader: int) -> None:
    """Exit at a second signal. A thread, since the main one may be inside a long call of C code."""
    first: float | None = None
    with open(reader, "rb", buffering=0) as numbers:
        while byte := numbers.read(1):
            if byte[0] not in _SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first > _FORWARDED:
                _exit("ended at once by a second signal")
