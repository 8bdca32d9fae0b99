"""A file that is replaced is the old one or the new one, whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytrain.core.files import atomic_writer, write_atomically


def test_an_error_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    write_atomically(file, "old")
    with pytest.raises(OSError, match="No space"), atomic_writer(file) as new:
        new.write(b"torn")
        new.flush()
        assert file.read_text() == "old"
        raise OSError("No space left on device")
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("durable", [True, False])
def test_the_new_file_is_on_the_disk_before_it_takes_the_name(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (calls.append(self.read_text()), replace(self, to))
    )
    file = tmp_path / "file"
    file.write_text("old, and longer")
    write_atomically(file, "grün", durable)
    assert calls == (["fsync"] if durable else []) + ["grün"] and file.read_text() == "grün"
