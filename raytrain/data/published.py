"""Published data sets in torchvision's files: CIFAR, MNIST, SVHN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain.core.errors import RequestError
from raytrain.data.catalogue import SOURCES, Source
from raytrain.data.images import ImageSet, Split, label_fault, pixel_fault


@dataclass(frozen=True)
class Published:
    """A data set class of torchvision: its name, its files, and its attribute of labels."""

    loader: str
    files: str
    labels: str = "targets"
    layout: str = "nhw"

    def options(self, split: Split) -> dict[str, Any]:
        """Return the argument that selects training or test images."""
        return {"split": split} if self.loader == "SVHN" else {"train": split == "train"}


PUBLISHED = {
    "cifar10": Published(
        "CIFAR10", "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}", layout="nhwc"
    ),
    "cifar100": Published("CIFAR100", "cifar-100-python/{train,test,meta}", layout="nhwc"),
    "mnist": Published("MNIST", "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "fashion_mnist": Published(
        "FashionMNIST", "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
    ),
    "svhn": Published("SVHN", "{train,test}_32x32.mat", labels="labels", layout="nchw"),
}


def read_published(name: str, split: Split, root: Path) -> ImageSet:
    """Read the arrays of torchvision as one tensor, without a download."""
    from torchvision import datasets

    source = PUBLISHED[name]
    loader = getattr(datasets, source.loader)
    try:
        data = loader(root, download=False, **source.options(split))
    except Exception as error:  # torchvision checks some files and fails on others in many ways
        raise RequestError(_missing(name, split, root, error)) from error
    pixels = np.asarray(data.data)
    if source.layout == "nhw":
        pixels = pixels[:, None]
    elif source.layout == "nhwc":
        pixels = pixels.transpose(0, 3, 1, 2)
    labels = np.asarray(getattr(data, source.labels), dtype=np.int64)
    if fault := _fault(pixels, labels, SOURCES[name], split):
        raise RequestError(f"data.root: {name} ({split}) in the folder '{root}': {fault}")
    return ImageSet(
        pixels=torch.from_numpy(np.array(pixels, dtype=np.uint8, order="C")),
        labels=torch.from_numpy(np.array(labels)),
        classes=SOURCES[name].classes,
    )


def _fault(pixels: np.ndarray, labels: np.ndarray, known: Source, split: Split) -> str | None:
    """Return a difference from the published files, of which torchvision does not check all."""
    shape = (known.channels, known.size, known.size)
    if pixels.shape[1:] != shape:
        return f"expected images of shape {shape}, found {pixels.shape[1:]}"
    if len(pixels) != len(labels):
        return f"expected a label for each of {len(pixels)} images, found {len(labels)} labels"
    outside = labels[(labels < 0) | (labels >= len(known.classes))]
    if len(outside):
        return f"expected labels 0..{len(known.classes) - 1}, found {outside[0]}"
    training = split == "train"
    fault = label_fault(labels, len(known.classes)) if training else None
    equal = training and all(np.array_equal(image, pixels[0]) for image in pixels)
    return fault or pixel_fault(int(pixels.max()), len(pixels) if equal else 0)


def _missing(name: str, split: Split, root: Path, error: Exception) -> str:
    source = PUBLISHED[name]
    choice = ", ".join(f"{key}={value!r}" for key, value in source.options(split).items())
    fetch = (
        f"from torchvision.datasets import {source.loader}; "
        f"{source.loader}({str(root)!r}, {choice}, download=True)"
    )
    reason = str(error).partition(".")[0].partition("\n")[0] or type(error).__name__
    return (
        f"data.root: {name} was expected in the folder '{root}' as torchvision lays it out, "
        f'{source.files} ({reason}); fetch it with: python -c "{fetch}"'
    )
