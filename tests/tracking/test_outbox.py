"""An outbox loses nothing and delivers nothing twice, wherever its writer was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from raytrain.tracking import outbox as spools
from raytrain.tracking import writer as writers
from raytrain.tracking.delivery import Delivery
from raytrain.tracking.experiment import NOTE
from raytrain.tracking.mlflow_inputs import FIELDS
from raytrain.tracking.notes import DIGEST
from raytrain.tracking.outbox import Outbox, OutboxBusy, orphans, state_of
from raytrain.tracking.stores import KEY, Store
from raytrain.tracking.writer import Writer


class Killed(BaseException):
    """What a SIGKILL is to the process: nothing after it is done."""


class Server:
    """An MLflow client in memory, with MLflow's rules, that can be told to misbehave.

    `before` and `after` are called around every change, with its name.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.before: Callable[[str], None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None
        self.largest = self.calls = 0
        self.experiment: dict[str, str] = {}

    def create_run(
        self, experiment_id: str, start_time: int, run_name: str, tags: dict[str, str]
    ) -> Any:
        with self._change("create"):
            run_id = f"{len(self.runs):032x}"
            self.runs[run_id] = {
                "name": run_name,
                "tags": dict(tags),
                "params": {},
                "points": set(),
                "texts": {},
                "inputs": {},
                "status": "RUNNING",
                "deleted": False,
                "start": start_time,
            }
            return self._info(run_id)

    def search_runs(
        self, experiments: list[str], query: str, max_results: int = 1000
    ) -> list[Any]:
        del experiments, max_results
        assert query.startswith(f"tags.`{KEY}` = '")
        key = query.split("'")[1]
        return [self._info(i) for i, run in self.runs.items() if run["tags"][KEY] == key]

    def get_run(self, run_id: str) -> Any:
        self._run(run_id)
        return self._info(run_id)

    def get_experiment(self, experiment_id: str) -> str:
        return experiment_id

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        with self._change("batch"):
            assert len(metrics) <= 1000 and len(params) <= 100 and len(tags) <= 100
            assert len(metrics) + len(params) + len(tags) <= 1000
            self.largest = max(self.largest, len(metrics))
            run = self._active(run_id)
            if any(run["params"].get(p.key, p.value) != p.value for p in params) or any(
                "bad" in point.key for point in (*metrics, *params, *tags)
            ):
                raise MlflowException("not allowed", INVALID_PARAMETER_VALUE)
            run["params"].update({p.key: p.value for p in params})
            run["tags"].update({t.key: t.value for t in tags})
            run["points"].update(
                (m.key, "nan" if m.value != m.value else m.value, m.timestamp, m.step)
                for m in metrics
            )

    def update_run(self, run_id: str, status: str) -> None:
        with self._change("reopen"):
            self._active(run_id)["status"] = status

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        with self._change("end"):
            self._active(run_id).update(status=status, end=end_time)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        with self._change("text"):
            self._active(run_id)["texts"][file] = text

    def log_inputs(self, run_id: str, datasets: list[Any]) -> None:
        with self._change("inputs"):
            known = self._active(run_id)["inputs"]
            for one in datasets:
                known.setdefault((one.dataset.name, one.dataset.digest), one.tags[0].value)

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        with self._change("view"):
            self.experiment[key] = value

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self.log_text(run_id, Path(path).read_text(), f"{folder}/{Path(path).name}")

    def values(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        points = self.runs[run_id]["points"]
        return sorted((step, value) for key, value, _, step in points if key == metric)

    def named(self) -> dict[str, str]:
        """Ids by name; every name once."""
        names = [run["name"] for run in self.runs.values()]
        assert len(set(names)) == len(names)
        return {run["name"]: run_id for run_id, run in self.runs.items()}

    def _change(self, name: str) -> Any:
        server = self

        class Change:
            def __enter__(self) -> None:
                server.calls += 1
                server.before(name)

            def __exit__(self, kind: Any, *_: Any) -> None:
                if kind is None:
                    server.after(name)

        return Change()

    def _run(self, run_id: str) -> dict[str, Any]:
        if run_id not in self.runs:
            raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
        return self.runs[run_id]

    def _active(self, run_id: str) -> dict[str, Any]:
        if self._run(run_id)["deleted"]:
            raise MlflowException("must be in the active state", INVALID_PARAMETER_VALUE)
        return self.runs[run_id]

    def _info(self, run_id: str) -> Any:
        stage = "deleted" if self.runs[run_id]["deleted"] else "active"
        info = SimpleNamespace(run_id=run_id, lifecycle_stage=stage)
        run = self.runs[run_id]
        data = SimpleNamespace(tags=run["tags"], params=run["params"])
        return SimpleNamespace(info=info, data=data)


def store_of(server: Server, uri: str = "memory") -> Store:
    store = object.__new__(Store)
    store.uri, store.experiment, store.experiment_id = uri, "tests", "1"
    store.client = server
    return store


def spool_in(folder: Path, name: str = "s.jsonl") -> Outbox:
    folder.mkdir(exist_ok=True)
    return Outbox(folder / name, "memory", "tests")


def opened(handle: str, parent: str | None = None, **params: str) -> dict[str, Any]:
    rest = {"name": handle, "params": params, "tags": {"t": handle}, "parent": parent, "ms": 1}
    return {"do": "open", "run": handle, **rest}


def row(handle: str, step: int, **metrics: float) -> dict[str, Any]:
    return {"do": "row", "run": handle, "what": metrics, "step": step, "ms": 1000 + step}


def end(handle: str, status: str = "FINISHED") -> dict[str, Any]:
    return {"do": "end", "run": handle, "status": status, "ms": 9000}


def result(handle: str, params: dict[str, str], metrics: dict[str, float]) -> dict[str, Any]:
    more = {"params": params, "metrics": metrics, "tags": params, "ms": 1}
    return {"do": "result", "run": handle, **more}


DATA = {**dict.fromkeys(FIELDS, ""), "name": "digits", "digest": "1f", "context": "training"}
STORY = [
    {**opened("p", **{"base.a": "1"}), "note": "of {run_id}"},
    opened("c", "p", b="x"),
    row("c", 1, loss=1.0, acc=0.5),
    {"do": "text", "run": "c", "text": "epochs: 3\n", "file": "run.yaml"},
    row("c", 2, loss=0.5, acc=float("nan")),
    end("c", "FAILED"),
    {"do": "reopen", "run": "c"},
    row("c", 3, loss=0.25, acc=0.75),
    {"do": "tag", "run": "c", "what": {"outcome": "complete"}},
    end("c"),
    {"do": "inputs", "run": "c", "what": [DATA, {**DATA, "digest": "2e", "context": "test"}]},
    row("p", 0, best=0.75),
    result("p", {"a": "2"}, {"acc": 0.75}),
    result("p", {"a": "3"}, {"acc": 0.5}),
    {"do": "view", "run": "p", "tag": "view", "state": "columns"},
    {"do": "note", "run": "p", "text": "best of {run_id}"},
    end("p"),
]


def told(server: Server) -> dict[str, Any]:
    """What the store holds, by the names of runs; ids are its own affair."""
    named = server.named()
    names = {run_id: name for name, run_id in named.items()}
    found = {}
    for name, run_id in named.items():
        run = {**server.runs[run_id], "points": sorted(map(repr, server.runs[run_id]["points"]))}
        tags = dict(run["tags"])
        tags.pop(KEY)
        if NOTE in tags:
            tags[NOTE] = tags[NOTE].replace(run_id, names[run_id])
            tags.pop(DIGEST)
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
        found[name] = {**run, "tags": tags}
    return found


def deliver(outbox: Outbox, server: Server, said: list[str] | None = None) -> None:
    delivery = Delivery(store_of(server), outbox, (said if said is not None else []).append)
    while delivery.step():
        pass


def expected(records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    server = Server()
    outbox = spool_in(folder)
    for record in records:
        outbox.append(record)
    deliver(outbox, server)
    outbox.close()
    shutil.rmtree(folder)
    return told(server)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """An outbox with the story in it, undelivered."""
    outbox = spool_in(tmp_path)
    for record in STORY:
        outbox.append(record)
    outbox.close()
    return outbox.file


# --- killed while writing ---------------------------------------------------------------------


def test_the_whole_story_arrives(story: Path) -> None:
    server = Server()
    outbox = spool_in(story.parent)
    deliver(outbox, server)
    run = told(server)["c"]
    assert (run["status"], run["params"], run["texts"]) == (
        "FINISHED",
        {"b": "x"},
        {"run.yaml": "epochs: 3\n"},
    )
    assert run["tags"]["outcome"] == "complete" and run["tags"]["mlflow.parentRunId"] == "p"
    assert run["inputs"] == {("digits", "1f"): "training", ("digits", "2e"): "test"}
    assert told(server)["p"]["tags"][NOTE] == "best of p" and server.experiment == {
        "view": "columns"
    }
    assert server.values(server.named()["c"], "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert told(server)["p"]["params"] == {"base.a": "1", "a": "2"}
    assert server.values(server.named()["p"], "acc") == [(0, 0.75)]
    assert (outbox.waiting, outbox.at) == (0, outbox.end)
    outbox.close()


def test_cut_at_any_byte_what_was_written_to_its_end_arrives_and_nothing_else(
    story: Path, tmp_path: Path
) -> None:
    whole, state = story.read_bytes(), state_of(story).read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]  # of the header first
    wanted = expected(STORY, tmp_path / "whole")
    for cut in range(len(whole) + 1):
        folder = tmp_path / "cut"
        folder.mkdir()
        (folder / "s.jsonl").write_bytes(whole[:cut])
        (folder / "s.state").write_bytes(state)
        server, outbox = Server(), spool_in(folder)
        count = max(sum(at <= cut for at in ends) - 1, 0)
        assert outbox.waiting == count
        for record in STORY[count:]:  # the process that takes over goes on from there
            outbox.append(record)
        deliver(outbox, server)
        assert told(server) == wanted, cut
        outbox.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", range(len(STORY) + 1))
def test_a_spool_that_ends_early_leaves_its_runs_as_they_were(
    count: int, story: Path, tmp_path: Path
) -> None:
    lines = story.read_bytes().splitlines(keepends=True)
    story.write_bytes(b"".join(lines[: count + 1]))
    server, outbox = Server(), spool_in(tmp_path)
    deliver(outbox, server)
    open_now = {name for name, run in told(server).items() if run["status"] == "RUNNING"}
    assert open_now == set(outbox.run_index.left_open())
    assert told(server) == expected(STORY[:count], tmp_path / "whole")
    outbox.close()


def test_records_of_a_killed_process_are_all_in_its_file(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom raytrain.tracking.outbox import Outbox\n"
        f"spool = Outbox(Path({str(tmp_path / 's.jsonl')!r}), 'memory', 'tests')\n"
        "spool.append({'do': 'open', 'run': 'r', 'name': 'r', 'params': {}, 'tags': {},"
        " 'parent': None, 'ms': 1})\n"
        "for step in range(1, 10**9):\n"
        "    spool.append({'do': 'row', 'run': 'r', 'what': {'m': step / 2}, 'step': step, 'ms': 1})\n"
        "    sys.stdout.write(f'{step}\\n')\n"
        "    sys.stdout.flush()\n"
    )
    writing = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writing.stdout is not None
    last = 0
    try:
        writing.stdout.readline()
        with pytest.raises(OutboxBusy):  # while its owner lives
            spool_in(tmp_path)
        for _ in range(300):
            last = int(writing.stdout.readline())
    finally:
        os.kill(writing.pid, signal.SIGKILL)
        told_whole = writing.stdout.read().split("\n")[:-1]
        writing.wait()
        writing.stdout.close()
    last = int(told_whole[-1]) if told_whole else last
    server, outbox = Server(), spool_in(tmp_path)
    deliver(outbox, server)
    found = server.values(server.named()["r"], "m")
    assert found[:last] == [(step, step / 2) for step in range(1, last + 1)]
    assert len(found) <= last + 1  # one more may have been written and not told
    outbox.close()


# --- killed while delivering ------------------------------------------------------------------


@pytest.mark.parametrize("side", ["before", "after"])
def test_killed_around_any_call_the_next_process_leaves_one_run_and_every_row(
    side: str, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "CHUNK", 300)  # several chunks
    wanted = expected(STORY, tmp_path / "whole")
    files = {file.name: file.read_bytes() for file in (story, state_of(story))}
    fatal = 0
    while True:
        folder = tmp_path / "killed"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        server, outbox = Server(), spool_in(folder)

        def die(_: str, server: Server = server, fatal: int = fatal) -> None:
            if server.calls == fatal + 1:
                raise Killed

        setattr(server, side, die)
        try:
            deliver(outbox, server)
        except Killed:
            pass
        else:
            assert fatal >= 8 and told(server) == wanted  # no call is left to be killed at
            outbox.close()
            return
        outbox.close()
        server.before = server.after = lambda _: None
        outbox = spool_in(folder)
        deliver(outbox, server)
        assert told(server) == wanted, fatal
        outbox.close()
        shutil.rmtree(folder)
        fatal += 1


def test_without_its_state_a_spool_finds_its_runs_again(story: Path, tmp_path: Path) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    deliver(outbox, server)
    before = told(server)
    outbox.close()
    state_of(story).unlink()
    outbox = spool_in(tmp_path)
    deliver(outbox, server)
    assert told(server) == before
    outbox.close()


@pytest.mark.parametrize("lost", [b"", b'{"spool": "s", "ba'])
def test_killed_while_the_file_starts_anew_nothing_is_delivered_twice(
    lost: bytes, tmp_path: Path
) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    for record in STORY[:5]:
        outbox.append(record)
    deliver(outbox, server)
    outbox.compact(0)
    at, ids = outbox.at, dict(outbox.ids)
    assert len(outbox.file.read_bytes().splitlines()) == 1
    outbox.close()
    outbox.file.write_bytes(lost)  # the header did not make it
    outbox = spool_in(tmp_path)
    assert (outbox.at, outbox.end, outbox.ids, outbox.waiting) == (at, at, ids, 0)
    assert outbox.run_index.runs["c"].step == 2 and outbox.run_index.left_open() == ["p", "c"]
    for record in STORY[5:]:
        outbox.append(record)
    deliver(outbox, server)
    assert told(server) == expected(STORY, tmp_path / "whole")
    outbox.close()


def test_killed_between_new_state_and_new_file_nothing_counts_twice(tmp_path: Path) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    for record in STORY[:9]:
        outbox.append(record)
    deliver(outbox, server)
    old = outbox.file.read_bytes()
    outbox.compact(0)
    outbox.close()
    outbox.file.write_bytes(old)
    outbox = spool_in(tmp_path)
    assert outbox.waiting == 0 and outbox.at == outbox.end
    calls = server.calls
    deliver(outbox, server)
    assert server.calls == calls
    outbox.close()


def test_what_is_delivered_is_forgotten_and_the_runs_are_not(tmp_path: Path) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    outbox.append(opened("r"))
    for step in range(1, 51):
        outbox.append(row("r", step, m=float(step)))
        if step % 10 == 0:
            deliver(outbox, server)
            outbox.compact(0)
            assert outbox.file.stat().st_size < 200 and outbox.end > 50 * step
    outbox.close()
    outbox = spool_in(tmp_path)
    assert outbox.run_index.runs["r"].step == 50 and list(outbox.ids) == ["r"]
    assert len(server.values(outbox.ids["r"], "m")) == 50
    outbox.close()


def test_a_file_with_undelivered_records_is_not_begun_anew(story: Path, tmp_path: Path) -> None:
    before = story.read_bytes()
    outbox = spool_in(tmp_path)
    outbox.compact(0)
    assert story.read_bytes() == before
    outbox.close()


# --- a disk or a store that misbehaves --------------------------------------------------------


def test_lines_that_a_full_disk_cut_are_written_to_their_end_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    write, room = os.write, [40, 0]

    def full(fd: int, data: bytes) -> int:
        if fd != outbox._fd or not room:
            return write(fd, data)
        if (left := room.pop(0)) == 0:
            raise OSError(28, "No space left on device")
        return write(fd, data[:left])

    monkeypatch.setattr(os, "write", full)
    for record in STORY:
        outbox.append(record)
    deliver(outbox, server)
    assert told(server) == expected(STORY, tmp_path / "whole")
    outbox.close()
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("name", ["create", "batch", "text", "end", "reopen"])
def test_a_store_that_is_away_is_asked_again_and_gets_everything_once(
    name: str, story: Path, tmp_path: Path
) -> None:
    server, outbox, left = Server(), spool_in(tmp_path), [3]

    def away(call: str) -> None:
        if call == name and left[0]:
            left[0] -= 1
            raise ConnectionError("away")

    server.after = away  # it did what it was asked for, and its answer got lost
    said: list[str] = []
    delivery = Delivery(store_of(server), outbox, said.append)
    failed = 0
    while outbox.waiting:
        try:
            assert delivery.step()
        except ConnectionError:
            failed += 1
            assert outbox.at == 0 and outbox.waiting == len(STORY)
    # A run whose making was not heard of is found, and not made again: one failure for each.
    assert failed == (2 if name == "create" else 3)
    assert told(server) == expected(STORY, tmp_path / "whole") and said == []
    outbox.close()


def refused(delivery: Delivery) -> int:
    """How often the store refused before the queue was empty."""
    count = 0
    while True:
        try:
            if not delivery.step():
                return count
        except MlflowException:
            count += 1


def test_a_metric_that_is_refused_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    server, outbox, said = Server(), spool_in(tmp_path), list[str]()
    for record in [opened("r"), row("r", 1, good=1.0, bad=2.0, fine=3.0), row("r", 2, good=2.0)]:
        outbox.append(record)
    outbox.append({"do": "tag", "run": "r", "what": {"bad tag": "x", "outcome": "y"}})
    outbox.append(end("r"))
    outbox.append(opened("other"))
    assert refused(Delivery(store_of(server), outbox, said.append)) == 2
    run = told(server)["r"]
    assert server.values(server.named()["r"], "good") == [(1, 1.0), (2, 2.0)]
    assert server.values(server.named()["r"], "fine") == [(1, 3.0)]
    assert (run["status"], run["tags"]["outcome"]) == ("FINISHED", "y")
    assert "other" in told(server) and said == ["r: bad, bad tag refused: not allowed"]
    outbox.close()


def test_a_parameter_that_was_changed_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    server, outbox, said = Server(), spool_in(tmp_path), list[str]()
    server.after = lambda name: (
        server.runs[f"{0:032x}"]["params"].update(a="0") if name == "create" else None
    )
    outbox.append(opened("r", a="1", b="2"))
    assert refused(Delivery(store_of(server), outbox, said.append)) == 2
    assert told(server)["r"]["params"] == {"a": "0", "b": "2"} and len(said) == 1
    outbox.close()


def test_a_deleted_run_costs_a_bounded_number_of_calls_and_holds_up_nobody(tmp_path: Path) -> None:
    server, outbox, said = Server(), spool_in(tmp_path), list[str]()
    for handle in ("gone", "fine"):
        outbox.append(opened(handle))
    deliver(outbox, server)
    server.runs[server.named()["gone"]]["deleted"] = True
    for step in range(500):
        for handle in ("gone", "fine"):
            outbox.append(row(handle, step, m=float(step)))
    outbox.append(end("fine"))
    server.calls = 0
    assert refused(Delivery(store_of(server), outbox, said.append)) == 2
    assert server.calls < 10 and said == ["gone: row refused: must be in the active state"]
    assert len(server.values(server.named()["fine"], "m")) == 500
    assert told(server)["fine"]["status"] == "FINISHED"
    outbox.close()


def test_a_run_that_is_never_made_takes_only_its_own_records_along(tmp_path: Path) -> None:
    server, outbox, said = Server(), spool_in(tmp_path), list[str]()

    def no_parent(name: str) -> None:
        if name == "create" and not server.runs and server.calls <= 3:
            raise MlflowException("no", INVALID_PARAMETER_VALUE)

    server.before = no_parent
    for record in STORY:
        outbox.append(record)
    assert refused(Delivery(store_of(server), outbox, said.append)) == 2
    assert list(told(server)) == ["c"] and told(server)["c"]["status"] == "FINISHED"
    assert len(said) == 1 and said[0].startswith("p: open refused")
    outbox.close()


def test_an_artifact_that_is_gone_is_said_once_and_the_rest_is_stored(tmp_path: Path) -> None:
    server, outbox, said = Server(), spool_in(tmp_path), list[str]()
    (tmp_path / "here.txt").write_text("here")
    outbox.append(opened("r"))
    for name in ("gone.txt", "here.txt"):
        path = str(tmp_path / name)
        outbox.append({"do": "artifact", "run": "r", "path": path, "folder": "more"})
    deliver(outbox, server, said)
    assert told(server)["r"]["texts"] == {"more/here.txt": "here"}
    assert len(said) == 1 and said[0].startswith(str(tmp_path / "gone.txt"))
    outbox.close()


def test_rows_of_a_chunk_go_in_few_calls_of_a_legal_size(tmp_path: Path) -> None:
    server, outbox = Server(), spool_in(tmp_path)
    outbox.append(opened("r", **{f"p{i}": "x" for i in range(250)}))
    for step in range(100):
        outbox.append(row("r", step, **{f"m{i}": float(i) for i in range(15)}))
    outbox.append(row("r", 100, **{f"m{i}": float(i) for i in range(2500)}))
    deliver(outbox, server)
    assert len(server.runs[outbox.ids["r"]]["points"]) == 1500 + 2500
    # The run; 250 parameters with the first rows; the other rows; the wide row.
    assert server.calls == 1 + 3 + 2 + 4
    outbox.close()


# --- a store that hangs -----------------------------------------------------------------------


def test_a_hanging_store_holds_up_no_caller_and_no_row_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "CHUNK", 1 << 14)
    server, gate, hanging = Server(), threading.Event(), threading.Event()

    def hang(name: str) -> None:
        if name == "batch":
            hanging.set()
            assert gate.wait(60)

    server.before = hang
    outbox = spool_in(tmp_path)
    outbox.append(opened("r"))
    writer = Writer(store_of(server), outbox, None)
    outbox.append(row("r", 0, m=0.0))
    writer.wake()
    assert hanging.wait(60)
    for step in range(1, 20_001):
        outbox.append(row("r", step, m=float(step)))
        writer.wake()
    assert outbox.waiting >= 20_000 and outbox._left == b""
    todo = writer._own._todo
    assert sum(map(len, todo.values())) <= 2 and len(outbox.run_index.runs) == 1
    gate.set()
    assert writer.wait(lambda: outbox.waiting == 0, 120.0)
    assert server.values(server.named()["r"], "m") == [(s, float(s)) for s in range(20_001)]
    assert server.largest <= 1 << 14
    writer.stop()


def test_chunks_are_bounded_and_a_longer_line_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "CHUNK", 1000)
    outbox = spool_in(tmp_path)
    for step in range(100):
        outbox.append(row("r", step, m=1.0))
    outbox.append({"do": "text", "run": "r", "text": "x" * 5000, "file": "long.txt"})
    seen: list[int] = []
    while True:
        records, until, lines = outbox.read()
        if not lines:
            break
        assert sum(len(json.dumps(r)) + 1 for r in records) <= 1000 or len(records) == 1
        seen.append(lines)
        outbox.delivered(until, lines)
    assert sum(seen) == 101 and seen[-1] == 1 and len(seen) > 5
    outbox.close()


# --- what dead processes left -----------------------------------------------------------------


def left(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    outbox = spool_in(folder, name)
    for record in records:
        outbox.append(record)
    outbox.close()


def written(
    server: Server, folder: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Run a writer over a folder until nothing is left to do; returns the files that remain."""
    monkeypatch.setattr(writers, "FIRST_RETRY", 0.01)
    outbox = spool_in(folder, "own.jsonl")
    for record in records:
        outbox.append(record)
    writer = Writer(store_of(server), outbox, folder)
    assert writer.settle(60.0)
    writer.stop()
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_orphans_are_delivered_their_runs_killed_and_their_files_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = Server(), tmp_path / ".mlflow"
    folder.mkdir()
    left(folder, "a.jsonl", [opened("a"), row("a", 1, m=1.0)])
    left(folder, "b.jsonl", [opened("b"), end("b", "FAILED")])
    left(folder, "c.jsonl", [])
    assert written(server, folder, [opened("own"), end("own")], monkeypatch) == []
    found = {name: run["status"] for name, run in told(server).items()}
    assert found == {"own": "FINISHED", "a": "KILLED", "b": "FAILED"}
    assert list(server.named())[0] == "own"  # one's own first
    assert not folder.exists()


def test_spools_of_living_processes_and_of_other_stores_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = Server(), tmp_path / ".mlflow"
    folder.mkdir()
    living = spool_in(folder, "living.jsonl")
    living.append(opened("living"))
    other = Outbox(folder / "other.jsonl", "elsewhere", "tests")
    other.append(opened("other"))
    other.close()
    (folder / "new.jsonl").touch()  # being made just now
    remain = written(server, folder, [], monkeypatch)
    assert remain == ["living.jsonl", "living.state", "new.jsonl", "other.jsonl", "other.state"]
    assert server.runs == {}
    living.close()
    assert "living.jsonl" not in written(server, folder, [], monkeypatch)
    assert told(server)["living"]["status"] == "KILLED"


def test_the_status_of_a_run_that_is_continued_is_not_the_orphans_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = Server(), tmp_path / ".mlflow"
    folder.mkdir()
    outbox = spool_in(folder, "old.jsonl")
    outbox.append(opened("r"))
    deliver(outbox, server)
    run_id = outbox.ids["r"]
    outbox.append(row("r", 1, m=1.0))
    outbox.append(end("r", "FAILED"))
    outbox.close()
    own = [{"do": "adopt", "run": "x", "id": run_id}, {"do": "reopen", "run": "x"}]
    outbox = spool_in(folder, "new.jsonl")
    for record in own:
        outbox.append(record)
    writer = Writer(store_of(server), outbox, folder)
    assert writer.settle(60.0)
    assert server.runs[run_id]["status"] == "RUNNING"
    assert server.values(run_id, "m") == [(1, 1.0)]
    writer.stop()
    outbox = spool_in(folder, "new.jsonl")
    assert outbox.run_index.left_open() == ["x"]
    outbox.close()


def test_two_writers_on_one_folder_deliver_every_orphan_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = Server(), tmp_path / ".mlflow"
    folder.mkdir()
    for number in range(6):
        left(folder, f"{number}.jsonl", [opened(f"r{number}"), row(f"r{number}", 1, m=1.0)])
    made = [spool_in(folder, f"own{i}.jsonl") for i in range(2)]
    pair = [Writer(store_of(server), outbox, folder) for outbox in made]
    assert all(writer.settle(60.0) for writer in pair)
    for writer in pair:
        writer.stop()
    assert {name: run["status"] for name, run in told(server).items()} == {
        f"r{number}": "KILLED" for number in range(6)
    }
    assert not folder.exists()


def test_the_key_of_a_spool_can_be_looked_for_whatever_its_folder_is_called(
    tmp_path: Path,
) -> None:
    for name in ("it's", 'a"b', "a`b\\", "plain-1.x_y"):
        folder = tmp_path / name
        folder.mkdir()
        outbox = spool_in(folder)
        assert not set("'\"`\\") & set(outbox.key)
        outbox.close()
    assert outbox.key.startswith("plain-1.x_y-")


def test_one_spool_has_one_owner_and_a_removed_one_is_made_anew(tmp_path: Path) -> None:
    outbox = spool_in(tmp_path)
    with pytest.raises(OutboxBusy):
        spool_in(tmp_path)
    assert list(orphans(tmp_path, "memory", "tests")) == []
    outbox.append(opened("r"))
    outbox.remove()
    fresh = spool_in(tmp_path)
    assert fresh.key != outbox.key and fresh.run_index.runs == {} and fresh.waiting == 0
    fresh.close()
    outbox.close()
