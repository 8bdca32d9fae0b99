"""Parquet files behind a URL: the same images as those of a path, brought once for each machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytrain.core.errors import RequestError
from raytrain.core.storage import CACHE
from raytrain.data import remote
from raytrain.data.sources import read
from raytrain.data.spec import DataSpec


def write(folder: Path, *names: str, value: int = 0) -> None:
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = [[[value + k] * 4] * 3 + [[50 * row] * 4] for row in range(5)]
        pq.write_table(pa.table({"image": pixels, "label": list(range(5))}), path)


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are brought, in a cache of their own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    names: list[str] = []
    actual = remote.download

    def download(fs: Any, at: str, file: Path) -> None:
        names.append(Path(at).name)
        actual(fs, at, file)

    monkeypatch.setattr(remote, "download", download)
    return names


@pytest.mark.parametrize("name", ["train.parquet", ""])
def test_a_url_is_read_as_its_path_is(name: str, tmp_path: Path, brought: list[str]) -> None:
    store = tmp_path / "store"
    write(store, "train.parquet", "test.parquet", "unread/.hidden/train.parquet")
    path = str(store / name) if name else str(store)
    for split in ("train", "test"):
        here, there = read(path, split), read(Path(path).as_uri(), split)
        assert torch.equal(here.whole, there.whole) and torch.equal(here.labels, there.labels)
    assert sorted(brought) == ["test.parquet", "train.parquet"]  # once, for both splits


def test_a_file_that_has_changed_is_brought_again(tmp_path: Path, brought: list[str]) -> None:
    store = tmp_path / "store"
    write(store, "train.parquet")
    url = (store / "train.parquet").as_uri()
    first = read(url, "train").whole
    write(store, "train.parquet", value=7)
    os.utime(store / "train.parquet", ns=(1, 1))
    second = read(url, "train").whole
    assert len(brought) == 2 and not torch.equal(first, second)
    assert torch.equal(second, read(str(store / "train.parquet"), "train").whole)


@pytest.mark.parametrize("name", ["nothing/train.parquet", "nothing"])
def test_a_url_that_leads_nowhere_is_refused(
    name: str, tmp_path: Path, brought: list[str]
) -> None:
    with pytest.raises(RequestError, match="^data.name: .*expected"):
        read((tmp_path / name).as_uri(), "train")
    assert brought == []


def test_workers_read_the_url_that_was_given() -> None:
    url = "s3://bucket/train.parquet"
    assert DataSpec(name=url).located().name == url


def test_the_test_set_may_have_a_url_of_its_own_and_is_never_trained_on(
    tmp_path: Path, brought: list[str]
) -> None:
    write(tmp_path / "one", "a.parquet", "b.parquet", "more/c.parquet")
    write(tmp_path / "two", "held.parquet", value=9)
    one, two = (tmp_path / "one").as_uri(), (tmp_path / "two" / "held.parquet").as_uri()
    apart = read(one, "test", test_path=two)
    assert torch.equal(apart.whole, read(str(tmp_path / "two/held.parquet"), "train").whole)
    for held in ("b.parquet", "more/c.parquet"):  # also where it lies among the training images
        there = read(one, "train", test_path=f"{one}/{held}")
        here = read(str(tmp_path / "one"), "train", test_path=tmp_path / "one" / held)
        assert torch.equal(there.whole, here.whole) and len(here.whole) == 10
        assert len(read(one, "test", test_path=f"{one}/{held}").whole) == 5
    assert sorted(brought) == ["a.parquet", "b.parquet", "c.parquet", "held.parquet"]
    with pytest.raises(RequestError, match="^data.test_path: .*cannot be read"):
        read(one, "test", test_path=(tmp_path / "nothing.parquet").as_uri() + "/x.parquet")
    spec = DataSpec(name=one, test_path=two).located()
    assert spec.test_path == two and DataSpec(test_path="x.parquet").test_path == Path("x.parquet")
