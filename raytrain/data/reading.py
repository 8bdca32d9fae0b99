"""Images of a split as this and other processes read them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from jaxtyping import Int64, UInt8
from torch import Tensor

from raytrain.core.errors import TrainingFailed
from raytrain.core.file_systems import without_secrets
from raytrain.core.sample_store import cut
from raytrain.core.types import AugmentedView
from raytrain.data.images import AnySplit, ImageSet, Pixels
from raytrain.data.sources import read, read_additional
from raytrain.data.spec import DataSpec

if TYPE_CHECKING:
    from raytrain.data.stored_images import StoredImages


@dataclass(frozen=True)
class Selection:
    """Some rows of the pixels of a split, which are not copied."""

    images: Pixels
    rows: Int64[Tensor, " n"]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.images.shape[1:])

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.images[self.rows[rows]]

    def digest(self, rows: Int64[Tensor, " n"] | None = None) -> bytes | None:
        """A digest of the pixels of these rows (default: all) that needs no decoding, if the images are
        stored encoded.
        """
        digest = getattr(self.images, "digest", None)
        return None if digest is None else digest(self.rows if rows is None else self.rows[rows])


@dataclass(frozen=True)
class ImageReader:
    """Reads images that are not in memory, in any process of any machine that has the data."""

    fields: str  # of DataSpec, as JSON
    split: AnySplit
    memory: int  # bytes of images that are kept in memory
    content: str  # of the split, where batches are put together

    def __call__(
        self, rows: Int64[Tensor, " n"], view: AugmentedView | None
    ) -> UInt8[Tensor, "n c h w"]:
        """The pixels of these rows of the split, cropped and mirrored by `view`.

        Raises:
            TrainingFailed: if this process finds other images.
        """
        images = images_of(self.fields, self.split, self.memory)
        if content_of(images) != self.content:
            spec = DataSpec.model_validate_json(self.fields)
            field, name = "data.name", spec.name
            if self.split == "extra" and spec.extra is not None:
                field, name = "data.extra.name", spec.extra.name
            raise TrainingFailed(
                f"{field}: {without_secrets(name)} has changed since the run began, or is not the same on "
                "another machine; expected the same images everywhere"
            )
        pixels = cast("StoredImages", images.pixels).read(rows)
        return pixels if view is None else cut(pixels, view)


def content_of(images: ImageSet) -> str:
    """A digest that differs if pixels have another distribution, or images another number."""
    assert images.levels is not None
    return hashlib.sha256(images.levels.tobytes()).hexdigest()[:16]


@lru_cache(maxsize=4)
def images_of(fields: str, split: AnySplit, memory: int) -> ImageSet:
    """The images of a split, read once per process. `fields` is a DataSpec as JSON.

    Additional images are in memory if they need at most what training images leave of `memory`.
    """
    spec = DataSpec.model_validate_json(fields)
    like = None if split == "train" else images_of(fields, "train", memory)
    if split == "extra":
        assert spec.extra is not None and like is not None
        held = like.pixels.numel() if isinstance(like.pixels, Tensor) else 0
        return read_additional(spec.extra.name, like, spec.in_memory, max(0, memory - held))
    return read(
        spec.name,
        split,
        path=spec.root,
        image_column=spec.image_column,
        label_column=spec.label_column,
        test_path=spec.test_path,
        in_memory=spec.in_memory,
        memory=memory,
        like=like,
    )
