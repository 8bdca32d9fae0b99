"""What `raytrain status` has of sweeps and of trainings alike. Neither torch nor MLflow is imported."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import join
from typing import Any, ClassVar, Literal

from raytrain.commands.results import ShownResult
from raytrain.core.errors import RequestError
from raytrain.core.storage import pull, shown, url_of
from raytrain.tracking.address import tracking_uri
from raytrain.tracking.outbox_look import OutboxView
from raytrain.training.run_folder import located
from raytrain.tuning.launch import SILENT

State = Literal["running", "interrupted", "finished"]

_EPOCHS = 5
"""Without a change, after which a driver elsewhere counts as dead, if that is longer than `SILENT`."""


@dataclass(frozen=True, repr=False)
class ObservedStatus(ShownResult):
    """A sweep or a training at a moment. Ages are in seconds; None where something is not known."""

    kind: ClassVar[str]

    name: str
    experiment: str
    folder: Path
    state: State
    host: str | None  # the machine of its driver
    here: bool  # whether its driver runs on this machine
    changed: float | None  # since the last change of any kind
    row: float | None  # since the last row
    waiting: int | None  # records that MLflow has not received
    outbox: Path | None  # where they wait
    tracking_uri: str
    next: dict[str, str]  # commands: of watch, continue, more_trials and ui

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {"kind": self.kind, **asdict(self), "folder": shown(self.folder)}


@dataclass(frozen=True)
class Place:
    """A folder, with its storage as commands are given it."""

    folder: Path
    storage: str

    @property
    def is_copy(self) -> bool:
        """Whether the folder is in the working copy of a storage behind a URL."""
        return url_of(self.folder) is not None

    def fetch(self, *files: str) -> None:
        """Bring files from such a storage.

        Raises:
            RequestError: naming `storage`, if it does not answer.
        """
        try:
            for file in files:
                pull(self.folder / file)
        except OSError as error:
            raise RequestError(f"storage: {error.strerror or error}") from None


@dataclass
class Signs:
    """The difference between a driver that works and one that is dead."""

    outbox: OutboxView | None
    times: list[float] = field(default_factory=list)  # of changes, in seconds since 1970
    now: float = field(default_factory=lambda: time.time())

    @property
    def held(self) -> bool:
        """Whether a process of this machine has the lock of the outbox."""
        return self.outbox is not None and bool(self.outbox.held)

    @property
    def is_dead(self) -> bool:
        """Whether the last owner of the outbox was a process of this machine, and is no more."""
        outbox = self.outbox
        return outbox is not None and outbox.held is False and outbox.host == socket.gethostname()

    @property
    def changed(self) -> float | None:
        """Seconds since the last change."""
        return self.since(max(self.times, default=None))

    def since(self, when: float | None) -> float | None:
        """Seconds since a moment; clocks of other machines may be ahead."""
        return None if when is None else max(0.0, self.now - when)

    def is_silent(self, seconds_per_epoch: float) -> bool:
        """Whether the last change was too long ago for a driver that works."""
        patience = max(SILENT, _EPOCHS * seconds_per_epoch)
        return self.changed is None or self.changed > patience


def store_of(outbox: OutboxView | None, named: str | None) -> str:
    """The MLflow store that records go to."""
    return tracking_uri(named) if outbox is None or outbox.uri is None else outbox.uri


def next_steps(
    state: State, name: str, where: Place, experiment: str, uri: str, again: dict[str, str]
) -> dict[str, str]:
    """The commands that make sense in a state; `again` has those that go on, by state."""
    words = ["watch", "-n", "10", "raytrain", "status", name]
    ui = ["raytrain", "ui", name]
    steps = {"watch": join([*words, *located(where.storage, experiment)])}
    if state != "running":
        steps = again
    elsewhere = [] if uri == tracking_uri(None) else ["--uri", uri]
    return {**steps, "ui": join([*ui, *elsewhere])}
