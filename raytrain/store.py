"""Tensors remembered per image between its visits, such as the last perturbation, kept by the
worker that owns it.

Rank r owns the images whose index is r modulo the number of workers; the row of image i is i //
world. What is stored lives in the frame of the un-augmented image: reading applies the crop and
flip of the present batch, writing undoes them, and pixels that the crop left out keep their old
value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytrain.place import Place
from raytrain.types import Batch, Delta, View


class SampleStore:
    """One perturbation per owned image, (owned, c, h, w), zero at first."""

    def __init__(
        self,
        num_images: int,
        shape: tuple[int, ...],
        place: Place,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._place, self._num_images = place, num_images
        owned = len(range(place.rank, num_images, place.world))
        self._values = torch.zeros(owned, *shape, dtype=dtype, device=place.device)

    def read(self, batch: Batch) -> Delta:
        """The stored perturbations of a batch, in its augmented frame."""
        values = self._values[self._rows(batch)].to(batch.images.dtype)
        return values if batch.view is None else cut(values, batch.view)

    def write(self, batch: Batch, delta: Delta) -> None:
        """Remember `delta`, given in the augmented frame of the batch."""
        rows = self._rows(batch)
        if batch.view is not None:
            delta = paste(delta, batch.view, onto=self._values[rows].to(delta.dtype))
        self._values[rows] = delta.to(self._values.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All rows by global index, gathered from every worker: a collective."""
        index = torch.arange(
            self._place.rank, self._num_images, self._place.world, device=self._values.device
        )
        order = self._place.gather(index).argsort()
        return {"values": self._place.gather(self._values)[order].cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this worker's share of `state`, which any number of workers may have written."""
        share = state["values"][self._place.rank :: self._place.world]
        self._values.copy_(share)

    def _rows(self, batch: Batch) -> Tensor:
        return batch.index // self._place.world


def cut(values: Tensor, view: View) -> Tensor:
    """Pad with zeros, crop and mirror each image as `view` says, (n, c, h, w) -> (n, c, h, w)."""
    sample, row, column = _places(values, view)
    padded = torch.nn.functional.pad(values, [view.pad] * 4)
    return padded[sample, :, row, column].permute(0, 3, 1, 2).contiguous()


def paste(values: Tensor, view: View, onto: Tensor) -> Tensor:
    """The inverse of `cut`: put cropped values back; what the crop left out stays as in `onto`."""
    sample, row, column = _places(values, view)
    height, width = values.shape[-2:]
    padded = torch.nn.functional.pad(onto, [view.pad] * 4)
    padded[sample, :, row, column] = values.permute(0, 2, 3, 1)
    return padded[..., view.pad : view.pad + height, view.pad : view.pad + width].contiguous()


def _places(values: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, row and column in the padded image of every pixel of the view, broadcastable to (n, h, w)."""
    height, width = values.shape[-2:]
    sample = torch.arange(len(values), device=values.device)[:, None, None]
    down = torch.arange(height, device=values.device)
    along = torch.arange(width, device=values.device).expand(len(values), width)
    along = torch.where(view.mirrored[:, None], width - 1 - along, along)
    return sample, (view.top[:, None] + down)[:, :, None], (view.left[:, None] + along)[:, None, :]
