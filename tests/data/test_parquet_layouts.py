"""However an image is stored in Parquet, the same tensor is read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raytrain.data.sources import read

NUM_IMAGES = 20


@pytest.fixture(scope="module", params=["grey", "colour"])
def pixels(request: pytest.FixtureRequest) -> np.ndarray:
    """Real scans, n c h w; in colour the three channels are three different scans."""
    scans = read("digits", "test").whole[: 3 * NUM_IMAGES].numpy()
    if request.param == "grey":
        return scans[:NUM_IMAGES]
    return scans.reshape(NUM_IMAGES, 3, 8, 8)


def _file(image: np.ndarray, form: str = "PNG", **options: int) -> bytes:
    """One c h w image as a file."""
    stream = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
        stream, form, **options
    )
    return stream.getvalue()


def _tensor(array: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(array)


def _last(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _swapped(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 1, 3, 2))


def _fixed(pixels: np.ndarray) -> pa.Array:
    values = pa.array(pixels.reshape(-1))
    for length in reversed(pixels.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, length)
    return values


LAYOUTS: dict[str, Callable[[np.ndarray], pa.Array]] = {
    "png": lambda p: pa.array([_file(x) for x in p], pa.binary()),
    "large_binary": lambda p: pa.array([_file(x) for x in p], pa.large_binary()),
    "bmp": lambda p: pa.array([_file(x, "BMP") for x in p], pa.binary()),
    "hugging_face": lambda p: pa.array([{"bytes": _file(x), "path": "x.png"} for x in p]),
    "struct_without_path": lambda p: pa.array([{"bytes": _file(x)} for x in p]),
    "tensor_chw": _tensor,
    "tensor_hwc": lambda p: _tensor(_last(p)),
    "tensor_hwc_seen_as_chw": lambda p: _tensor(_last(p).transpose(0, 3, 1, 2)),
    "tensor_chw_seen_as_hwc": lambda p: _tensor(p.transpose(0, 2, 3, 1)),
    "tensor_cwh_seen_as_chw": lambda p: _tensor(_swapped(p).transpose(0, 1, 3, 2)),
    "lists_chw": lambda p: pa.array(p.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    "lists_hwc": lambda p: pa.array(_last(p).tolist()),
    "large_lists": lambda p: pa.array(p.tolist(), pa.large_list(pa.list_(pa.list_(pa.int32())))),
    "fixed_lists": _fixed,
    "flat": lambda p: pa.array(p.reshape(len(p), -1).tolist(), pa.list_(pa.uint8())),
    "flat_fixed": lambda p: _fixed(p.reshape(len(p), -1)),
    "float16": lambda p: _fixed((p / 255).astype(np.float16)),
    "float32": lambda p: _fixed((p / 255).astype(np.float32)),
    "float64_flat": lambda p: pa.array((p / 255).reshape(len(p), -1).tolist()),
}


def _write(path: Path, images: pa.Array, **others: object) -> str:
    columns = {"image": images, "label": [row % 10 for row in range(len(images))], **others}
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensor(
    layout: str, pixels: np.ndarray, tmp_path: Path
) -> None:
    name = _write(tmp_path / "x.parquet", LAYOUTS[layout](pixels))
    images = read(name, "train")
    assert torch.equal(images.whole, torch.from_numpy(pixels))
    assert images.whole.is_contiguous()
    assert images.labels.tolist() == [row % 10 for row in range(NUM_IMAGES)]
    assert images.classes == tuple("0123456789")


def test_grey_lists_need_no_channel_axis(tmp_path: Path) -> None:
    scans = read("digits", "test").whole[:NUM_IMAGES]
    name = _write(tmp_path / "x.parquet", pa.array(scans[:, 0].tolist()))
    assert torch.equal(read(name, "train").whole, scans)


def test_truth_values_become_black_and_white(tmp_path: Path) -> None:
    ink = read("digits", "test").whole[:NUM_IMAGES] > 127
    name = _write(tmp_path / "x.parquet", pa.array(ink[:, 0].tolist()))
    assert torch.equal(read(name, "train").whole, ink.to(torch.uint8) * 255)


def test_jpeg_is_what_pillow_decodes(pixels: np.ndarray, tmp_path: Path) -> None:
    files = [_file(x, "JPEG", quality=90) for x in pixels]
    decoded = [np.asarray(Image.open(io.BytesIO(file))).reshape(8, 8, -1) for file in files]
    got = read(_write(tmp_path / "x.parquet", pa.array(files)), "train").whole
    assert torch.equal(got, torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2))


def test_order_and_labels_survive_many_batches_and_row_groups(tmp_path: Path) -> None:
    train = read("digits", "train")
    files = [_file(x) for x in train.whole.numpy()]
    table = pa.table({"img": files, "label": train.labels.numpy().astype(np.uint8)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=300)
    images = read(str(tmp_path / "x.parquet"), "train")
    assert torch.equal(images.whole, train.whole)
    assert torch.equal(images.labels, train.labels)


def test_grey_images_among_coloured_ones_become_three_equal_channels(tmp_path: Path) -> None:
    scans = read("digits", "test").whole[:5].numpy()
    colour = np.concatenate([scans[1:2, 0], scans[2:3, 0], scans[3:4, 0]])
    files = [_file(scans[0]), _file(colour), _file(scans[4])]
    mixed = read(_write(tmp_path / "mixed.parquet", pa.array(files)), "train").whole
    assert mixed.shape == (3, 3, 8, 8)
    assert torch.equal(mixed[1], torch.from_numpy(colour))
    for row, scan in ((0, 0), (2, 4)):
        assert torch.equal(mixed[row], torch.from_numpy(scans[scan]).expand(3, 8, 8))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part, file in enumerate(files):
        columns = {"image": [file], "label": [part]}
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    assert torch.equal(read(str(folder), "train").whole, mixed)


def test_class_names_come_from_the_hugging_face_record(tmp_path: Path) -> None:
    scans = read("digits", "test").whole[:3]
    feature = {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}
    record = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.table({"image": scans[:, 0].tolist(), "label": [2, 1, 0]})
    for split, rows in (("train", 3), ("test", 1)):
        part = table.slice(0, rows).replace_schema_metadata({"huggingface": record})
        pq.write_table(part, tmp_path / f"{split}.parquet")
    name = str(tmp_path / "train.parquet")
    assert read(name, "train").classes == ("ant", "bee", "cow")
    assert read(name, "test").classes == ("ant", "bee", "cow")


def test_without_names_a_test_split_has_as_many_classes_as_its_largest_label(
    tmp_path: Path,
) -> None:
    scans = read("digits", "test").whole[:2, 0].tolist()
    pq.write_table(pa.table({"image": scans, "label": [0, 1]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": scans, "label": [4, 4]}), tmp_path / "test.parquet")
    assert read(str(tmp_path), "test").classes == tuple("01234")


@pytest.mark.parametrize("image", ["image", "img", "images", "pixels", "Image", "scan"])
@pytest.mark.parametrize("label", ["label", "labels", "target", "fine_label", "class", "y"])
def test_columns_are_found_by_name_or_type(image: str, label: str, tmp_path: Path) -> None:
    scans = read("digits", "test").whole[:2]
    columns = {"id": ["a", "b"], label: [1, 0], image: scans[:, 0].tolist(), "score": [0.5, 1.5]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    images = read(str(tmp_path / "x.parquet"), "train")
    assert torch.equal(images.whole, scans)
    assert images.labels.tolist() == [1, 0]


def test_named_columns_win(tmp_path: Path) -> None:
    scans = read("digits", "test").whole[:2]
    name = _write(
        tmp_path / "x.parquet",
        pa.array(scans[:, 0].tolist()),
        other=scans.flip(0)[:, 0].tolist(),
        digit=[1, 0],
    )
    images = read(name, "train", image_column="other", label_column="digit")
    assert torch.equal(images.whole, scans.flip(0))
    assert images.labels.tolist() == [1, 0]
