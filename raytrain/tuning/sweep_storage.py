"""The files of a sweep's driver in a storage behind a URL, so that another machine can continue it."""

from __future__ import annotations

import time
from pathlib import Path

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.storage import pull, push, url_of
from raytrain.tracking.outbox import mark_as_tried, state_of
from raytrain.tracking.outbox_look import look_at

OUTBOX, ROW_LOG = "mlflow.jsonl", "rows.jsonl"

_SECONDS = 10.0  # at least, from one copy of the files that grow to the next


def fetch_sweep(folder: Path) -> None:
    """Bring a sweep from the storage to its working copy, its trials without their checkpoints.

    Raises:
        RequestError: naming `storage`, if it does not answer or what it has is damaged.
    """
    if url_of(folder) is None:
        return
    outbox = folder / OUTBOX
    if (view := look_at(outbox)) is not None and view.held:
        return  # by the sweep's driver on this machine, whose files are the newest
    before = outbox.read_bytes() if outbox.is_file() else b""
    try:
        pull(folder, lambda file: file.suffix != ".pt")
    except OSError as error:
        raise RequestError(f"storage: {error.strerror or error}") from None
    if outbox.is_file() and outbox.read_bytes() != before:
        mark_as_tried(
            outbox
        )  # the driver before this one may have delivered what came after the copy


class SweepStorage:
    """Copies what a sweep's driver writes to the storage; does nothing for a plain folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_remote = folder, url_of(folder) is not None
        self._saved = -_SECONDS

    def save(self) -> None:
        """Copy the files that grow, unless that was done a moment ago.

        A failure is no reason to end a sweep: they are copied again after the next trial.
        """
        if not self._is_remote or time.monotonic() - self._saved < _SECONDS:
            return
        outbox = self._folder / OUTBOX
        try:
            for file in (self._folder / ROW_LOG, state_of(outbox), outbox):
                if file.is_file():
                    push(file)
        except OSError as error:
            log_line(f"raytrain: storage: {error.strerror or error}; the sweep goes on")
        self._saved = time.monotonic()

    def save_all(self) -> None:
        """Copy every file that has changed.

        Raises:
            OSError: if the storage does not answer.
        """
        push(self._folder)
