"""An encoded image is what the Image feature of Hugging Face `datasets` reads, in grey or RGB."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from raytrain.core.errors import RequestError
from raytrain.data.sources import read

ORIENTATION = ExifTags.Base.Orientation
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2))
GREY = Image.fromarray(RAMP)


def _lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(COLOUR, *profiles, outputMode="LAB")
    assert lab is not None
    return lab


IMAGES: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "1": (GREY.convert("1"), {}),
    "L": (GREY, {}),
    "L with a transparent value": (GREY, {"transparency": 8}),
    "LA": (GREY.convert("LA"), {}),
    "P": (COLOUR.convert("P"), {}),
    "P with a transparent colour": (COLOUR.convert("P"), {"transparency": 3}),
    "P with transparencies": (COLOUR.convert("P"), {"transparency": bytes(range(100))}),
    "PA": (COLOUR.convert("P").convert("PA"), {}),
    "RGB": (COLOUR, {}),
    "RGB with a transparent colour": (COLOUR, {"transparency": (0, 0, 255)}),
    "RGBA": (COLOUR.convert("RGBA"), {}),
    "CMYK": (COLOUR.convert("CMYK"), {}),
    "YCbCr": (COLOUR.convert("YCbCr"), {}),
    "LAB": (_lab(), {}),
}
FORMATS = {
    "1": "PNG TIFF",
    "L": "PNG JPEG TIFF WEBP AVIF JPEG2000",
    "L with a transparent value": "PNG",
    "LA": "PNG TIFF WEBP",
    "P": "PNG TIFF GIF WEBP",
    "P with a transparent colour": "PNG GIF",
    "P with transparencies": "PNG",
    "PA": "TIFF",
    "RGB": "PNG JPEG TIFF WEBP AVIF MPO",
    "RGB with a transparent colour": "PNG",
    "RGBA": "PNG TIFF WEBP",
    "CMYK": "JPEG TIFF",
    "YCbCr": "TIFF JPEG",
    "LAB": "TIFF",
}
CASES = [(mode, form) for mode, forms in FORMATS.items() for form in forms.split()]


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def _reference(content: bytes) -> torch.Tensor:
    """What `datasets.Image` decodes, then `.convert("RGB")`, with grey kept grey; c h w."""
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.getexif().get(ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transparency that a palette in RGB cannot hold
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _read(folder: Path, *contents: bytes, **metadata: str) -> torch.Tensor:
    table = pa.table({"img": pa.array(contents, pa.binary()), "label": [0] * len(contents)})
    pq.write_table(table.replace_schema_metadata(metadata), folder / "test.parquet")
    return read(str(folder), "test").whole


def _sentence(folder: Path, *contents: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        _read(folder, *contents)
    return str(caught.value).removeprefix(f"{folder / 'test.parquet'}: column 'img'")


@pytest.mark.parametrize(("mode", "form"), CASES)
def test_every_mode_and_orientation_is_read_as_hugging_face_reads_it(
    mode: str, form: str, tmp_path: Path
) -> None:
    image, options = IMAGES[mode]
    contents = [_saved(image, form, **options)]
    if form in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF", "MPO"):
        contents += [_saved(image, form, exif=_exif(k), **options) for k in range(1, 10)]
    wanted = [_reference(content) for content in contents]
    channels = {len(one) for one in wanted}
    assert channels == ({1} if mode[0] in "1L" and mode != "LAB" and form != "WEBP" else {3})
    assert torch.equal(_read(tmp_path, *contents), torch.stack(wanted))
    if form not in ("JPEG", "GIF", "AVIF", "JPEG2000") and len(wanted) > 1:
        assert len({bytes(one.numpy()) for one in wanted}) == 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_is_turned_once(orientation: int, compression: str, tmp_path: Path) -> None:
    options = {} if compression is None else {"compression": compression}
    content = _saved(COLOUR, "TIFF", exif=_exif(orientation), **options)
    turned = _reference(_saved(COLOUR, "PNG", exif=_exif(orientation)))
    assert torch.equal(_read(tmp_path, content)[0], turned)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_are_turned_and_rounded_to_eight(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    wide = np.random.RandomState(0).randint(0, 65536, (4, 4))
    wide[0] = [0, 128, 129, 65407]
    raw = wide.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (4, 4), raw)
    content = _saved(image, "TIFF", exif=_exif(orientation))
    eight = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    upright = _reference(_saved(eight, "PNG", exif=_exif(orientation)))
    assert torch.equal(_read(tmp_path, content)[0], upright)


def test_the_orientation_in_xmp_counts_where_exif_has_none(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    content = _saved(COLOUR, "JPEG", xmp=xmp)
    assert torch.equal(_read(tmp_path, content)[0], _reference(content))
    assert not torch.equal(_reference(content), _reference(_saved(COLOUR, "JPEG")))


def test_a_turned_image_is_reported_in_its_new_shape(tmp_path: Path) -> None:
    oblong = COLOUR.crop((0, 0, 8, 4))  # 8 wide, 4 high
    upright, turned = (_saved(oblong, "JPEG", exif=_exif(k)) for k in (1, 6))
    assert _sentence(tmp_path, upright, turned) == (
        ", row 1: expected 4x8 pixels as in the image before it, found 8x4"
    )
    assert _sentence(tmp_path, turned) == ": expected square images, found 8x4"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


BROKEN = {
    "empty": b"Exif\0\0",
    "no header": b"Exif\0\0nothing of the kind",
    "half a header": b"Exif\0\0MM\0*\0\0",
    "entries beyond the end": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03",
    "directory beyond the end": b"Exif\0\0MM\0*\x7f\xff\xff\xff",
    "orientation of text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02a\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", BROKEN)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_leaves_the_image_as_it_is_in_silence(
    exif: str, form: str, tmp_path: Path
) -> None:
    plain = _saved(COLOUR, form)
    broken = _saved(COLOUR, form, exif=BROKEN[exif])
    assert torch.equal(_read(tmp_path, broken)[0], _reference(plain))


def test_exif_that_cannot_be_written_back_still_turns_the_image(tmp_path: Path) -> None:
    entries = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack(">HHII", 0x14A, 1, 1, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + bytes(4)
    image = Image.open(io.BytesIO(_saved(COLOUR, "JPEG", exif=exif)))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    turned = _saved(COLOUR, "JPEG", exif=_exif(6))
    assert torch.equal(_read(tmp_path, _saved(COLOUR, "JPEG", exif=exif))[0], _reference(turned))


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    plain = _saved(COLOUR, "PNG")
    end = plain.index(b"IEND") - 4
    exif = _exif(8).tobytes().removeprefix(b"Exif\0\0")
    content = plain[:end] + _chunk(b"eXIf", exif) + plain[end:]
    wanted = _reference(_saved(COLOUR, "PNG", exif=_exif(8)))
    assert torch.equal(_read(tmp_path, content)[0], wanted)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(form: str, tmp_path: Path) -> None:
    frames = [COLOUR, COLOUR.transpose(Image.Transpose.ROTATE_90)]
    options = {"lossless": True} if form == "WEBP" else {}
    content = _saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert torch.equal(_read(tmp_path, content)[0], _reference(content))
    assert torch.equal(_reference(content), _reference(_saved(frames[0], form, **options)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_file_is_refused(form: str, share: float, tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    content = _saved(Image.fromarray(noise), form)
    cut = content[: int(share * len(content))]
    sentence = _sentence(tmp_path, content, cut)
    expected = f", row 1: expected an image that Pillow can decode, found {len(cut)} bytes ("
    assert sentence.startswith(expected)


def _header(side: int) -> bytes:
    """A PNG that claims to be a square of this many pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the one, refuses the other
def test_an_image_beyond_pillows_limit_is_one_sentence(side: int, tmp_path: Path) -> None:
    assert _sentence(tmp_path, _saved(GREY, "PNG"), _header(side)) == (
        f", row 1: expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, "
        f"found {side * side}"
    )


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode: str, tmp_path: Path) -> None:
    content = _saved(GREY.convert(mode), "TIFF")
    assert f"(mode {mode} has no range that maps to 0..255)" in _sentence(tmp_path, content)


def _feature(mode: str | None) -> str:
    image = {"_type": "Image", "mode": mode, "decode": True}
    return json.dumps({"info": {"features": {"img": image}}})


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), (None, 3)])
def test_images_are_converted_to_the_mode_of_the_feature(
    mode: str | None, channels: int, tmp_path: Path
) -> None:
    content = _saved(COLOUR, "PNG", exif=_exif(5))
    found = _read(tmp_path, content, huggingface=_feature(mode))[0]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    wanted = np.array(image.convert("L" if mode == "L" else "RGB"))
    assert len(found) == channels
    assert np.array_equal(found.permute(1, 2, 0).squeeze(2).numpy(), wanted)


def test_a_feature_of_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"row 0: expected an image .* \(image has wrong mode\)"
    ):
        _read(tmp_path, _saved(COLOUR, "PNG"), huggingface=_feature("XYZ"))
