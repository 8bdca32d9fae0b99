"""From an outbox to MLflow, a bounded chunk at a time, each record at least once and visible once.

What is delivered twice, because a process died or an answer got lost, is not there twice: a run is
looked for by its tag before it is made again, and MLflow drops a point of a metric that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrain.tracking import notes
from raytrain.tracking.mlflow_inputs import log_inputs
from raytrain.tracking.outbox import Outbox
from raytrain.tracking.outbox_state import Record
from raytrain.tracking.results import log_result
from raytrain.tracking.stores import Store, first_line

_TRIES = 3  # of a record that the store refuses
_POINTS = 800  # of one run in one call
_BATCHED = ("row", "tag")


class Delivery:
    """Takes the records of an outbox to a store.

    `complain` receives a line on dropped records; `elsewhere(run_id)` is whether the status of a run
    is set by another process.
    """

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        complain: Callable[[str], None],
        elsewhere: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.outbox = outbox
        self._store, self._complain, self._elsewhere = store, complain, elsewhere
        self._doubtful = outbox.tried  # up to here an earlier process may have delivered
        self._todo: dict[str, list[Record]] = {}
        self._until = self._lines = 0
        self._passes = 0  # over the chunk in hand
        self._strikes: dict[str, int] = {}
        self._said: set[str] = set()

    def step(self) -> bool:
        """Deliver the next chunk; False if there is none.

        Raises:
            Exception: if the store is out of reach; call again later, nothing is lost.
        """
        if not self._todo:
            records, self._until, self._lines = self.outbox.read()
            if not self._lines:
                return False
            self.outbox.trying(self._until)
            self._passes = 0
            for record in records:
                self._todo.setdefault(record["run"], []).append(record)
        self._passes += 1
        last: Exception | None = None
        for handle in list(self._todo):
            last = self._run(handle) or last
        if last is not None:
            raise last
        self.outbox.delivered(self._until, self._lines)
        return True

    def _run(self, handle: str) -> Exception | None:
        """Deliver what a chunk has of one run; returns the refusal if it is to be tried again."""
        records = self._todo[handle]
        while records:
            parent = records[0].get("parent")
            if parent in self._todo and parent not in self.outbox.ids:
                return None  # its parent was refused just now and has another try
            count = self._together(records)
            try:
                self._send(handle, records[:count])
            except Exception as error:
                if not self._store.refuses(error):
                    raise
                self._strikes[handle] = self._strikes.get(handle, 0) + 1
                if self._strikes[handle] < _TRIES:
                    return error
                self._give_up(handle, records[:count], error)
            del records[:count]
        del self._todo[handle]
        return None

    def _together(self, records: list[Record]) -> int:
        """How many of the first records go into one call."""
        first = records[0]
        if first["do"] not in ("open", *_BATCHED):
            return 1
        count, points = 1, len(first["params"] if first["do"] == "open" else first["what"])
        while count < len(records) and records[count]["do"] in _BATCHED:
            points += len(records[count]["what"])
            if points > _POINTS:
                break
            count += 1
        return count

    def _send(self, handle: str, records: list[Record]) -> None:
        first = records[0]
        if first["do"] == "adopt":
            self.outbox.named(handle, first["id"])
        elif first["do"] == "open":
            self._open(handle, first)
        run_id = self._id(handle)
        if run_id and first["do"] in ("open", *_BATCHED):
            self._store.batch(run_id, _points(records, run_id))
        elif run_id:
            self._single(run_id, first)

    def _single(self, run_id: str, record: Record) -> None:
        client, deed = self._store.client, record["do"]
        if deed == "text":
            client.log_text(run_id, record["text"], record["file"])
        elif deed == "artifact":
            self._artifact(run_id, Path(record["path"]), record["folder"])
        elif deed == "inputs":
            log_inputs(client, run_id, record["what"])
        elif deed == "result":
            log_result(self._store, run_id, record)
        elif deed == "note":
            notes.rewrite(client, run_id, record["text"])
        elif deed == "view":
            client.set_experiment_tag(self._store.experiment_id, record["tag"], record["state"])
        elif self._elsewhere(run_id):
            pass
        elif deed == "reopen":
            client.update_run(run_id, status="RUNNING")
        elif deed == "end":
            client.set_terminated(run_id, record["status"], record["ms"])

    def _id(self, handle: str) -> str:
        """The run behind a handle; empty if MLflow refused to make one."""
        if handle not in self.outbox.ids:
            # Only if the state of the outbox was lost.
            found = self._store.find(f"{self.outbox.key}/{handle}")
            if found is None:
                self._complain(f"{handle}: its run was never made, so its records are left out")
            self.outbox.named(handle, found or "")
        return self.outbox.ids[handle]

    def _open(self, handle: str, record: Record) -> None:
        if handle in self.outbox.ids:
            return
        key = f"{self.outbox.key}/{handle}"
        # An earlier try may have made the run although its answer was lost.
        unsure = self._passes > 1 or self.outbox.at < self._doubtful
        run_id = self._store.find(key) if unsure else None
        if run_id is None:
            parent = None if record["parent"] is None else self._id(record["parent"])
            run_id = self._store.create(key, record, parent)
            if unsure:  # that try may have arrived in the meantime
                run_id = self._store.find(key) or run_id
        self.outbox.named(handle, run_id)

    def _artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self._store.client.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            self._store.client.log_artifact(run_id, str(path), folder)
        else:
            self._complain(f"{path}: gone before it could be stored; left out")

    def _give_up(self, handle: str, records: list[Record], error: Exception) -> None:
        """Drop as little as possible of the records that the store refuses, with one line per run."""
        run_id, what = self.outbox.ids.get(handle), records[0]["do"]
        if run_id is None and what == "open":
            self.outbox.named(handle, "")
        elif run_id and (points := _points(records, run_id)) and not self._store.missing(run_id):
            what = ", ".join(self._bisect(run_id, points)) or what
        if handle not in self._said:
            self._said.add(handle)
            self._complain(f"{handle}: {what} refused: {first_line(error)}")

    def _bisect(self, run_id: str, points: list[Any]) -> list[str]:
        """Deliver all but the points that are refused; returns their names."""
        try:
            self._store.batch(run_id, points)
        except Exception as error:
            if not self._store.refuses(error):
                raise
            if len(points) == 1:
                return [points[0].key]
            middle = len(points) // 2
            return self._bisect(run_id, points[:middle]) + self._bisect(run_id, points[middle:])
        return []


def _points(records: list[Record], run_id: str) -> list[Any]:
    """The metrics, parameters and tags of a run's records, as MLflow's own kinds."""
    from mlflow.entities import Metric, Param, RunTag

    made: list[Any] = []
    for record in records:
        if record["do"] == "row":
            ms, step = record["ms"], record["step"]
            made += [Metric(name, value, ms, step) for name, value in record["what"].items()]
        elif record["do"] == "tag":
            made += [RunTag(name, value) for name, value in record["what"].items()]
        elif record["do"] == "open":
            made += [Param(name, value) for name, value in record["params"].items()]
            note = notes.tags_of(record["note"], run_id) if record.get("note") else {}
            made += [RunTag(name, value) for name, value in note.items()]
    return made
