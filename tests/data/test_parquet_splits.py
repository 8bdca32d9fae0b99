"""Which files are training images and which are test images: by name, by folder, by test_path."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrain.core.errors import RequestError
from raytrain.data.sources import Split, read

FIVE = list(range(5))


def _write(folder: Path, *names: str) -> None:
    """Files that can be told apart: file k holds five images whose first pixel is k."""
    for mark, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = [[[mark] * 4] * 3 + [[50 * row] * 4] for row in FIVE]
        pq.write_table(pa.table({"image": pixels, "label": FIVE}), path)


def _marks(name: Path, split: Split, test_path: Path | None = None) -> list[int]:
    pixels = read(str(name), split, test_path=test_path).whole
    assert len(pixels) % 5 == 0
    return pixels[::5, 0, 0, 0].tolist()


FOLDERS = {  # files -> those of the training images, those of the test images
    ("train.parquet", "test.parquet"): ([0], [1]),
    ("test.parquet", "train-1.parquet", "train-0.parquet"): ([2, 1], [0]),
    ("b.parquet", "a.parquet", "test.parquet"): ([1, 0], [2]),
    ("train/x.parquet", "train/y.parquet", "test/x.parquet"): ([0, 1], [2]),
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"): ([0], [1]),
    ("data/train-0.parquet", "data/test-0.parquet", "data/validation-0.parquet"): ([0], [1]),
    ("a.parquet", "val.parquet", "validation.parquet", "test.parquet"): ([0], [3]),
    ("train.parquet", "values.parquet", "test.parquet"): ([0], [2]),
    ("pretraining/a_test.parquet", "pretraining/a_train.parquet"): ([1], [0]),
    ("train_test_split/train.parquet", "train_test_split/test.parquet"): ([0], [1]),
    (".cache/train.parquet", "Train.parquet", "TEST.parquet"): ([1], [2]),
}


@pytest.mark.parametrize("names", FOLDERS)
def test_a_folder_is_split_by_the_names_in_it(names: tuple[str, ...], tmp_path: Path) -> None:
    _write(tmp_path, *names)
    train, test = FOLDERS[names]
    assert _marks(tmp_path, "train") == train
    assert _marks(tmp_path, "test") == test


FILES = {  # the file named and those beside it -> those of the test images
    ("train.parquet", "test.parquet"): [1],
    ("train.parquet", "test.parquet", "other_test.parquet"): [1],
    ("a_train.parquet", "b_train.parquet", "a_test.parquet", "b_test.parquet"): [2],
    (
        "train-00000-of-00001.parquet",
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    ): [
        1,
        2,
    ],
    ("all.parquet", "held_test.parquet"): [1],
    ("a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "test.parquet"): [2],
}


@pytest.mark.parametrize("names", FILES)
def test_a_file_finds_the_test_file_beside_it(names: tuple[str, ...], tmp_path: Path) -> None:
    _write(tmp_path, *names)
    assert _marks(tmp_path / names[0], "train") == [0]
    assert _marks(tmp_path / names[0], "test") == FILES[names]


def test_a_folder_called_train_finds_the_folder_called_test(tmp_path: Path) -> None:
    _write(tmp_path, "train/0.parquet", "test/0.parquet", "test/1.parquet")
    assert _marks(tmp_path / "train", "train") == [0]
    assert _marks(tmp_path / "train", "test") == [1, 2]


def test_test_path_wins_and_its_files_never_serve_to_train(tmp_path: Path) -> None:
    _write(tmp_path, "a.parquet", "b.parquet", "c/d.parquet", "test.parquet")
    assert _marks(tmp_path, "test", tmp_path / "b.parquet") == [1]
    assert _marks(tmp_path, "train", tmp_path / "b.parquet") == [0, 2]
    assert _marks(tmp_path, "test", tmp_path / "c") == [2]
    assert _marks(tmp_path, "train", tmp_path / "c") == [0, 1]
    assert _marks(tmp_path / "a.parquet", "test", tmp_path) == [3]


def test_paths_may_be_relative_and_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, "sub/train.parquet", "sub/test.parquet")
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _marks(Path("train.parquet"), "test") == [1]
    assert _marks(Path("."), "train") == [0]
    assert _marks(Path("~/sub"), "test") == [1]
    assert _marks(Path("train.parquet"), "test", Path("~/sub/test.parquet")) == [1]


@pytest.mark.parametrize("names", [("train.parquet",), ("a.parquet", "validation.parquet")])
@pytest.mark.parametrize("whole", [True, False])
def test_without_test_images_the_sentence_names_test_path(
    names: tuple[str, ...], whole: bool, tmp_path: Path
) -> None:
    _write(tmp_path / "only", *names)
    name = tmp_path / "only" if whole else tmp_path / "only" / names[0]
    with pytest.raises(RequestError, match="data.test_path: expected a test file beside the"):
        read(str(name), "test")


def test_a_test_file_never_serves_to_train(tmp_path: Path) -> None:
    _write(tmp_path, "test.parquet", "validation.parquet")
    sentence = f"data.name: expected files of training images in {tmp_path}, found none but"
    with pytest.raises(RequestError, match=sentence):
        read(str(tmp_path), "train")
    file = tmp_path / "test.parquet"
    with pytest.raises(RequestError, match="data.name: expected files of training images"):
        read(str(file), "train", test_path=file)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    file, folder = tmp_path / "none.parquet", tmp_path / "empty"
    folder.mkdir()
    splits: tuple[Split, Split] = ("train", "test")
    for split in splits:
        with pytest.raises(RequestError, match=f"data.name: .* found no {file}$"):
            read(str(file), split)
        with pytest.raises(RequestError, match=rf"data.name: .*\.parquet .* {folder}, found none"):
            read(str(folder), split)
        _write(tmp_path, "train.parquet")
        with pytest.raises(RequestError, match=f"data.test_path: .* found no {file}$"):
            read(str(tmp_path / "train.parquet"), split, test_path=file)
