"""The one thread that talks to MLflow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from raytrain.core.console import log_line
from raytrain.tracking.delivery import Delivery
from raytrain.tracking.outbox import Outbox, orphans
from raytrain.tracking.stores import Store, first_line

_BATCH_SECONDS = 0.5  # records are collected this long before they are delivered
FIRST_RETRY, LAST_RETRY = 0.5, 30.0  # seconds, doubling; the first while a caller waits


class Writer:
    """Delivers an outbox for ever, and then the orphans in a folder, until it is stopped."""

    def __init__(self, store: Store, outbox: Outbox, folder: Path | None) -> None:
        self._store, self._outbox = store, outbox
        self._own = Delivery(store, outbox, self._complain)
        self._disposable = folder is not None and outbox.file.parent == folder
        # Locked now, so that no process that starts later sets the status of a run we continue.
        found = [] if folder is None else orphans(folder, store.uri, store.experiment)
        self._orphans = [
            Delivery(store, orphan, self._complain, outbox.run_index.adopts) for orphan in found
        ]
        self._changed = threading.Condition()
        self._stopping = self._idle = self._away_was_said = False
        self._hurrying = 0
        self._asked = self._moved = 0  # number of waits begun; number of chunks delivered
        self._thread = threading.Thread(target=self._write_for_ever, name="mlflow", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- what callers do

    def wake(self) -> None:
        """Something was queued."""
        if self._idle:  # else it looks by itself, and callers need not contend for the lock
            with self._changed:
                self._changed.notify_all()

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait for something to be delivered, without the usual delay."""
        with self._changed:
            self._hurrying += 1
            self._asked += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(done, seconds)
            finally:
                self._hurrying -= 1

    def settle(self, patience: float) -> bool:
        """Wait until everything is delivered, the orphans too, as long as something moves."""
        while True:
            moved = self._moved
            if not self.wait(lambda m=moved: not self._busy() or self._moved > m, patience):
                return False
            if not self._busy():
                return True

    def stop(self) -> None:
        """End the thread; does not block on a call that hangs in the network."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(1.0)

    # ---------------------------------------------------------------- the thread

    def _busy(self) -> bool:
        return self._outbox.waiting > 0 or bool(self._orphans)

    def _write_for_ever(self) -> None:
        try:
            delay = 0.0
            while self._pause(delay):
                delay = self._step(delay)
        finally:
            self._leave()

    def _pause(self, delay: float) -> bool:
        """Wait for work, and `delay` seconds after a failure; False when it is time to stop."""
        with self._changed:
            self._idle = True
            self._changed.wait_for(lambda: self._stopping or self._busy())
            self._idle = False
            asked = self._asked
            if delay:
                delay = min(delay, FIRST_RETRY) if self._hurrying else delay
                self._changed.wait_for(lambda: self._stopping or self._asked > asked, delay)
            elif self._outbox.waiting:
                self._changed.wait_for(lambda: self._stopping or self._hurrying, _BATCH_SECONDS)
            return not self._stopping

    def _step(self, delay: float) -> float:
        """Deliver a chunk; returns how long to wait before the next."""
        try:
            if self._outbox.waiting:
                if not self._own.step():
                    return FIRST_RETRY  # half a line, since the disk is full
                self._outbox.compact()
            elif self._orphans:
                self._bring_in(self._orphans[0])
        except Exception as error:  # the edge: nothing is lost, and it is tried again
            self._away(error)
            return min(max(2 * delay, FIRST_RETRY), LAST_RETRY)
        with self._changed:
            self._moved += 1
            self._changed.notify_all()
        return 0.0

    def _bring_in(self, orphan: Delivery) -> None:
        """Deliver a chunk of a dead process's outbox; at its end, end its runs too."""
        if orphan.step():
            return
        outbox = orphan.outbox
        unended = outbox.run_index.left_open()
        for handle in unended:
            # Died at about the time of the last record.
            ms = int(outbox.file.stat().st_mtime * 1000)
            outbox.append({"do": "end", "run": handle, "status": "KILLED", "ms": ms})
        if not unended:
            self._orphans.remove(orphan)
            outbox.remove()
            outbox.close()

    def _leave(self) -> None:
        if self._outbox.waiting == 0:
            if self._disposable and not self._outbox.run_index.left_open():
                self._outbox.remove()
                with contextlib.suppress(OSError):  # in use
                    self._outbox.file.parent.rmdir()
            else:
                self._outbox.compact(0)
        for delivery in (self._own, *self._orphans):
            delivery.outbox.close()

    def _away(self, error: Exception) -> None:
        if not self._away_was_said:
            self._complain(f"{first_line(error)}; records are kept in {self._outbox.file}")
        self._away_was_said = True

    def _complain(self, problem: str) -> None:
        log_line(f"raytrain: MLflow at {self._store.uri}: {problem}")
