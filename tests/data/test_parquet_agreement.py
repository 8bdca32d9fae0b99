"""Files of a data set agree, shard with shard and test with training images: or one is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.data.loader import open_source, open_splits, open_test
from raytrain.data.spec import DataSpec

RANDOM = np.random.RandomState(0)
SIDE = 4
SHADES = RANDOM.randint(0, 256, (12, SIDE, SIDE), dtype=np.uint8)
IMAGES, LABELS = SHADES.tolist(), [0, 1, 2] * 4


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _record(label: str, names: list[str]) -> dict[str, str]:
    features = {"id": {"_type": "Value"}, label: {"_type": "ClassLabel", "names": names}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _write(
    file: Path,
    images: Any = IMAGES,
    labels: Any = LABELS,
    names: list[str] | None = None,
    image: str = "image",
    label: str = "label",
    others: dict[str, Any] | None = None,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: images, label: labels, **(others or {})})
    if names is not None:
        table = table.replace_schema_metadata(_record(label, names))
    pq.write_table(table, file)


def _labels(folder: Path, split: str, **options: Any) -> list[int]:
    """The labels of all images, sorted: of the training images before the validation split."""
    spec = DataSpec(name=str(folder), validation=3, **options)
    if split == "test":
        return open_test(spec, DistributedContext())[0].labels.tolist()
    splits = open_splits(spec, DistributedContext())
    return sorted([*splits.train.labels.tolist(), *splits.valid.labels.tolist()])


def _refusal(folder: Path, split: str = "test", **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        _labels(folder, split, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{folder}/", "")


PAIRS = [("train.parquet", "test.parquet"), ("a.parquet", "b.parquet")]
"""Two files of which the second must fit the first: test and training images, or two shards."""


def _split(second: str) -> str:
    return "test" if second == "test.parquet" else "train"


# --- class names ------------------------------------------------------------------------------


def test_labels_of_test_images_follow_the_class_names(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", names=["ant", "bee", "cow"])
    _write(tmp_path / "test.parquet", names=["cow", "ant", "bee"])
    assert _labels(tmp_path, "test") == [2, 0, 1] * 4
    assert open_source(DataSpec(name=str(tmp_path))).classes == ("ant", "bee", "cow")


def test_labels_of_a_shard_follow_the_class_names_of_the_first(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", IMAGES[:9], LABELS[:9], ["ant", "bee", "cow"])
    _write(tmp_path / "b.parquet", IMAGES[9:], [0, 0, 1], ["cow", "ant", "bee"])
    assert _labels(tmp_path, "train") == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_shards_of_the_test_images_each_have_an_order_of_their_own(tmp_path: Path) -> None:
    names = {"train/0": ["ant", "bee", "cow"], "test/0": ["bee", "cow", "ant"]}
    for part, order in {**names, "test/1": ["cow", "bee", "ant"]}.items():
        _write(tmp_path / f"{part}.parquet", names=order)
    assert _labels(tmp_path, "test") == [*[1, 2, 0] * 4, *[2, 1, 0] * 4]


OTHERS: dict[str, tuple[list[str], str]] = {
    "another": (["ant", "bee", "dog"], "found no 'cow' and an unknown 'dog'"),
    "fewer": (["ant", "bee"], "found no 'cow'"),
    "more": (["ant", "bee", "cow", "dog"], "found an unknown 'dog'"),
    "case": (["Ant", "bee", "cow"], "found no 'ant' and an unknown 'Ant'"),
    "many": (
        ["ant", "bee", "cow", *"123456789"],
        "found an unknown '1', '2', '3', '4', '5' and 4 more",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_other_class_names_are_refused(first: str, second: str, case: str, tmp_path: Path) -> None:
    names, found = OTHERS[case]
    _write(tmp_path / first, names=["ant", "bee", "cow"])
    _write(tmp_path / second, labels=[0, 1, 0] * 4, names=names)
    assert _refusal(tmp_path, _split(second)) == (
        f"{second}: column 'label': expected the 3 class names of {first}, {found}"
    )


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", names=["ant", "bee", "bee"])
    assert _refusal(tmp_path, "train") == (
        "train.parquet: column 'label': expected class names that differ in the metadata, "
        "found 'bee' twice"
    )


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("named", [0, 1])
def test_names_on_one_side_leave_the_labels_as_they_are(
    first: str, second: str, named: int, tmp_path: Path
) -> None:
    for k, file in enumerate((first, second)):
        _write(tmp_path / file, names=["ant", "bee", "cow"] if k == named else None)
    times = 4 if _split(second) == "test" else 8
    assert sorted(_labels(tmp_path, _split(second))) == sorted([0, 1, 2] * times)


@pytest.mark.parametrize("named", [0, 1])
def test_names_that_are_the_numbers_in_another_order_say_which_label_is_which(
    named: int, tmp_path: Path
) -> None:
    for k, file in enumerate(("train.parquet", "test.parquet")):
        _write(tmp_path / file, names=["0", "2", "1"] if k == named else None)
    assert _labels(tmp_path, "test") == [0, 2, 1] * 4


def test_as_many_names_as_there_are_training_labels_are_expected(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "test.parquet", names=["ant", "bee", "cow", "dog"])
    assert _refusal(tmp_path) == (
        "test.parquet: column 'label': expected names of the 3 classes of train.parquet, "
        "found 4 names"
    )


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["ant", "bee", "cow"]])
def test_a_label_that_no_training_image_has_is_refused(
    names: list[str] | None, tmp_path: Path
) -> None:
    _write(tmp_path / "train.parquet", names=names)
    _write(tmp_path / "test.parquet", labels=[0] * 10 + [3, 4])
    assert _refusal(tmp_path) == (
        "test.parquet: column 'label', row 10: expected labels 0..2, the 3 classes of "
        "train.parquet, found 3"
    )


def test_a_shard_with_labels_beyond_the_names_is_the_one_that_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet")
    _write(tmp_path / "b.parquet", names=["ant", "bee", "cow"])
    _write(tmp_path / "c.parquet", labels=[0] * 11 + [7])
    assert _refusal(tmp_path, "train") == (
        "c.parquet: column 'label', row 11: expected labels 0..2, the 3 classes of b.parquet, "
        "found 7"
    )


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64()])
def test_integers_of_any_width_are_labels(kind: pa.DataType, tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "test.parquet", labels=pa.array(LABELS, kind))
    assert _labels(tmp_path, "test") == LABELS


def test_test_images_may_lack_classes(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "test.parquet", IMAGES[:2], [1, 1])
    test, source = open_test(DataSpec(name=str(tmp_path)), DistributedContext())
    assert test.labels.tolist() == [1, 1] and source.classes == ("0", "1", "2")


# --- columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_labels_are_read_from_the_column_of_the_first_file(
    first: str, second: str, tmp_path: Path
) -> None:
    _write(tmp_path / first, label="fine_label")
    _write(tmp_path / second, label="fine_label", others={"label": [2] * 12})
    times = 4 if _split(second) == "test" else 8
    assert sorted(_labels(tmp_path, _split(second))) == sorted([0, 1, 2] * times)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_file_without_the_column_of_the_first_is_refused(
    first: str, second: str, tmp_path: Path
) -> None:
    _write(tmp_path / first, label="fine_label", others={"label": LABELS[::-1]})
    _write(tmp_path / second, label="fine_label")
    assert _refusal(tmp_path, _split(second)) == (
        f"{second}: expected a column 'label' of labels as in {first}, "
        "found 'image', 'fine_label'; the nearest is fine_label"
    )


def test_images_are_read_from_the_column_of_the_first_file(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", image="scan")
    _write(tmp_path / "test.parquet", image="scan", others={"image": (255 - SHADES).tolist()})
    test = open_test(DataSpec(name=str(tmp_path)), DistributedContext())[0]
    assert torch.equal(test.whole[:, 0], torch.from_numpy(SHADES))


def test_a_file_without_the_image_column_of_the_first_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", image="scan")
    _write(tmp_path / "test.parquet")
    assert "expected a column 'scan' of images as in train.parquet" in _refusal(tmp_path)


# --- pixels -----------------------------------------------------------------------------------


def _coloured(shades: np.ndarray) -> np.ndarray:
    return np.stack([shades, shades[:, ::-1], 255 - shades], axis=-1)


GREY = {
    "lists": IMAGES,
    "flat": SHADES.reshape(12, -1).tolist(),
    "fractions": (SHADES / 255).tolist(),
    "files": [_png(shade) for shade in SHADES],
}
COLOUR = {
    "lists": _coloured(SHADES).tolist(),
    "channels first": _coloured(SHADES).transpose(0, 3, 1, 2).tolist(),
    "fractions": (_coloured(SHADES) / 255).tolist(),
    "files": [_png(one) for one in _coloured(SHADES)],
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_test_images_become_three_equal_channels_for_coloured_training_images(
    kind: str, tmp_path: Path
) -> None:
    _write(tmp_path / "train.parquet", COLOUR["files"])
    _write(tmp_path / "test.parquet", GREY[kind])
    test, source = open_test(DataSpec(name=str(tmp_path)), DistributedContext())
    assert source.channels == 3
    assert torch.equal(test.whole, torch.from_numpy(SHADES)[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("kind", COLOUR)
def test_coloured_test_images_are_refused_for_grey_training_images(
    kind: str, tmp_path: Path
) -> None:
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "test.parquet", COLOUR[kind])
    assert _refusal(tmp_path) == (
        "test.parquet: column 'image': expected grey images as in train.parquet, "
        "found coloured ones"
    )


@pytest.mark.parametrize("kind", GREY)
@pytest.mark.parametrize("other", GREY)
def test_test_images_may_be_stored_in_another_way(kind: str, other: str, tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", GREY[kind])
    _write(tmp_path / "test.parquet", GREY[other])
    test = open_test(DataSpec(name=str(tmp_path)), DistributedContext())[0]
    assert torch.equal(test.whole[:, 0], torch.from_numpy(SHADES))


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 6), (6, 4)])
def test_another_size_is_refused(
    first: str, second: str, height: int, width: int, tmp_path: Path
) -> None:
    _write(tmp_path / first)
    _write(tmp_path / second, RANDOM.randint(0, 256, (12, height, width)).tolist())
    assert _refusal(tmp_path, _split(second)) == (
        f"{second}: column 'image', row 0: expected 4x4 pixels as in {first}, "
        f"found {height}x{width}"
    )


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("wrong", [0, 1])
def test_black_and_white_as_0_and_1_is_refused_in_any_file(
    first: str, second: str, wrong: int, tmp_path: Path
) -> None:
    ink, files = SHADES > 127, (first, second)
    for k, file in enumerate(files):
        _write(tmp_path / file, (ink.astype(int) if k == wrong else ink).tolist())
    assert _refusal(tmp_path, _split(second)) == (
        f"{files[wrong]}: column 'image': expected pixels in 0..255, found none above 1; "
        "black and white are stored as 0 and 255, as truth values or as fractions"
    )


def test_black_test_images_are_refused_but_a_black_shard_is_fine(tmp_path: Path) -> None:
    _write(tmp_path / "train-0.parquet")
    _write(tmp_path / "train-1.parquet", (SHADES * 0).tolist())
    _write(tmp_path / "test.parquet", (SHADES * 0).tolist())
    assert _labels(tmp_path, "train") == sorted([*LABELS, *LABELS])
    assert _refusal(tmp_path).startswith("test.parquet: column 'image': expected pixels in 0..255")


# --- data.test_path ---------------------------------------------------------------------------


def test_what_test_path_names_is_held_to_the_training_images_too(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", names=["ant", "bee", "cow"])
    elsewhere = tmp_path / "elsewhere" / "x.parquet"
    _write(elsewhere, names=["bee", "ant", "cow"])
    assert _labels(tmp_path / "train.parquet", "test", test_path=elsewhere) == [1, 0, 2] * 4
    _write(elsewhere, names=["bee", "ant", "dog"])
    sentence = _refusal(tmp_path, test_path=elsewhere)
    assert sentence.startswith("elsewhere/x.parquet: column 'label': expected the 3 class names")
    _write(elsewhere, COLOUR["lists"], names=["bee", "ant", "cow"])
    sentence = _refusal(tmp_path, test_path=elsewhere)
    assert sentence.startswith("elsewhere/x.parquet: column 'image': expected grey images as in")


def test_files_called_validation_are_neither_trained_nor_tested_on(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet")
    _write(tmp_path / "validation.parquet", COLOUR["lists"], [9] * 12, ["another"])
    _write(tmp_path / "test.parquet")
    assert _labels(tmp_path, "train") == sorted(LABELS)
    assert _labels(tmp_path, "test") == LABELS


# --- what no network can be trained on --------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["ant"]])
@pytest.mark.parametrize("parts", [["train"], ["a", "b"]])
def test_a_single_class_is_refused(
    names: list[str] | None, parts: list[str], tmp_path: Path
) -> None:
    for part in parts:
        _write(tmp_path / f"{part}.parquet", labels=[0] * 12, names=names)
    where = "train.parquet" if len(parts) == 1 else str(tmp_path)
    assert _refusal(tmp_path, "train") == (
        f"{where}: column 'label': expected training images of at least two classes, "
        "found only class 0"
    )


def test_equal_images_are_refused_but_single_blank_ones_are_fine(tmp_path: Path) -> None:
    images = np.full((12, SIDE, SIDE), 7)
    _write(tmp_path / "train.parquet", images.tolist())
    assert _refusal(tmp_path, "train") == (
        "train.parquet: column 'image': expected training images that differ, found 12 equal ones"
    )
    images[3] = 0
    _write(tmp_path / "other" / "train.parquet", images.tolist())
    assert _labels(tmp_path / "other", "train") == sorted(LABELS)
