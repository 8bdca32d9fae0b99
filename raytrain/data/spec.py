"""Configuration of the data: data set, validation split and augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from raytrain.core.file_systems import is_url
from raytrain.core.types import Spec
from raytrain.data.catalogue import SOURCES

DEFAULT_FOLDER = Path("data")


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
        path = self.name not in SOURCES and not is_url(self.name)
        name = str(Path(self.name).resolve()) if path else self.name
        root = (self.root or DEFAULT_FOLDER).resolve()
        test_path = self.test_path
        if test_path is not None and not is_url(test_path):
            test_path = Path(test_path).resolve()
        return self.model_copy(update={"name": name, "root": root, "test_path": test_path})
