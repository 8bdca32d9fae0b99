"""torchvision's classes: one tensor from the arrays they hold, one sentence where they find none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from raytrain.core.errors import RequestError
from raytrain.data.published import PUBLISHED
from raytrain.data.sources import SOURCES, Split, read

NUM_IMAGES = 100
LAYOUTS = {  # how torchvision holds the pixels of an n c h w tensor
    "cifar10": lambda pixels: pixels.numpy().transpose(0, 2, 3, 1),
    "cifar100": lambda pixels: pixels.numpy().transpose(0, 2, 3, 1),
    "mnist": lambda pixels: pixels[:, 0],
    "fashion_mnist": lambda pixels: pixels[:, 0],
    "svhn": lambda pixels: np.transpose(pixels.permute(2, 3, 1, 0).numpy(), (3, 2, 0, 1)),
}


def _pixels(name: str) -> torch.Tensor:
    source = SOURCES[name]
    shape = (NUM_IMAGES, source.channels, source.size, source.size)
    count = int(np.prod(shape))
    return torch.arange(count).remainder(251).to(torch.uint8).view(shape)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_arrays_of_torchvision_become_one_tensor(
    name: str, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [row % len(SOURCES[name].classes) for row in range(NUM_IMAGES)]
    asked: dict[str, Any] = {}

    def fake(root: Path, **options: Any) -> SimpleNamespace:
        asked.update(options, root=root)
        held = {
            "svhn": {"labels": np.array(labels)},
            "mnist": {"targets": torch.tensor(labels)},
            "fashion_mnist": {"targets": torch.tensor(labels)},
        }.get(name, {"targets": labels})
        return SimpleNamespace(data=LAYOUTS[name](_pixels(name)), **held)

    monkeypatch.setattr(datasets, PUBLISHED[name].loader, fake)
    images = read(name, split, path=Path("here"))
    assert torch.equal(images.whole, _pixels(name))
    assert images.whole.is_contiguous()
    assert images.labels.tolist() == labels
    assert images.classes == SOURCES[name].classes
    choice = {"split": split} if name == "svhn" else {"train": split == "train"}
    assert asked == {"root": Path("here"), "download": False, **choice}


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_give_the_folder_the_names_expected_and_how_to_fetch_them(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        read(name, "train", path=tmp_path)
    sentence, loader = str(caught.value), PUBLISHED[name].loader
    assert sentence.startswith(f"data.root: {name} was expected in the folder '{tmp_path}'")
    assert PUBLISHED[name].files in sentence
    assert f'python -c "from torchvision.datasets import {loader}; {loader}(' in sentence
    assert "download=True)" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_named_are_those_that_torchvision_opens(name: str) -> None:
    loader = getattr(datasets, PUBLISHED[name].loader)
    folder = getattr(loader, "base_folder", "")
    assert PUBLISHED[name].files.startswith(folder)
    if name in ("cifar10", "cifar100"):
        assert loader.meta["filename"] in PUBLISHED[name].files
        assert loader.test_list[0][0] in PUBLISHED[name].files


def test_the_default_folder_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="in the folder 'data' as"):
        read("cifar10", "test")


def _idx(array: np.ndarray) -> bytes:
    """MNIST's own format: a header of big-endian integers, then bytes."""
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(length.to_bytes(4, "big") for length in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def _mnist(root: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(_idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))


PIXELS = np.random.RandomState(0).randint(0, 256, (20, 28, 28))
DIGITS = np.arange(20) % 10
FAULTS: dict[str, tuple[np.ndarray, np.ndarray, str]] = {
    "size": (
        PIXELS[:, :20, :20],
        DIGITS,
        "expected images of shape (1, 28, 28), found (1, 20, 20)",
    ),
    "number": (PIXELS, DIGITS[:10], "expected a label for each of 20 images, found 10 labels"),
    "label": (PIXELS, DIGITS + 1, "expected labels 0..9, found 10"),
    "one_class": (
        PIXELS,
        DIGITS * 0,
        "expected every class 0..9 in the training images, found no image of 1, 2, 3, 4, 5 and 4 "
        "more",
    ),
    "equal": (PIXELS * 0 + 9, DIGITS, "expected training images that differ, found 20 equal ones"),
    "dark": (PIXELS // 128, DIGITS, "expected pixels in 0..255, found none above 1; black and"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_files_that_are_not_the_published_ones_are_refused(case: str, tmp_path: Path) -> None:
    pixels, labels, fault = FAULTS[case]
    _mnist(tmp_path, pixels, labels)
    with pytest.raises(RequestError) as caught:
        read("mnist", "train", path=tmp_path)
    where = f"data.root: mnist (train) in the folder '{tmp_path}': "
    assert str(caught.value).startswith(where + fault)


def test_some_of_the_published_images_are_enough(tmp_path: Path) -> None:
    _mnist(tmp_path, PIXELS, DIGITS)
    assert read("mnist", "train", path=tmp_path).labels.tolist() == DIGITS.tolist()
