"""A column of numbers (nested lists, flat lists, tensors) -> pixels 0..255."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8

from raytrain.data.images import Location


def is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_array(kind: pa.DataType) -> bool:
    """One to three levels of lists around numbers, or a fixed-shape tensor."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return len(kind.shape) <= 3 and _is_number(kind.value_type)
    depth = 0
    while is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return 1 <= depth <= 3 and _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def unpack(column: pa.Array, location: Location) -> UInt8[np.ndarray, "n c h w"]:
    """Convert every image of the column: h w, h w c, c h w, or one flat list of a square image."""
    is_tensor = isinstance(column.type, pa.FixedShapeTensorType)
    values = _tensor(column, location) if is_tensor else _dense(column, location)
    return _channels_first(_to_bytes(values, location), location)


def _tensor(column: pa.Array, location: Location) -> np.ndarray:
    """Undo a permutation that swaps two axes; a cyclic one only moves the channel axis.

    The channel axis is found by its length, so cyclic ones need no treatment. (pyarrow writes the
    inverse of the permutation that the Arrow specification defines.)
    """
    shape = column.type.shape
    values = _dense(column.storage, location).reshape(len(column), *shape)
    order = list(column.type.permutation or range(len(shape)))
    if all(order[order[axis]] == axis for axis in order):
        values = values.transpose(0, *(axis + 1 for axis in order))
    return values


def _dense(column: pa.Array, location: Location) -> np.ndarray:
    """Convert lists of lists of equal lengths to one array, without a Python object per number."""
    shape, values = [len(column)], column
    while True:
        if values.null_count:
            first = pc.index(values.is_null(), True).as_py()
            raise location.error("expected numbers, found null", first // math.prod(shape[1:]))
        if not is_list(values.type):
            return values.to_numpy(zero_copy_only=False).reshape(shape)
        lengths = pc.call_function("list_value_length", [values]).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(lengths != lengths[0]) if len(lengths) else lengths
        if len(odd):
            row = int(odd[0]) // math.prod(shape[1:])
            raise _uneven(column[0].as_py(), column[row].as_py(), location, row)
        shape.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()


def _uneven(first: Any, other: Any, location: Location, row: int) -> Exception:
    sizes = [_size(first), _size(other)]
    if sizes[0] == sizes[1]:
        return location.error("expected lists of equal lengths within an image", row)
    return location.error(
        f"expected {sizes[0]} numbers as in the image before it, found {sizes[1]}", row
    )


def _size(nested: Any) -> str:
    lengths = []
    while isinstance(nested, list):
        lengths.append(str(len(nested)))
        nested = nested[0] if nested else None
    return "x".join(lengths)


def _to_bytes(values: np.ndarray, location: Location) -> UInt8[np.ndarray, ...]:
    """Convert to bytes: integers unchanged, fractions times 255 and rounded, truth values to 0 and 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    is_fraction = values.dtype.kind == "f"
    top = 1 if is_fraction else 255
    outside = np.argwhere(~((values >= 0) & (values <= top)))
    if len(outside):
        expected = "fractions in [0, 1]" if is_fraction else "integers in 0..255"
        found = values[tuple(outside[0])]
        raise location.error(f"expected {expected}, found {found}", int(outside[0][0]))
    if is_fraction:
        values = np.rint(values.astype(np.float64) * 255)
    return values.astype(np.uint8)


def _channels_first(
    values: UInt8[np.ndarray, ...], location: Location
) -> UInt8[np.ndarray, "n c h w"]:
    """Find the channel axis: the one of length 1 or 3 that leaves a square, the last if unsure.

    A flat list is read as published CIFAR files are: all of red, then green, then blue.
    """
    rows, shape = len(values), values.shape[1:]
    if len(shape) == 1:
        for channels in (1, 3):
            side = math.isqrt(shape[0] // channels)
            if side and channels * side * side == shape[0]:
                return values.reshape(rows, channels, side, side)
    elif len(shape) == 2 and min(shape) > 0:
        return values[:, None]
    elif len(shape) == 3 and min(shape) > 0:
        is_last, is_first = shape[2] in (1, 3), shape[0] in (1, 3)
        if is_last and not (is_first and shape[0] != shape[1] == shape[2]):
            return values.transpose(0, 3, 1, 2)
        if is_first:
            return values
    found = "x".join(str(length) for length in shape)
    raise location.error(
        "expected h x w, h x w x c or c x h x w numbers with 1 or 3 channels, or a flat list "
        f"of a square image, found {found}"
    )
