"""The catalogue agrees with itself; a name is known or the nearest ones are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytrain.core.errors import RequestError
from raytrain.data.published import PUBLISHED
from raytrain.data.sources import SOURCES, ImageSet, check_name, describe, read, source_of


@pytest.mark.parametrize("name", SOURCES)
def test_a_catalogue_entry_is_whole(name: str) -> None:
    source = SOURCES[name]
    assert len(source.mean) == len(source.std) == source.channels
    assert all(0 < mean < 1 for mean in source.mean)
    assert all(0 < std < 0.5 for std in source.std)
    assert 0 < source.eps < 0.5
    assert 0 <= source.pad <= source.size // 8
    assert len(set(source.classes)) == len(source.classes) == (100 if name == "cifar100" else 10)
    check_name(name)


def test_every_name_but_digits_is_read_by_torchvision() -> None:
    assert set(SOURCES) == {"digits", *PUBLISHED}


def test_the_hundred_classes_are_in_alphabetical_order() -> None:
    assert list(SOURCES["cifar100"].classes) == sorted(SOURCES["cifar100"].classes)


def test_only_photographs_that_keep_their_class_are_mirrored() -> None:
    flipped = {name for name, source in SOURCES.items() if source.flip}
    assert flipped == {"cifar10", "cifar100", "fashion_mnist"}


@pytest.mark.parametrize("name, nearest", [("cifar", "cifar10"), ("digts", "digits")])
def test_an_unknown_name_gives_the_nearest_ones(name: str, nearest: str) -> None:
    expected = rf"^data\.name: expected digits, .*, found '{name}'; the nearest is {nearest}$"
    with pytest.raises(RequestError, match=expected):
        read(name, "train")


@pytest.mark.parametrize("name", ["", "/no/such/folder", "x.csv", "~nobody/x"])
def test_a_name_that_is_no_path_to_parquet_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"^data\.name: expected .* a path ending in \.parquet"):
        check_name(name)


@pytest.mark.parametrize("field", ["image_column", "label_column", "test_path"])
def test_what_only_parquet_has_is_refused_elsewhere(field: str) -> None:
    value = Path("x") if field == "test_path" else "x"
    with pytest.raises(RequestError, match=f"data.{field}: expected nothing here, digits is not"):
        read("digits", "train", **{field: value})  # pyright: ignore[reportArgumentType]


def test_a_description_has_the_mean_and_deviation_of_the_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pixels[:, 1] //= 4
    source = describe(ImageSet(pixels, torch.zeros(50, dtype=torch.int64), ("all",)))
    values = (pixels.double() / 255).transpose(0, 1).flatten(1)
    assert source.mean == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert source.std == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-12)
    assert (source.channels, source.size, source.classes) == (3, 16, ("all",))
    assert (source.eps, source.flip, source.pad) == (8 / 255, False, 2)


def test_a_constant_channel_has_deviation_one() -> None:
    pixels = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    source = describe(ImageSet(pixels, torch.tensor([0, 1]), ("a", "b")))
    assert source.mean == pytest.approx((0.2,))
    assert source.std == (1.0,)


def test_the_source_of_a_known_name_is_its_entry_and_of_another_its_description() -> None:
    images = read("digits", "test")
    assert source_of("digits", images) is SOURCES["digits"]
    assert source_of("x.parquet", images) == describe(images)
