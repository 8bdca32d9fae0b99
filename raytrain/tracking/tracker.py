"""What the commands log with: every call writes a line to a file and returns.

A run is known by its handle, since MLflow gives ids only when it answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from raytrain.config.names import RUN_NAME
from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.signals import deferred, interrupted
from raytrain.tracking.lock import alone
from raytrain.tracking.network import log_network, tracking_at
from raytrain.tracking.outbox import Outbox, OutboxBusy
from raytrain.tracking.outbox_state import Status
from raytrain.tracking.registry import Entry, is_registered, register
from raytrain.tracking.stores import Store, first_line, patiently
from raytrain.tracking.views import TAG, View, key_of
from raytrain.tracking.writer import Writer

PATIENCE = 20.0  # at the end, for a store that takes nothing
T = TypeVar("T")

_MANY = 2000  # records whose delivery takes long enough for a line


class Tracker:
    """One MLflow experiment, held open by the driver of a training or a sweep.

    `outbox` is the file that records wait in; one that is there is continued. Outboxes of dead
    processes in the folder `orphans` are delivered too, after one's own, and what they left open
    ends as KILLED; an outbox in that folder is deleted when it is delivered and all its runs ended,
    any other is kept, for a sweep that is resumed.

    Raises:
        RequestError: if the store does not answer when it is opened, or the outbox is another's.
    """

    def __init__(
        self, uri: str | None, experiment: str, outbox: Path, orphans: Path | None = None
    ) -> None:
        self._store = Store(uri, experiment)
        self.uri, self.experiment = self._store.uri, experiment
        self.experiment_id = self._store.experiment_id
        self._outbox = _outbox(self._store, outbox)
        self._writer = Writer(self._store, self._outbox, orphans)
        self._asked: set[str] = set()  # handles whose last epoch the store was asked for

    def open(
        self,
        handle: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
        note: str | None = None,
    ) -> None:
        """Queue a new run, below the run `parent` if given; RUNNING until `close`.

        A handle that is known is reopened: its name, parameters and parent stay as they were. `note`
        is its description in Markdown, `{run_id}` in it the id that it will have.
        """
        if not handle or set("'`\"\\\n") & set(handle):
            raise ValueError(f"{handle!r}: expected a word as the handle of a run")
        if parent is not None:
            self._must_know(parent)
        if self.known(handle):
            self.reopen(handle)
            return
        self._put(
            "open",
            handle,
            name=name[:RUN_NAME],
            params={key: str(value)[:6000] for key, value in params.items()},
            tags={key: str(value) for key, value in tags.items()},
            parent=parent,
            note=note,
            ms=_now(),
        )

    def adopt(self, handle: str, run_id: str) -> None:
        """Give a handle to a run that was made elsewhere; its status stays what it is."""
        known = self._outbox.run_index.runs.get(handle)
        if known is None or known.adopted != run_id:
            self._put("adopt", handle, id=run_id)

    def known(self, handle: str) -> bool:
        """Whether the handle has a run, be it delivered or not."""
        return handle in self._outbox.run_index.runs

    def run_id(self, handle: str, seconds: float = 60.0) -> str | None:
        """The id of a run, waiting for MLflow to give it; None if it does not in this time."""
        known = self._must_know(handle)
        if known.adopted is not None:
            return known.adopted
        self._writer.wait(lambda: handle in self._outbox.ids, seconds)
        return self._outbox.ids.get(handle) or None

    def has_run(self, run_id: str) -> bool:
        """Whether the store has this run; true for a store that does not answer."""
        return not self._store.missing(run_id)

    def run_name(self, run_id: str) -> str | None:
        """The name of a run in the store; None if it has none, or does not answer."""
        return self._store.run_name(run_id)

    def is_trial(self, run_id: str) -> bool:
        """Whether the store has this run as a trial of a sweep; false if it does not answer."""
        return self._store.is_trial(run_id)

    def unused_name(self, name: str) -> str:
        """The name, or `NAME-2` and so on if the experiment has runs of it."""
        taken = self._store.names(name)
        numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(one for one in numbered if one not in taken)

    @property
    def waiting(self) -> int:
        """Records that are not delivered yet."""
        return self._outbox.waiting

    def reopen(self, handle: str) -> None:
        """Queue that a run is RUNNING again."""
        self._must_know(handle)
        self._put("reopen", handle)

    def last_step(self, handle: str) -> int:
        """The last epoch a run has a row of (0: none), queued rows included."""
        known = self._must_know(handle)
        if known.adopted is not None and not known.step:
            known.step = self._store.last_step(known.adopted)
        elif self._outbox.is_older and handle not in self._asked:
            self._asked.add(handle)
            if run_id := self._outbox.ids.get(handle):
                known.step = max(known.step, self._store.last_step(run_id))
        return known.step

    def unfinished(self, parent: str) -> list[str]:
        """Handles of the children of a run that have not ended, such as those of a driver that died.

        Children that only the store has, because this outbox is an older copy of that driver's, get the
        handle that their tag `trial` has; their id, if there is none or another run has it.
        """
        runs = self._outbox.run_index.runs
        parent_id = self._must_know(parent).adopted or self._outbox.ids.get(parent)
        strays: dict[str, str] = {}
        if parent_id:
            try:
                strays = self._store.running(parent_id)
            except Exception as error:  # away: the outbox has its own
                self._complain(first_line(error))
        there = {*self._outbox.ids.values(), *(run.adopted for run in runs.values())}
        found = []
        for run_id, trial in strays.items():
            if run_id not in there:
                found.append(trial if trial and not self.known(trial) else run_id)
                self._put("adopt", found[-1], id=run_id, parent=parent)
        return [h for h, run in runs.items() if run.open and run.parent == parent] + sorted(found)

    def log(self, handle: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Queue a row of metrics."""
        self._must_know(handle)
        row = {name: float(value) for name, value in metrics.items()}
        self._put("row", handle, what=row, step=step, ms=_now())

    def tag(self, handle: str, tags: Mapping[str, str]) -> None:
        """Queue tags."""
        self._must_know(handle)
        self._put("tag", handle, what={key: str(value) for key, value in tags.items()})

    def result(
        self,
        handle: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        """Queue a configuration and the metrics that it led to, which belong together.

        MLflow never changes a parameter: a run that has another configuration keeps that and its metrics.
        """
        self._must_know(handle)
        self._put(
            "result",
            handle,
            params={key: str(value)[:6000] for key, value in params.items()},
            metrics={name: float(value) for name, value in metrics.items()},
            tags={key: str(value) for key, value in tags.items()},
            ms=_now(),
        )

    def text(self, handle: str, text: str, file: str) -> None:
        """Queue a text artifact."""
        self._must_know(handle)
        self._put("text", handle, text=text, file=file)

    def artifact(self, handle: str, path: Path, folder: str | None = None) -> None:
        """Queue a file, or the contents of a folder; it must be there until it is delivered."""
        self._must_know(handle)
        self._put("artifact", handle, path=str(path.resolve()), folder=folder)

    def note(self, handle: str, text: str) -> None:
        """Queue another description, which is dropped if the present one was edited."""
        self._must_know(handle)
        self._put("note", handle, text=text)

    def inputs(self, handle: str, inputs: Sequence[Mapping[str, str]]) -> None:
        """Queue the data sets that a run has seen: fields of `tracking.inputs`, and `context`."""
        self._must_know(handle)
        self._put("inputs", handle, what=[dict(one) for one in inputs])

    def view(self, handle: str, name: str, view: View) -> None:
        """Queue a page of the experiment that is set up already, on behalf of a run."""
        self._must_know(handle)
        self._put("view", handle, tag=TAG + key_of(name), state=view.state())

    def model(self, handle: str, model: Any, example: Any, entry: Entry | None = None) -> None:
        """The network in MLflow's PyTorch flavour, and as a version of a registered model if wanted.

        Waits until it is there, or the store is away. What is registered is not stored again.
        """
        run_id = self.run_id(handle, PATIENCE)
        if run_id is None:
            self._complain(f"the network of {handle} was not stored (no answer)")
            return
        known = None if entry is None else self._is_registered(handle, entry, run_id)
        if known:
            return
        model_id = self._tried(
            f"{handle} was not stored",
            lambda: patiently(lambda: log_network(self.uri, run_id, model, example)),
        )
        if entry is not None and known is not None and model_id is not None:
            with tracking_at(self.uri), alone(self.uri):
                self._tried(
                    f"{handle} was not registered",
                    lambda: register(self._store.client, entry, run_id, model_id),
                )

    def _is_registered(self, handle: str, entry: Entry, run_id: str) -> bool | None:
        return self._tried(
            f"{handle} was not registered",
            lambda: is_registered(self._store.client, entry, run_id),
        )

    def _tried(self, otherwise: str, call: Callable[[], T]) -> T | None:
        """What `call` returns; None, with a line on stderr, if it fails: training is complete."""
        try:
            return call()
        except Exception as error:  # MLflow's, the network's, or the exporter's: no graph holds it
            self._complain(f"the network of {otherwise} ({first_line(error)})")
        return None

    def close(self, handle: str, status: Status) -> None:
        """Queue the end of a run, after all its rows."""
        self._must_know(handle)
        self._put("end", handle, status=status, ms=_now())

    def flush(self, seconds: float = 60.0) -> bool:
        """Wait until everything queued is in the store; False if it is not in this time."""
        until = self._outbox.end
        return self._writer.wait(lambda: self._outbox.at >= until, seconds)

    def shut(self, status: Status) -> None:
        """End what is open with `status` and deliver everything, unless the store takes nothing."""
        for handle in self._outbox.run_index.left_open():
            self.close(handle, status)
        if self._outbox.waiting > _MANY:
            log_line(
                f"raytrain: delivering {self._outbox.waiting} records to MLflow at {self.uri}; "
                "interrupted, the next command goes on with them"
            )
        try:
            done = self._writer.settle(PATIENCE)
            waiting = self._outbox.waiting
        finally:
            self._writer.stop()
        if not done and waiting:
            log_line(
                f"raytrain: MLflow at {self.uri} does not answer: {waiting} records wait in "
                f"{self._outbox.file}; the next command delivers them"
            )

    def _must_know(self, handle: str) -> Any:
        try:
            return self._outbox.run_index.runs[handle]
        except KeyError:
            raise KeyError(f"{handle}: no run of {self._outbox.file}") from None

    def _put(self, deed: str, handle: str, **details: Any) -> None:
        self._outbox.append({"do": deed, "run": handle, **details})
        self._writer.wake()

    def _complain(self, problem: str) -> None:
        log_line(f"raytrain: MLflow at {self.uri}: {problem}")


@contextmanager
def tracked(
    uri: str | None, experiment: str, outbox: Path, orphans: Path | None = None
) -> Iterator[Tracker]:
    """A tracker for the time of a command: whatever is still open ends as the command does.

    Raises:
        RequestError: if the store does not answer.
    """
    tracker = Tracker(uri, experiment, outbox, orphans)
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    except Exception:
        status = "KILLED" if interrupted() else "FAILED"
        raise
    finally:
        with deferred():  # a signal now must not keep the end of a run from being recorded
            tracker.shut(status)


def _outbox(store: Store, file: Path) -> Outbox:
    """The outbox at `file`, made to go to `store`."""
    try:
        outbox = _made(store, file)
    except OutboxBusy:
        raise RequestError(
            f"{file}: another process is writing here; expected one command at a time"
        ) from None
    except OSError as error:
        raise RequestError(
            f"storage: {file} could not be opened ({error.strerror}); expected a folder that can be "
            "written"
        ) from None
    if (outbox.uri, outbox.experiment) != (store.uri, store.experiment):
        run_id = next(filter(None, outbox.ids.values()), None)
        if run_id is not None and store.missing(run_id):
            outbox.close()
            raise RequestError(
                f"tracking_uri: the runs of {file} are in MLflow at {outbox.uri}, experiment "
                f"{outbox.experiment}, and {store.uri} does not have them"
            )
        outbox.moved(store.uri, store.experiment)
    return outbox


def _made(store: Store, file: Path) -> Outbox:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return Outbox(file, store.uri, store.experiment)
        except FileNotFoundError:
            continue  # a process that ends has just removed the empty folder
        except FileExistsError:
            if file.parent.exists():
                raise  # no folder


def _now() -> int:
    return int(time.time() * 1000)
