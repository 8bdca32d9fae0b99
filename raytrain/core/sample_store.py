"""Tensors stored between batches: per image, on the worker that owns it, or per slot of the batch.

Rank r owns the images whose index is r modulo the number of workers; the row of image i is i //
world. Values are stored in the frame of the un-augmented image: reading applies the crop and flip of
the present batch, writing inverts them, and pixels outside the crop keep their old value.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.network import trainable
from raytrain.core.types import AugmentedView, Batch

Keep = Literal["fp32", "fp16", "int8"]
"""Storage type of a perturbation: 4, 2 or 1 bytes per pixel and channel. `fp32` is the run's own
precision (float64 in an fp64 run). `int8` counts in units of eps/127 (of 1/127 where eps is more
than a pixel can move), `fp16` rounds to about 1e-5 at eps 8/255: fine for l-inf steps of a fixed
size, too coarse for small steps along the raw gradient; in l2 at 0.5, int8 loses about an eighth of
eps at every visit."""


_LARGE = 2**11
"""Numbers per image, above which a copy per image is faster on a CPU than one of all pixels."""


class SampleStore:
    """One tensor per owned image, (owned, *shape), zero at first.

    Perturbations, of shape (c, h, w), follow the crop and flip of their image unless `aligned` is
    false; anything else, such as one number per image, is stored unchanged. `scale` is the unit of
    `int8`, in pixels.
    """

    def __init__(
        self,
        num_images: int,
        shape: tuple[int, ...],
        context: DistributedContext,
        dtype: torch.dtype = torch.float32,
        *,
        scale: float | None = None,
        aligned: bool = True,
        initial: float = 0.0,
    ) -> None:
        self._context, self._num_images, self._aligned = context, num_images, aligned
        self._scale = scale
        owned = len(range(context.rank, num_images, context.world))
        self._values = torch.full((owned, *shape), initial, dtype=dtype, device=context.device)

    @classmethod
    def of_perturbations(
        cls,
        setup: TrainingSetup,
        eps: float,
        keep: Keep = "fp32",
        *,
        aligned: bool = True,
    ) -> SampleStore:
        """Return a store for one perturbation of each training image."""
        dtypes = {"fp32": setup.dtype, "fp16": torch.float16, "int8": torch.int8}
        return cls(
            setup.num_images,
            setup.shape,
            setup.context,
            dtypes[keep],
            scale=min(eps, 1.0) / 127 if keep == "int8" else None,  # no pixel moves by more than 1
            aligned=aligned,
        )

    def read(self, batch: Batch) -> Tensor:
        """Return the values of a batch, in its augmented frame and its precision, (n, *shape)."""
        values = self._wide(self._rows(batch), batch.images.dtype)
        view = self._view(batch)
        return values if view is None else cut(values, view)

    def write(self, batch: Batch, values: Tensor) -> None:
        """Store `values`, (n, *shape), given in the augmented frame of the batch."""
        rows = self._rows(batch)
        view = self._view(batch)
        if view is not None:
            values = paste(values, view, onto=self._wide(rows, values.dtype))
        if self._scale is not None:
            unit = self._scale or 1.0  # a ball of radius 0 holds zeros
            values = (values / unit).round().clamp(-127, 127)
        self._values[rows] = values.to(self._values.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return all rows by global index, gathered from every worker: a collective."""
        index = torch.arange(
            self._context.rank, self._num_images, self._context.world, device=self._values.device
        )
        order = self._context.gather(index).argsort()
        return {"values": self._context.gather(self._values)[order].cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this worker's share of `state`, which any number of workers may have written."""
        share = state["values"][self._context.rank :: self._context.world]
        self._values.copy_(share)

    def _view(self, batch: Batch) -> AugmentedView | None:
        """Return the crop and flip of a batch if stored values follow them."""
        return batch.view if self._aligned and self._values.dim() == 4 else None

    def _wide(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        values = self._values[rows].to(dtype)
        return values if self._scale is None else values * self._scale

    def _rows(self, batch: Batch) -> Tensor:
        return batch.index // self._context.world


class SlotStore:
    """One perturbation per *slot* of the batch, independent of its images (Free), zero at first.

    Slot s of the global batch belongs to worker s modulo the number of workers, as its images do.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self._context = setup.context
        local = setup.batch_size // setup.context.world
        self.values = torch.zeros(
            local, *setup.shape, dtype=setup.dtype, device=setup.context.device
        )

    def state_dict(self) -> dict[str, Any]:
        """All slots in the order of the global batch: a collective."""
        ranks = self._context.gather(self.values).unflatten(0, (self._context.world, -1))
        return {"values": ranks.transpose(0, 1).flatten(0, 1).clone().cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this worker's slots of `state`, which any number of workers may have written."""
        self.values.copy_(state["values"][self._context.rank :: self._context.world])


class GradientTable:
    """The last weight gradient of every image and their running mean z: n * P numbers.

    z_bar = z + (theta / p) dz, with p the share of the images in a batch.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self._shapes = [p.shape for p in trainable(setup.model)]
        self._context, self._num_images = setup.context, setup.num_images
        row = (sum(shape.numel() for shape in self._shapes),)
        self._rows = SampleStore(setup.num_images, row, setup.context, setup.dtype)
        self._mean = torch.zeros(row, dtype=setup.dtype, device=setup.context.device)
        self._ahead = torch.zeros_like(self._mean)

    def direction(self) -> list[Tensor]:
        """z_bar, in the shapes of the weights."""
        parts = self._ahead.split([shape.numel() for shape in self._shapes])
        return [part.view(shape).clone() for part, shape in zip(parts, self._shapes, strict=True)]

    def learn(self, batch: Batch, grads: Tensor, theta: float) -> None:
        """Replace the rows of a batch and move z: a collective."""
        change = (grads - self._rows.read(batch)).sum(0)
        self._rows.write(batch, grads)
        count = self._context.total(change.new_tensor(len(batch)))
        change = self._context.total(change) / self._num_images
        self._mean = self._mean + change
        self._ahead = self._mean + theta * self._num_images / count * change

    def state_dict(self) -> dict[str, Any]:
        """The table by global index, gathered from every worker: a collective."""
        rows = self._rows.state_dict()["values"]
        return {"rows": rows, "mean": self._mean, "ahead": self._ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this worker's rows of `state`, which any number of workers may have written."""
        self._rows.load_state_dict({"values": state["rows"]})
        self._mean.copy_(state["mean"])
        self._ahead.copy_(state["ahead"])


def cut(values: Tensor, view: AugmentedView) -> Tensor:
    """Pad with zeros, crop and mirror each image by `view`, (n, c, h, w) -> (n, c, h, w)."""
    if values.device.type == "cpu" and values.shape[1:].numel() > _LARGE:
        return _cut_one_by_one(values, view)
    sample, row, column = _places(values, view)
    padded = torch.nn.functional.pad(values, [view.pad] * 4)
    return padded[sample, :, row, column].permute(0, 3, 1, 2).contiguous()


def _cut_one_by_one(values: Tensor, view: AugmentedView) -> Tensor:
    """The same, by copies of rectangles."""
    height, width = values.shape[-2:]
    result = torch.zeros_like(values, memory_format=torch.contiguous_format)
    shifts = zip(view.top.tolist(), view.left.tolist(), view.mirrored.tolist(), strict=True)
    for image, target, (top, left, mirrored) in zip(values, result, shifts, strict=True):
        down, along = top - view.pad, left - view.pad  # of the crop, from the corner of the image
        rows = slice(max(down, 0), max(min(height, height + down), 0))
        columns = slice(max(along, 0), max(min(width, width + along), 0))
        part = image[:, rows, columns]
        first = columns.start - along  # of the part in the crop
        if mirrored:
            part, first = part.flip(-1), width - first - part.shape[-1]
        target[:, rows.start - down :, first:][:, : part.shape[1], : part.shape[2]] = part
    return result


def paste(values: Tensor, view: AugmentedView, onto: Tensor) -> Tensor:
    """Invert `cut`: write cropped values into a copy of `onto`, whose other pixels stay."""
    sample, row, column = _places(values, view)
    height, width = values.shape[-2:]
    padded = torch.nn.functional.pad(onto, [view.pad] * 4)
    padded[sample, :, row, column] = values.permute(0, 2, 3, 1)
    return padded[..., view.pad : view.pad + height, view.pad : view.pad + width].contiguous()


def _places(values: Tensor, view: AugmentedView) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, row and column in the padded image of every pixel of the view, broadcastable to (n, h, w)."""
    height, width = values.shape[-2:]
    sample = torch.arange(len(values), device=values.device)[:, None, None]
    down = torch.arange(height, device=values.device)
    along = torch.arange(width, device=values.device).expand(len(values), width)
    along = torch.where(view.mirrored[:, None], width - 1 - along, along)
    return sample, (view.top[:, None] + down)[:, :, None], (view.left[:, None] + along)[:, None, :]
