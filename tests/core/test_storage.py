"""A storage behind a URL: what one machine writes another reads, whole, or the version before it."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raytrain.core import file_systems, storage, working_copy
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import StorageError, without_secrets
from raytrain.core.files import write_atomically
from raytrain.core.storage import check, later, local_root, pull, push, remove, tidy, url_of


class Machines:
    """Working copies of one storage, each on a machine of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        self.store = folder / "store"
        self.url = self.store.as_uri()

    def on(self, machine: str) -> Path:
        self._patch.setenv(storage.CACHE, str(self.folder / machine))
        return local_root(self.url)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    monkeypatch.setattr(file_systems.time, "sleep", lambda seconds: None)
    return Machines(tmp_path, monkeypatch)


def failing(patch: pytest.MonkeyPatch, times: int, what: str = "write") -> list[str]:
    """Make the storage fail so many times; returns the paths that were tried."""
    tried: list[str] = []
    actual = getattr(working_copy, what)

    def operation(fs: Any, at: str, *content: Any) -> Any:
        tried.append(at)
        if len(tried) <= times:
            raise OSError(5, "it fails")
        return actual(fs, at, *content)

    for module in (storage, working_copy):
        patch.setattr(module, what, operation)
    return tried


def test_a_plain_folder_is_its_own_root_and_nothing_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_atomically(file, "1")
    push(tmp_path)
    pull(tmp_path)
    check(tmp_path)
    assert local_root(tmp_path) == tmp_path and url_of(file) is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_written_file_is_in_the_storage_and_on_another_machine(machines: Machines) -> None:
    first = machines.on("first")
    write_atomically(first / "run" / "run.yaml", "seed: 1\n")
    assert (machines.store / "run" / "run.yaml").read_text() == "seed: 1\n"
    assert url_of(first / "run") == f"{machines.url}/run"
    second = machines.on("second")
    assert second != first and not (second / "run").exists()
    pull(second / "run")
    assert (second / "run" / "run.yaml").read_text() == "seed: 1\n"


def test_files_that_are_appended_to_are_copied_when_asked_and_hidden_ones_never(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machines.on("first")
    (root / ".scratch").mkdir()
    (root / ".scratch" / "a").write_text("x")
    (root / "rows.jsonl").write_text("1\n")
    push(root)
    with (root / "rows.jsonl").open("a") as rows:
        rows.write("2\n")
    tried = failing(monkeypatch, 0)
    push(root)
    assert (machines.store / "rows.jsonl").read_text() == "1\n2\n"
    assert [Path(at).name for at in tried] == ["rows.jsonl.sha256", "rows.jsonl"]
    push(root)
    assert len(tried) == 2 and not (machines.store / ".scratch").exists()


def test_a_damaged_checkpoint_is_replaced_by_the_version_before_it(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    first = machines.on("first")
    for content in ("epoch 1", "epoch 2", "epoch 3"):
        write_atomically(first / "last.pt", content)
    (machines.store / "last.pt").write_text("epoch 3 with a flipped bit")
    second = machines.on("second")
    pull(second)
    assert (second / "last.pt").read_text() == "epoch 2"
    assert "does not match its checksum" in capsys.readouterr().err
    (machines.store / "last.pt.previous").write_text("this one too")
    third = machines.on("third")
    with pytest.raises(StorageError, match="no sound version before it"):
        pull(third)
    assert not (third / "last.pt").exists()


def test_an_upload_that_was_cut_off_leaves_the_version_before_it_sound(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machines.on("first")
    write_atomically(first / "last.pt", "epoch 1")
    actual = working_copy.write

    def cut_off(fs: Any, at: str, content: Any) -> None:
        if at.endswith(".pt"):
            raise KeyboardInterrupt
        actual(fs, at, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(working_copy, "write", cut_off)
        for epoch in (2, 3):
            with suppress(KeyboardInterrupt):
                write_atomically(first / "last.pt", f"epoch {epoch}")
        raise KeyboardInterrupt
    second = machines.on("second")
    pull(second)
    assert (second / "last.pt").read_text() == "epoch 1"
    pull(first)  # here the newer one is whole
    assert (first / "last.pt").read_text() == "epoch 3"
    push(first)
    pull(second)
    assert (second / "last.pt").read_text() == "epoch 3"


def test_a_file_is_not_replaced_by_one_that_was_cut_off_while_it_was_written(
    machines: Machines,
) -> None:
    root = machines.on("first")
    write_atomically(root / "rows.json", "[1]")

    def content() -> Iterator[bytes]:
        yield b"[1, "
        raise KeyboardInterrupt

    fs, base = file_systems.file_system(machines.url)
    with pytest.raises(KeyboardInterrupt):
        file_systems.write(fs, f"{base}/rows.json", content())
    assert (machines.store / "rows.json").read_text() == "[1]"
    second = machines.on("second")
    pull(second)  # what is left of it is no file of the storage
    assert (second / "rows.json").read_text() == "[1]"


def test_what_another_machine_has_written_since_wins_over_what_was_left_here(
    machines: Machines,
) -> None:
    first, second = machines.on("first"), machines.on("second")
    write_atomically(first / "last.pt", "epoch 1")
    pull(second)
    (first / "last.pt").write_text("epoch 2, of a node that died before it was copied")
    write_atomically(second / "last.pt", "epoch 2")
    pull(first)
    assert (first / "last.pt").read_text() == "epoch 2"


def test_what_was_left_here_does_not_replace_what_another_machine_has_written_since(
    machines: Machines,
) -> None:
    first, second = machines.on("first"), machines.on("second")
    write_atomically(first / "last.pt", "epoch 1")
    (first / "last.pt").write_text("epoch 2, of a node that died before it was copied")
    pull(second)
    write_atomically(second / "last.pt", "epoch 9")
    push(first)
    assert (machines.store / "last.pt").read_text() == "epoch 9"


def test_work_that_could_not_be_copied_is_kept_though_an_upload_before_it_was_cut_off(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = machines.on("first"), machines.on("second")
    write_atomically(first / "last.pt", "epoch 1")
    digest = hashlib.sha256(b"epoch 2, cut off").hexdigest()
    checksums = machines.store / "last.pt.sha256"
    checksums.write_text(f"{digest}\n{checksums.read_text()}")
    pull(second)
    with monkeypatch.context() as patch, later():
        failing(patch, 10**6)
        write_atomically(second / "last.pt", "epoch 3")
    pull(second)
    assert (second / "last.pt").read_text() == "epoch 3"
    push(second)
    assert (machines.store / "last.pt").read_text() == "epoch 3"


def test_a_storage_that_fails_for_a_while_is_tried_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machines.on("first")
    failing(monkeypatch, file_systems._TRIES - 1)
    write_atomically(root / "last.pt", "epoch 1")
    assert (machines.store / "last.pt").read_text() == "epoch 1"


def test_a_storage_that_stays_away_is_an_error_of_writing_and_keeps_what_it_had(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machines.on("first")
    write_atomically(root / "last.pt", "epoch 1")
    with monkeypatch.context() as patch:
        failing(patch, 10**6)
        with pytest.raises(OSError, match="it fails"):
            write_atomically(root / "last.pt", "epoch 2")
        with pytest.raises(RequestError, match="storage: .* cannot be written"):
            check(root)
    assert (machines.store / "last.pt").read_text() == "epoch 1"
    second = machines.on("second")
    pull(second)
    assert (second / "last.pt").read_text() == "epoch 1"


def test_files_that_were_not_written_by_a_push_are_left_out(machines: Machines) -> None:
    write_atomically(machines.on("first") / "a" / "run_id", "1")
    (machines.store / "a" / "note.txt").write_text("of another program")
    second = machines.on("second")
    pull(second / "a")
    assert [file.name for file in (second / "a").iterdir()] == ["run_id"]


def test_only_wanted_files_are_brought_and_removed_ones_stay_away(machines: Machines) -> None:
    first = machines.on("first")
    for name in ("a/run_id", "a/last.pt", "b/run_id"):
        write_atomically(first / name, name)
    second = machines.on("second")
    pull(second, lambda file: file.name == "run_id")
    assert sorted(f.relative_to(second).as_posix() for f in second.rglob("*") if f.is_file()) == [
        ".storage-url",
        "a/run_id",
        "b/run_id",
    ]
    remove(first / "a" / "last.pt")
    pull(second)
    assert not (second / "a" / "last.pt").exists() and not list(machines.store.rglob("last*"))


def test_a_file_system_of_fsspec_serves_where_pyarrow_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "first"))
    url = f"memory://{tmp_path.name}/runs"
    write_atomically(local_root(url) / "run" / "last.pt", "epoch 1")
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "second"))
    pull(local_root(url))
    assert (local_root(url) / "run" / "last.pt").read_text() == "epoch 1"


@pytest.mark.parametrize("url", ["nosuch://bucket/runs", "hdfs+x://a/b"])
def test_a_url_without_a_file_system_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="storage: no file system for .*; expected"):
        local_root(url)


@pytest.mark.parametrize("url", ["s3://", "file://tmp/x", "file:///a#b", "file:///a?b"])
def test_a_url_that_would_mean_another_folder_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="storage: .* is not a URL of a folder; expected"):
        local_root(url)


def test_a_name_that_ends_in_a_dot_is_a_name(machines: Machines) -> None:
    write_atomically(machines.on("first") / "s." / "run_id", "1")
    second = machines.on("second")
    pull(second / "s.")
    assert (second / "s." / "run_id").read_text() == "1"
    assert url_of(second) == machines.url


def test_secrets_in_a_url_are_refused_and_its_settings_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    with pytest.raises(RequestError, match="^storage: the URL is recorded; expected") as refusal:
        local_root("s3://KEY:p4ss@bucket/runs?endpoint_override=127.0.0.1:1")
    assert "p4ss" not in str(refusal.value)
    root = local_root("s3://bucket/runs?endpoint_override=127.0.0.1:1")
    assert url_of(root / "x") == "s3://bucket/runs/x"
    assert (root / ".storage-url").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("s3://bucket/runs@home/a:b@c?region=x@y", "s3://bucket/runs@home/a:b@c"),
        ("hdfs://host:8020/user/a@b", "hdfs://host:8020/user/a@b"),
        ("hdfs://user@host:8020/a@b", "hdfs://host:8020/a@b"),
        ("s3://KEY:se/cr?t@bucket/runs", "s3://bucket/runs"),
        ("s3://KEY:se@cr:t@bucket/runs", "s3://bucket/runs"),
    ],
)
def test_a_url_is_shown_whole_but_for_its_user_password_and_settings(url: str, seen: str) -> None:
    assert without_secrets(url) == seen
    if "KEY" in url:
        with pytest.raises(RequestError, match="^storage: the URL is recorded"):
            local_root(url)


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working copy of a storage that takes connections and never answers."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(file_systems, "_SILENT", 1.0)
    monkeypatch.setattr(file_systems, "_SLOW", 0.1)
    monkeypatch.setattr(file_systems, "_TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        yield local_root(f"s3://bucket/{where}?endpoint_override={where}&scheme=http&region=x")


def test_a_storage_that_takes_requests_and_answers_none_is_named_before_it_is_given_up(
    silent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StorageError, match="s3://bucket.*: AWS Error NETWORK_CONNECTION"):
        pull(silent)
    assert "does not answer (AWS Error NETWORK_CONNECTION" in capsys.readouterr().err


@pytest.mark.parametrize(("away", "calls"), [(False, 1), (True, 0)])
def test_after_a_signal_a_storage_is_tried_once_and_one_that_does_not_answer_never(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, away: bool, calls: int
) -> None:
    root = machines.on("first")
    with monkeypatch.context() as patch:
        patch.setattr(file_systems, "_away", {machines.url} if away else set())
        patch.setattr(file_systems, "interrupted", lambda: True)
        tried: list[str] = []

        def fails(fs: Any, at: str) -> None:
            tried.append(at)
            raise OSError(5, "it fails")

        with pytest.raises(StorageError):
            file_systems.retried(machines.url, "x", fails)
        assert len(tried) == calls
        if not away:  # work that is finished is still copied
            write_atomically(root / "last.pt", "epoch 1")
            assert (machines.store / "last.pt").read_text() == "epoch 1"


def test_what_writes_that_were_cut_off_have_left_is_deleted_once_it_is_a_day_old(
    machines: Machines,
) -> None:
    root = machines.on("first")
    write_atomically(root / "run" / "last.pt", "epoch 1")
    day_ago = time.time() - 90_000
    left = [".last.pt.12.1f0a", ".run.yaml.7", ".last.pt.3.pulled"]
    own = ["last.pt.12", ".mlflow", ".synced", ".v1.2b"]  # no such names
    for folder in (root / "run", machines.store / "run"):
        (folder / "trials").mkdir()
        for name in (*left, *own, "trials/.best.pt.9"):
            (folder / name).write_text("x")
            os.utime(folder / name, (day_ago, day_ago))
        (folder / ".best.pt.12").write_text("of a process at work")
    tidy(root / "run")
    for folder in (root / "run", machines.store / "run"):
        found = {path.name for path in folder.rglob("*") if path.is_file()}
        assert found - {"last.pt.sha256"} == {"last.pt", *own, ".best.pt.12"}


def test_a_storage_is_looked_at_without_a_write_to_it(machines: Machines) -> None:
    root = machines.on("first")
    check(root, writes=False)
    assert not machines.store.exists()
