"""What is exported: a checkpoint, its network, the images it is checked on, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.types import Spec
from raytrain.data.catalogue import SOURCES, Source
from raytrain.data.loader import open_test
from raytrain.exporting.check import SIZES
from raytrain.exporting.numbers import Record, record_of
from raytrain.models import Classifier
from raytrain.tracking.checkpoint_lookup import checkpoint_file
from raytrain.tracking.default_name import default_name
from raytrain.training.checkpoint import LAST, Saved, load
from raytrain.training.run_folder import run_id_of
from raytrain.training.setup import network


class Facts(Spec):
    """Metadata of a file of weights: enough to build its network without the data."""

    name: str
    model: dict[str, Any]  # a ModelSpec
    channels: int
    size: int  # height and width of the images
    classes: tuple[str, ...]
    data: str
    norm: str
    eps: float  # pixels in [0, 1]
    algorithm: str
    seed: int
    epoch: int
    averaged: bool  # the weights are an average over training (ema)
    signature: str


@dataclass(frozen=True)
class Subject:
    """The network is in float32, in eval mode, from images in [0, 1] to logits."""

    file: Path
    saved: Saved
    run: RunConfig  # as it was asked for, with paths as they were given
    model: Classifier
    source: Source
    images: Tensor  # a few test images
    num_test: int
    run_id: str | None
    record: Record

    @property
    def name(self) -> str:
        """Of the run; also of the folder and of RobustBench's files."""
        tags = self.record.tags
        recorded = None if "trial" in tags else tags.get("mlflow.runName")
        name = self.run.run_name or recorded or default_name(self.run)
        last = "-last" if self.file.name == LAST else ""
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip("._") + last

    @property
    def data(self) -> str:
        """The data set's name, or its file's without the folders."""
        name = self.run.data.name
        return name if name in SOURCES else Path(name).stem

    def facts(self) -> Facts:
        """For the metadata of the files of weights."""
        run = self.run
        return Facts(
            name=self.name,
            model=run.model.model_dump(mode="json", exclude={"weights"}),
            channels=self.source.channels,
            size=self.source.size,
            classes=self.source.classes,
            data=self.data,
            norm=run.threat.norm,
            eps=run.threat.eps,
            algorithm=run.algorithm.name,
            seed=run.seed,
            epoch=self.saved.epoch,
            averaged=run.ema is not None,
            signature=run.signature(),
        )


def subject_of(name: str, which: str | None, storage: Path, uri: str | None) -> Subject:
    """Everything about the checkpoint that `name` means, on the CPU.

    Raises:
        RequestError: if there is no such checkpoint, or its data set is not here.
    """
    file = checkpoint_file(name, which, storage, uri)
    saved = load(file)
    if saved.imported:
        raise RequestError(
            f"{file}: a network that was imported, whose training is not known; expected one that "
            "raytrain has trained"
        )
    test, source = open_test(saved.run.data, DistributedContext())
    model = network(saved).float().eval()
    assert isinstance(model, Classifier)
    run_id = run_id_of(file.parent)
    kind = "last" if file.name == LAST else "best"
    return Subject(
        file=file,
        saved=saved,
        run=_as_asked(file, saved.run),
        model=model,
        source=source,
        images=test.read(torch.arange(min(max(SIZES), test.num_images))).float() / 255,
        num_test=test.num_images,
        run_id=run_id,
        record=record_of(uri or saved.run.tracking_uri, run_id, file.parent, kind, saved.epoch),
    )


def _as_asked(file: Path, run: RunConfig) -> RunConfig:
    """The configuration of run.yaml, whose paths are as they were given; a checkpoint's are absolute."""
    try:
        asked = as_run(file.parent / "run.yaml")
    except RequestError:
        return run
    return asked if _apart_from_paths(asked) == _apart_from_paths(run) else run


def _apart_from_paths(run: RunConfig) -> dict[str, Any]:
    values = run.computed()
    for path in ("name", "root", "test_path"):
        values["data"].pop(path)
    return values
