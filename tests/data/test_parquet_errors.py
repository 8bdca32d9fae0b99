"""Every mistake in a Parquet file is one sentence: the file, the column, what was expected."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raytrain.core.errors import RequestError
from raytrain.data.sources import read


def _png(height: int, width: int, form: str = "PNG", mode: str = "L", color: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height), color).save(stream, form)
    return stream.getvalue()


SQUARE, DARK = _png(4, 4), _png(4, 4, color=100)


def _sentence(path: Path, table: pa.Table | dict[str, Any], **options: Any) -> str:
    """What reading the table says, without the name of its file."""
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path)
    with pytest.raises(RequestError) as caught:
        read(str(path), options.pop("split", "train"), **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence
    return sentence.replace(f"{path}: ", "").replace(str(path), "FILE")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.parquet"


LABELS: dict[str, tuple[Any, str]] = {
    "text": (["a", "b"], "column 'label': expected an integer column of labels, found string"),
    "dictionary": (
        pa.array(["a", "b"]).dictionary_encode(),
        "column 'label': expected an integer column of labels, found dictionary<",
    ),
    "truth": ([True, False], "column 'label': expected an integer column of labels, found bool"),
    "float": ([0.0, 1.0], "column 'label': expected an integer column of labels, found double"),
    "null": ([0, None], "column 'label', row 1: expected an integer, found null"),
    "negative": (
        [0, -1],
        "column 'label', row 1: expected a class 0..C-1 with C at most 65536, found -1",
    ),
    "huge": (
        pa.array([0, 2**64 - 1], pa.uint64()),
        "column 'label', row 1: expected a class 0..C-1 with C at most 65536, found 18446744073709",
    ),
    "gap": (
        [0, 2],
        "column 'label': expected every class 0..2 in the training images, found no image of 1",
    ),
    "from_one": (
        [1, 2],
        "column 'label': expected every class 0..2 in the training images, found no image of 0",
    ),
    "gaps": ([0, 9], "found no image of 1, 2, 3, 4, 5 and 3 more"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case: str, path: Path) -> None:
    labels, expected = LABELS[case]
    assert expected in _sentence(path, {"img": [SQUARE, SQUARE], "label": labels})


def test_a_test_split_may_lack_classes_but_not_hold_a_negative_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [SQUARE], "label": [3]}), tmp_path / "test.parquet")
    assert read(str(tmp_path), "test").labels.tolist() == [3]
    pq.write_table(pa.table({"img": [SQUARE], "label": [-1]}), tmp_path / "test.parquet")
    with pytest.raises(RequestError, match="test.parquet: column 'label', row 0: .* found -1"):
        read(str(tmp_path), "test")


def _named(names: list[str]) -> dict[str, str]:
    feature = {"_type": "ClassLabel", "names": names}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


def test_labels_beyond_the_names_in_the_metadata(path: Path) -> None:
    table = pa.table({"img": [SQUARE] * 3, "label": [0, 1, 2]})
    assert _sentence(path, table.replace_schema_metadata(_named(["a", "b"]))) == (
        "column 'label', row 2: expected labels 0..1, the 2 classes named in the metadata, found 2"
    )


def test_a_named_class_without_images(path: Path) -> None:
    table = pa.table({"img": [SQUARE], "label": [0]})
    sentence = _sentence(path, table.replace_schema_metadata(_named(["a", "b"])))
    assert sentence.endswith(
        "expected every class 0..1 in the training images, found no image of 1"
    )


@pytest.mark.parametrize("record", ["{", "[]", '{"info": {"features": {"label": {}}}}'])
def test_a_strange_hugging_face_record_is_no_error(record: str, path: Path) -> None:
    table = pa.table({"img": [SQUARE, DARK], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": record}), path)
    assert read(str(path), "train").classes == ("0", "1")


COLUMNS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no_such_image": (
        {"img": [SQUARE], "label": [0]},
        {"image_column": "imgs"},
        "data.image_column: expected a column 'imgs' in FILE, found 'img', 'label'; "
        "the nearest is img",
    ),
    "no_such_label": (
        {"img": [SQUARE], "lable": [0]},
        {"label_column": "label"},
        "data.label_column: expected a column 'label' in FILE, found 'img', 'lable'; "
        "the nearest is lable",
    ),
    "no_image": (
        {"name": ["x"], "label": [0]},
        {},
        "expected one column of images (encoded bytes or arrays of numbers), found none among "
        "'name', 'label'; call it 'image', or name it with data.image_column",
    ),
    "two_images": (
        {"left": [SQUARE], "right": [SQUARE], "label": [0]},
        {},
        "expected one column of images (encoded bytes or arrays of numbers), found 'left', "
        "'right' among 'left', 'right', 'label'; call it 'image', or name it with data.image_column",
    ),
    "no_label": (
        {"img": [SQUARE], "kind": [0]},
        {},
        "expected a column of labels called label, labels, target, fine_label, class, y, "
        "found 'img', 'kind'; name it with data.label_column",
    ),
    "image_of_text": (
        {"img": ["a.png"], "label": [0]},
        {"image_column": "img"},
        "column 'img': expected encoded images (bytes, or struct<bytes, path>) or arrays of "
        "numbers, found string",
    ),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns(case: str, path: Path) -> None:
    table, options, expected = COLUMNS[case]
    assert _sentence(path, table, **options) == expected


ENCODED: dict[str, tuple[Any, str]] = {
    "not_an_image": (
        [SQUARE, b"no image"],
        "row 1: expected an image that Pillow can decode, found 8 bytes (cannot identify image",
    ),
    "truncated_png": ([SQUARE, SQUARE[:-30]], "row 1: expected an image that Pillow can decode"),
    "truncated_jpeg": (
        [_png(64, 64, "JPEG")[:-100], SQUARE],
        "row 0: expected an image that Pillow can decode",
    ),
    "empty": ([SQUARE, b""], "row 1: expected an image that Pillow can decode, found 0 bytes"),
    "range_unknown": ([SQUARE, _png(4, 4, "TIFF", "F")], "(mode F has no range that maps to"),
    "null": ([SQUARE, None], "row 1: expected the bytes of an image, found null"),
    "path_only": (
        [{"bytes": SQUARE, "path": "a.png"}, {"bytes": None, "path": "b.png"}],
        "row 1: expected the bytes of an image, found only the path 'b.png'",
    ),
    "null_struct": (
        [{"bytes": SQUARE, "path": "a.png"}, None],
        "row 1: expected the bytes of an image, found null",
    ),
    "sizes": (
        [SQUARE, _png(5, 6)],
        "row 1: expected 4x4 pixels as in the image before it, found 5x6",
    ),
    "oblong": ([_png(4, 6)] * 2, "column 'img': expected square images, found 4x6"),
}


@pytest.mark.parametrize("case", ENCODED)
def test_encoded_images(case: str, path: Path) -> None:
    images, expected = ENCODED[case]
    sentence = _sentence(path, {"img": images, "label": [0, 1]})
    assert sentence.startswith("column 'img'")
    assert expected in sentence


def _array(*shapes: tuple[int, ...], fill: float = 0) -> list[Any]:
    return [np.full(shape, fill).tolist() for shape in shapes]


ARRAYS: dict[str, tuple[Any, str]] = {
    "sizes": (
        _array((4, 4, 3), (6, 5, 3)),
        "row 1: expected 4x4x3 numbers as in the image before it, found 6x5x3",
    ),
    "inner_sizes": (
        _array((4, 4), (4, 5)),
        "row 1: expected 4x4 numbers as in the image before it, found 4x5",
    ),
    "flat_sizes": (
        _array((16,), (25,)),
        "row 1: expected 16 numbers as in the image before it, found 25",
    ),
    "ragged": (
        [[[0, 0], [0, 0]], [[0, 0], [0]]],
        "row 1: expected lists of equal lengths within an image",
    ),
    "null_image": ([[[0]], None], "row 1: expected numbers, found null"),
    "null_number": ([[0, 0, 0, 0], [0, 0, 0, None]], "row 1: expected numbers, found null"),
    "too_large": (
        [[[0, 255]] * 2, [[0, 256]] * 2],
        "row 1: expected integers in 0..255, found 256",
    ),
    "negative": ([[[0, 0]] * 2, [[0, -1]] * 2], "row 1: expected integers in 0..255, found -1"),
    "not_fractions": (
        _array((2, 2), fill=0.0) + _array((2, 2), fill=7.5),
        "row 1: expected fractions in [0, 1], found 7.5",
    ),
    "not_a_number": (
        _array((2, 2), fill=0.0) + _array((2, 2), fill=float("nan")),
        "row 1: expected fractions in [0, 1], found nan",
    ),
    "flat_oblong": (_array((15,), (15,)), "or a flat list of a square image, found 15"),
    "two_channels": (_array((4, 4, 2), (4, 4, 2)), "with 1 or 3 channels, or a flat list"),
    "empty": ([[], []], "or a flat list of a square image, found 0"),
    "oblong": (_array((4, 5), (4, 5)), "column 'img': expected square images, found 4x5"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_numbers(case: str, path: Path) -> None:
    images, expected = ARRAYS[case]
    kind = pa.list_(pa.int64()) if case == "empty" else None
    sentence = _sentence(path, {"img": pa.array(images, kind), "label": [0, 1]})
    assert sentence.startswith("column 'img'")
    assert expected in sentence


def test_rows_are_counted_through_batches_and_threads(path: Path) -> None:
    for row in (1023, 1024, 1500):
        images = [SQUARE] * 1600
        images[row] = b"?"
        sentence = _sentence(path, {"img": images, "label": [0] * 1600})
        assert f"column 'img', row {row}: expected an image that Pillow" in sentence
    for row in (1023, 1024, 1500):
        images = [SQUARE] * row + [_png(5, 5)] * (1600 - row)
        sentence = _sentence(path, {"img": images, "label": [0] * 1600})
        expected = f"row {row}: expected 4x4 pixels as in the image before it, found 5x5"
        assert expected in sentence


def test_files_of_different_sizes_name_the_second(tmp_path: Path) -> None:
    for part, size in (("a", 4), ("b", 6)):
        pq.write_table(
            pa.table({"img": [_png(size, size)], "label": [0]}), tmp_path / f"{part}.parquet"
        )
    with pytest.raises(RequestError, match="b.parquet: column 'img', row 0: .* 4x4 .* found 6x6"):
        read(str(tmp_path), "train")


def test_no_rows(path: Path) -> None:
    empty = {"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    assert _sentence(path, empty) == "expected at least one row, found none"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "no_bytes": lambda content: b"",
    "another_format": lambda content: b"image,label\n1,2\n" * 20,
    "damaged_page": lambda content: content[:4] + bytes(120) + content[124:],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file(case: str, path: Path) -> None:
    pq.write_table(pa.table({"img": [SQUARE] * 50, "label": [0] * 50}), path)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(
        RequestError, match=f"^{path}: expected a whole Parquet file \\("
    ) as caught:
        read(str(path), "train")
    assert "\n" not in str(caught.value)
