"""Configuration of the data: data set, validation split and augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from raytrain.core.file_systems import is_url
from raytrain.core.types import ADDED, Spec
from raytrain.data.catalogue import SOURCES

DEFAULT_FOLDER = Path("data")


class ExtraImages(Spec):
    """Additional images for training, such as generated ones: a share of every batch.

    The default share is that of Rebuffi et al. 2021 (arXiv 2103.01946) and, for a million generated images,
    of Wang et al. 2023 (arXiv 2302.04638).
    """

    bare: ClassVar[str | None] = "name"

    name: Annotated[
        str,
        Field(
            description="path or URL of a .parquet file or of a folder of them",
            examples=["FILE.parquet"],
        ),
    ]
    share: Annotated[float, Field(gt=0, lt=1, description="share of every batch")] = 0.7

    def per_batch(self, batch_size: int) -> int:
        """Return the number of additional images in a batch.

        Raises:
            ValueError: if none or all of the batch would be.
        """
        count = round(self.share * batch_size)
        if not 0 < count < batch_size:
            most = max(1, batch_size - 1)
            raise ValueError(
                f"data.extra.share: {self.share:g} of a batch_size of {batch_size} is {count} images; "
                f"expected 1 to {most}, so that a batch has images of both sources"
            )
        return count


class DataSpec(Spec):
    """A data set by name (`raytrain train data=cifar10`) or by the path of a Parquet file or folder."""

    bare: ClassVar[str | None] = "name"

    name: Annotated[
        str,
        Field(
            description="a data set, or the path or URL of a .parquet file or of a folder of them",
            examples=[*SOURCES, "FILE.parquet"],
        ),
    ] = "digits"
    root: Annotated[
        Path | None, Field(description="folder of torchvision's files (default: data)")
    ] = None
    test_path: Annotated[
        str | Path | None,
        Field(description="path or URL of the test set's .parquet, if it is not found beside"),
    ] = None
    image_column: Annotated[str | None, Field(description="default: found by its type")] = None
    label_column: Annotated[str | None, Field(description="default: found by its name")] = None
    in_memory: Annotated[
        bool | None,
        Field(
            description="hold the pixels of Parquet images in memory, or else decode images while "
            "training (default: if they need at most half of it)"
        ),
    ] = None
    validation: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="images (1 or more), or share of the training set, held back",
        ),
    ] = 0.1
    split_seed: Annotated[
        int,
        Field(
            ge=0,
            lt=2**32,
            description="carves the validation split; apart from `seed`, so seeds compare",
        ),
    ] = 0
    train_size: Annotated[
        PositiveInt | None, Field(description="train on this many images only, stratified")
    ] = None
    pad: Annotated[
        NonNegativeInt | None,
        Field(description="random crops out of images padded by this; default: customary"),
    ] = None
    flip: Annotated[
        bool | None, Field(description="mirror half of the images; default: customary")
    ] = None

    cutmix: Annotated[
        float | None,
        ADDED,
        Field(gt=0, le=1, description="share of training images that get a box of another one"),
    ] = None
    extra: Annotated[
        ExtraImages | None,
        ADDED,
        Field(description="additional images for training, a share of every batch"),
    ] = None

    @field_validator("test_path")
    @classmethod
    def _file_or_url(cls, value: str | Path | None) -> str | Path | None:
        return value if value is None or is_url(value) else Path(value)

    @field_validator("validation")
    @classmethod
    def _whole_images(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a whole number of images, or a share below 1")
        return value

    def located(self) -> DataSpec:
        """Return the same with absolute paths: workers run in other folders than the command."""
        name = self.name if self.name in SOURCES else _absolute(self.name)
        root = (self.root or DEFAULT_FOLDER).resolve()
        test_path = self.test_path
        if test_path is not None and not is_url(test_path):
            test_path = Path(test_path).resolve()
        extra = self.extra
        if extra is not None:
            extra = extra.model_copy(update={"name": _absolute(extra.name)})
        places = {"name": name, "root": root, "test_path": test_path, "extra": extra}
        return self.model_copy(update=places)


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).resolve())
