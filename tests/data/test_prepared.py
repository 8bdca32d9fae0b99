"""Parquet images are read once per machine; decoded ahead they give the batches of images in memory."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.types import Batch
from raytrain.data import parquet, prepared
from raytrain.data.images import ImageSet
from raytrain.data.loader import SplitShard, iter_eval, iter_train, open_splits, open_test
from raytrain.data.prepared import ParquetSplit, open_images
from raytrain.data.read_ahead import in_processes
from raytrain.data.reading import Selection, images_of
from raytrain.data.sources import describe, read
from raytrain.data.spec import DataSpec
from raytrain.tracking.data_sets import as_input, digest
from raytrain.training.trainer import fit

NUM_IMAGES = 90


def in_this_process(read: Callable[..., Tensor], requests: Sequence[Any]) -> Generator[Tensor]:
    yield from (read(*request) for request in requests)


def _jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training files, of JPEG in grey and of arrays in colour, and a test file; a cache of their own."""
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "_WORTH_KEEPING", 0)
    rng = np.random.default_rng(0)
    grey = pa.array([_jpeg(i) for i in rng.integers(0, 256, (30, 12, 12), np.uint8)])
    colour = [i.tolist() for i in rng.integers(0, 256, (30, 3, 12, 12), np.uint8)]
    coloured = [_jpeg(i) for i in rng.integers(0, 256, (30, 3, 12, 12), np.uint8)]
    data = tmp_path / "data"
    data.mkdir()
    for name, images in {
        "train-0": grey,
        "train-1": pa.array(colour),
        "train-2": pa.array(coloured),
        "test": pa.array(coloured[::-1]),
    }.items():
        labels = pa.array([k % 3 for k in range(30)])
        pq.write_table(
            pa.table({"image": images, "label": labels}),
            data / f"{name}.parquet",
            row_group_size=7,
        )
    return data


def _split(folder: Path, **changes: Any) -> ParquetSplit:
    files = sorted(folder.glob("train*.parquet"))
    return ParquetSplit(
        **{"files": files, "image": None, "label": None, "like": None, "training": True} | changes
    )


def _all(images: ImageSet) -> Tensor:
    return images.pixels[torch.arange(len(images.labels))]


@pytest.mark.parametrize("in_memory", [True, False])
def test_prepared_images_are_those_of_the_files(
    folder: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = _split(folder).read(), open_images(_split(folder), in_memory, 0)
    monkeypatch.setattr(ParquetSplit, "rows", None)  # it is not read a second time
    again = open_images(_split(folder), in_memory, 0)
    for images in (first, again):
        assert torch.equal(_all(images), _all(plain)) and torch.equal(images.labels, plain.labels)
        assert (images.classes, images.origin) == (plain.classes, plain.origin)
        assert describe(images) == describe(plain) and images.is_shared
        assert tuple(images.pixels.shape) == (NUM_IMAGES, 3, 12, 12)
        assert isinstance(images.pixels, Tensor) == in_memory


def test_they_are_in_memory_if_they_fit(folder: Path) -> None:
    size = NUM_IMAGES * 12 * 12  # the first image is grey, and they are as many as it says
    assert isinstance(open_images(_split(folder), None, size).pixels, Tensor)
    assert not isinstance(open_images(_split(folder), None, size - 1).pixels, Tensor)


@pytest.mark.parametrize("in_memory", [True, False])
def test_changed_files_are_read_again(folder: Path, in_memory: bool) -> None:
    before = open_images(_split(folder), in_memory, 0)
    kept = _all(before)
    table = pq.read_table(folder / "train-2.parquet")
    pq.write_table(table.slice(1), folder / "train-2.parquet")
    after = open_images(_split(folder), in_memory, 0)
    assert len(after.labels) == NUM_IMAGES - 1 and torch.equal(_all(before), kept)
    assert len(list((folder.parent / "cache" / "data" / "prepared").glob("[!.]*"))) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_copy_that_was_cut_off_is_made_anew(folder: Path, in_memory: bool) -> None:
    whole = _all(open_images(_split(folder), in_memory, 0))
    (copy,) = (folder.parent / "cache").glob("data/prepared/*/[pi]*[bw]*")
    copy.write_bytes(copy.read_bytes()[:100])
    assert torch.equal(_all(open_images(_split(folder), in_memory, 0)), whole)


def test_a_cache_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "cache").write_text("a file, where a folder is expected")
    images = open_images(_split(folder), True, 0)
    assert torch.equal(_all(images), _all(_split(folder).read()))
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"^data\.in_memory: .*\(Not a directory\); expected"):
        open_images(_split(folder), False, 0)


def test_faulty_files_leave_nothing_behind(folder: Path) -> None:
    table = pq.read_table(folder / "train-0.parquet")
    broken = pa.table(
        {"image": [*table["image"].to_pylist()[:-1], b"no"], "label": table["label"]}
    )
    pq.write_table(broken, folder / "train-0.parquet")
    for _ in range(2):
        with pytest.raises(RequestError, match="column 'image', row 29: expected an image that"):
            open_images(_split(folder), False, 0)
    assert not list((folder.parent / "cache" / "data" / "prepared").glob("[!.]*"))


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    open_images(_split(folder), False, 0)
    (copy,) = (folder.parent / "cache" / "data" / "prepared").glob("[!.]*")
    left = copy.rename(copy.with_name(f".{copy.name}.{os.getpid()}"))  # ids are given again
    assert torch.equal(_all(open_images(_split(folder), False, 0)), _all(_split(folder).read()))
    assert not left.exists()


def test_without_a_home_folder_images_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAYTRAIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("no home")))
    assert len(open_images(_split(folder), True, 0).labels) == NUM_IMAGES
    assert "cannot be written (this user has no home folder)" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"\(this user has no home folder\); expected"):
        open_images(_split(folder), False, 0)


def test_large_images_are_read_a_few_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _split(folder).read()
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 5 * 12 * 12)
    sizes: list[int] = []
    rows = _split(folder).rows(lambda images: sizes.append(len(images.pixels)))
    assert max(sizes) == 5 and sum(sizes) == NUM_IMAGES  # one row, of colour
    assert np.array_equal(rows.levels, cast("np.ndarray", plain.levels))


def test_columns_of_test_images_are_those_of_training_images(folder: Path) -> None:
    table = pq.read_table(folder / "test.parquet")
    for place, name in enumerate(("thumb", "other")):
        table = table.add_column(place, name, table["image"])
    table = table.rename_columns(["thumb", "other", "jpeg", "label"])
    pq.write_table(table, folder / "test.parquet")
    for file in folder.glob("train*"):
        pq.write_table(pq.read_table(file).rename_columns(["jpeg", "label"]), file)
    found = open_test(DataSpec(name=str(folder)), DistributedContext())[0]
    assert found.num_images == 30


# --- batches ----------------------------------------------------------------------------------


def _shards(folder: Path, rank: int, world: int) -> list[tuple[SplitShard, SplitShard]]:
    """Training and validation images of one worker, in memory and decoded ahead."""
    found = []
    for in_memory in (True, False):
        spec = DataSpec(name=str(folder), in_memory=in_memory, validation=12)
        context = DistributedContext(rank=rank, world=world, read_ahead=in_this_process)
        splits = open_splits(spec, context)
        assert (splits.train.reader is None) == in_memory
        found.append((splits.train, splits.valid))
    return found


def _assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others) > 1
    for one, other in zip(batches, others, strict=True):
        for name in ("images", "labels", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.rng.uniform("start", 2), other.rng.uniform("start", 2))
        assert (one.view is None) == (other.view is None)
        for name in ("top", "left", "mirrored") if one.view and other.view else ():
            assert torch.equal(getattr(one.view, name), getattr(other.view, name))


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_decoded_ahead_are_those_of_images_in_memory(
    folder: Path, rank: int, world: int
) -> None:
    (train, valid), (far_train, far_valid) = _shards(folder, rank, world)
    for first in (0, 2):
        _assert_equal(
            list(iter_train(train, 8, 3, 1, 2, True, first)),
            list(iter_train(far_train, 8, 3, 1, 2, True, first)),
        )
    _assert_equal(list(iter_eval(valid, 5, 0)), list(iter_eval(far_valid, 5, 0)))
    index = torch.arange(rank, 30, world)
    assert torch.equal(train.read(index), far_train.read(index))


def test_processes_decode_in_order_and_end_with_the_iterator(folder: Path) -> None:
    images_of.cache_clear()
    spec = DataSpec(name=str(folder), in_memory=False)
    far, near = (
        open_splits(spec, DistributedContext(read_ahead=ahead)).train
        for ahead in (None, in_this_process)
    )
    _assert_equal(
        list(iter_train(far, 8, 0, 0, 2, True)), list(iter_train(near, 8, 0, 0, 2, True))
    )
    batches = iter_train(far, 8, 0, 0, 2, True)
    next(batches)
    cast("Generator[Batch]", batches).close()


def _ends(number: int) -> Tensor:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("No space left")


class _Unshared(Tensor):
    def share_memory_(self) -> Any:
        raise RuntimeError("unable to allocate shared memory")


def _unshared() -> Tensor:
    return torch.zeros(2).as_subclass(_Unshared)


def test_a_process_without_shared_memory_is_not_waited_for() -> None:
    with pytest.raises(TrainingFailed, match="unable to allocate shared memory"):
        list(in_processes(_unshared, [()]))


@pytest.mark.parametrize(
    ("number", "reason"), [(1, "OSError: No space left"), (2, "DataLoader worker")]
)
def test_a_process_that_fails_is_explained_in_one_line(number: int, reason: str) -> None:
    with pytest.raises(
        TrainingFailed, match=rf"^a process that .*{reason}.* expected memory"
    ) as found:
        list(in_processes(_ends, [(number,)]))
    assert "\n" not in str(found.value)


def test_other_images_in_another_process_are_refused(folder: Path) -> None:
    images_of.cache_clear()
    spec = DataSpec(name=str(folder), in_memory=False)
    train = open_splits(spec, DistributedContext(read_ahead=in_this_process)).train
    table = pq.read_table(folder / "train-2.parquet")
    pq.write_table(table.slice(1), folder / "train-2.parquet")
    images_of.cache_clear()  # as in a process that begins later
    with pytest.raises(TrainingFailed, match=r"^data\.name: .* has changed since the run began"):
        next(iter_train(train, 8, 0, 0, 2, True))
    images_of.cache_clear()


def test_test_images_are_decoded_where_they_are_read(folder: Path) -> None:
    near, far = (
        open_test(DataSpec(name=str(folder), in_memory=given), DistributedContext())[0]
        for given in (True, False)
    )
    assert far.reader is not None and far.bytes_in_memory == 8 * 30
    assert torch.equal(near.read(torch.arange(30)), far.read(torch.arange(30)))
    assert digest(near.pixels, near.labels) == digest(far.pixels, far.labels)
    first = [
        as_input(DataSpec(), "test", Selection(images, torch.arange(count)), far.labels[:count])
        for images in (far.pixels, cast("Selection", far.pixels).images)
        for count in (20, 10)
    ]
    assert first[:2] == first[2:] and first[0]["digest"] != first[1]["digest"]
    one = as_input(DataSpec(), "test", Selection(near.pixels, torch.arange(20)), near.labels[:20])
    assert one["digest"] == digest(near.pixels[torch.arange(20)], near.labels[:20])


@pytest.mark.parametrize("algorithm", ["atta", "free", "trades"])
def test_training_is_the_same_bit_by_bit(folder: Path, algorithm: str) -> None:
    weights = []
    for in_memory in (True, False):
        words = [
            f"data.name={folder}",
            f"data.in_memory={str(in_memory).lower()}",
            f"algorithm={algorithm}",
            "data.pad=2",
            "data.flip=true",
            "data.validation=12",
            "batch_size=16",
            "epochs=2",
            "model=small_cnn",
        ]
        run = as_run(None, words)
        (*_, (_, state)) = fit(run, DistributedContext(read_ahead=in_this_process))
        weights.append([p.detach().clone() for p in state.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_other_data_sets_are_always_in_memory() -> None:
    with pytest.raises(RequestError, match=r"^data\.in_memory: expected nothing here, digits"):
        read("digits", "train", in_memory=False)
