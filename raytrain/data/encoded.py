"""Conversion of a column of image files (PNG, JPEG, ...) to pixels, by Pillow in a thread per core.

Images are those of the Image feature of Hugging Face `datasets`: the first frame, rotated by its
EXIF orientation, in the mode that the feature declares, if any.
Pillow releases the interpreter lock while it decodes, so large images gain from every core.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import ExifTags, Image

from raytrain.core.errors import RequestError
from raytrain.data.images import Location

SLICE = 64  # images per task: for small images the overhead of a task exceeds the decoding
TURNS = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def is_encoded(kind: pa.DataType) -> bool:
    """Bytes, or the struct<bytes, path> that Hugging Face publishes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_encoded(kind.field("bytes").type)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def decode(
    column: pa.Array, location: Location, mode: str | None = None
) -> UInt8[np.ndarray, "n c h w"]:
    """Decode every image of the column, in `mode` if given, to one channel if all are grey, else three."""
    files = contents(column, location)
    starts = range(0, len(files), SLICE)
    with pillow_warnings(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        slices = pool.map(
            lambda start: _decode_slice(
                files[start : start + SLICE], replace(location, row=location.row + start), mode
            ),
            starts,
        )
        images = [image for part in slices for image in part]
    return _stack(images, location)


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Ignore warnings of repaired defects (EXIF, palettes); an image above its pixel limit is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def contents(column: pa.Array, location: Location) -> list[bytes]:
    """Return the files of the column."""
    values = column.field("bytes") if pa.types.is_struct(column.type) else column
    if column.null_count or values.null_count:
        row = next(
            i for i in range(len(column)) if not (column[i].is_valid and values[i].is_valid)
        )
        record = column[row].as_py()
        only = f"only the path '{record['path']}'" if record and record.get("path") else "null"
        raise location.error(f"expected the bytes of an image, found {only}", row)
    return values.to_pylist()


def _decode_slice(
    files: list[bytes], location: Location, mode: str | None
) -> list[UInt8[np.ndarray, ...]]:
    images = []
    for row, content in enumerate(files):
        try:
            images.append(decode_one(content, mode))
        except Exception as error:  # types differ by decoder: OSError, SyntaxError, struct.error
            raise _undecodable(content, error, location, row) from error
    return images


def _undecodable(content: bytes, error: Exception, location: Location, row: int) -> RequestError:
    if isinstance(error, _TOO_LARGE):
        found = re.search(r"\d+", str(error))
        size = f"{found[0]}" if found else "more"
        expected = f"an image of at most {Image.MAX_IMAGE_PIXELS} pixels"
        return location.error(f"expected {expected}, found {size}", row)
    reason = str(error).partition("<")[0].strip() or type(error).__name__
    return location.error(
        f"expected an image that Pillow can decode, found {len(content)} bytes ({reason})", row
    )


def decode_one(content: bytes, mode: str | None) -> UInt8[np.ndarray, "h w *rgb"]:
    """Decode an image: grey to h w, everything else to h w 3; 16 bits are rounded to 8, alpha dropped."""
    with Image.open(io.BytesIO(content)) as file:
        image = _turned(file)
        if mode is not None:
            image = image.convert(mode)
        if image.mode.startswith("I;16"):
            return ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no range that maps to 0..255")
        if image.mode in ("1", "LA"):
            image = image.convert("L")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        return np.asarray(image)


def _turned(image: Image.Image) -> Image.Image:
    """Return the image upright, as `PIL.ImageOps.exif_transpose` does; ignore broken EXIF."""
    image.load()  # some formats have their EXIF behind the pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # errors of many types for damaged EXIF, beside intact pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _stack(images: list[np.ndarray], location: Location) -> UInt8[np.ndarray, "n c h w"]:
    height, width = images[0].shape[:2]
    for row, image in enumerate(images):
        if image.shape[:2] != (height, width):
            raise location.error(
                f"expected {height}x{width} pixels as in the image before it, "
                f"found {image.shape[0]}x{image.shape[1]}",
                row,
            )
    if all(image.ndim == 2 for image in images):
        return np.stack(images)[:, None]
    stacked = np.empty((len(images), 3, height, width), dtype=np.uint8)
    for row, image in enumerate(images):
        stacked[row] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return stacked
