"""Pixels counted by their value, a batch of images at a time: what means and checks need of a data set."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from raytrain.data.images import pixel_fault


def count_levels(pixels: UInt8[np.ndarray, "n c h w"]) -> Int64[np.ndarray, "c 256"]:
    """Return how many pixels of each channel have each value 0..255."""
    channels = (torch.from_numpy(np.array(channel)).flatten() for channel in pixels.swapaxes(0, 1))
    return np.stack([torch.bincount(channel, minlength=256).numpy() for channel in channels])


class Levels:
    """Pixels of each value, of grey and of coloured images, and whether images differ."""

    def __init__(self) -> None:
        self._counts = {channels: np.zeros((channels, 256), np.int64) for channels in (1, 3)}
        self._first: np.ndarray | None = None
        self._num_images, self._all_equal = 0, True

    def add(self, pixels: UInt8[np.ndarray, "n c h w"]) -> int:
        """Count the pixels of a batch; return its largest value."""
        counts = count_levels(pixels)
        self._counts[len(counts)] += counts
        first = pixels[0] if self._first is None else self._first
        self._first = first
        self._num_images += len(pixels)
        if self._all_equal:
            self._all_equal = all(np.array_equal(image, first) for image in pixels)
        return _brightest(counts)

    def of(self, channels: int) -> Int64[np.ndarray, "c 256"]:
        """Counts per channel; grey images count as equal channels of coloured ones."""
        grey = np.broadcast_to(self._counts[1], (channels, 256))
        return grey + self._counts[3] if channels == 3 else grey.copy()

    def fault(self, training: bool) -> str | None:
        """See `pixel_fault`."""
        brightest = _brightest(np.concatenate(list(self._counts.values())))
        return pixel_fault(brightest, self._num_images if training and self._all_equal else 0)


def _brightest(counts: Int64[np.ndarray, "c 256"]) -> int:
    return int(np.flatnonzero(counts.sum(0))[-1])
