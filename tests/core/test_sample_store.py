"""Perturbations remembered per image: the frame they live in, and who owns them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_near, batch_of, generator, views_of
from torch import Tensor

from raytrain.core import sample_store
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.sample_store import SampleStore, cut, paste
from raytrain.core.types import AugmentedView, Batch

SHAPE = (2, 5, 7)  # channels, height, width: not square, so that axes cannot be mixed up


def values_of(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, *SHAPE, generator=generator(seed), dtype=torch.float64)


def batch_at(index: list[int], view: AugmentedView | None = None, seed: int = 0) -> Batch:
    plain = batch_of(len(index), seed=seed)
    images = torch.zeros(len(index), *SHAPE, dtype=torch.float64)
    return Batch(images, plain.labels, torch.tensor(index), plain.rng, view)


def seen(view: AugmentedView, num: int) -> Tensor:
    """Which cells of the original images a view shows."""
    height, width = SHAPE[1:]
    shown = torch.zeros(num, *SHAPE, dtype=torch.bool)
    for i in range(num):
        top, left = int(view.top[i]) - view.pad, int(view.left[i]) - view.pad
        rows = slice(max(0, top), max(0, min(height, top + height)))
        columns = slice(max(0, left), max(0, min(width, left + width)))
        shown[i, :, rows, columns] = True
    return shown


# --- views ------------------------------------------------------------------------------------


def test_a_worker_without_images_cuts_none() -> None:
    none = torch.zeros(0, dtype=torch.long)
    view = AugmentedView(1, none, none, none.bool())
    assert cut(torch.zeros(0, 3, 8, 8), view).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("large", [0, 10**9])  # numbers per image, above which each is copied
@pytest.mark.parametrize("pad", [0, 1, 3, 6])
def test_cut_pads_crops_and_mirrors_each_image_as_its_view_says(
    pad: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_store, "_LARGE", large)
    values, view = values_of(12), views_of(12, pad)
    height, width = SHAPE[1:]
    found = cut(values, view)
    for i in range(12):
        padded = torch.zeros(2, height + 2 * pad, width + 2 * pad, dtype=torch.float64)
        padded[:, pad : pad + height, pad : pad + width] = values[i]
        top, left = int(view.top[i]), int(view.left[i])
        wanted = padded[:, top : top + height, left : left + width]
        assert torch.equal(found[i], wanted.flip(-1) if view.mirrored[i] else wanted)


def test_cut_of_the_middle_is_the_image_and_mirroring_twice_too() -> None:
    values = values_of(4)
    middle = torch.full((4,), 3)
    for flag in (False, True):
        view = AugmentedView(3, middle, middle, torch.full((4,), flag))
        once = cut(values, view)
        assert torch.equal(once, values.flip(-1) if flag else values)
        assert torch.equal(cut(once, view), values)


@pytest.mark.parametrize("pad", [0, 1, 3, 6])
def test_paste_undoes_cut_on_what_the_view_shows_and_leaves_the_rest(pad: int) -> None:
    values, view, onto = values_of(12), views_of(12, pad), values_of(12, seed=1)
    pasted, shown = paste(cut(values, view), view, onto), seen(view, 12)
    assert torch.equal(pasted[shown], values[shown])
    assert torch.equal(pasted[~shown], onto[~shown])
    assert bool(shown.any()) and bool((~shown).any()) == (pad > 0)


@pytest.mark.parametrize("pad", [0, 1, 3, 6])
def test_cut_reads_back_what_paste_wrote_inside_the_image(pad: int) -> None:
    values, view, onto = values_of(12), views_of(12, pad), values_of(12, seed=1)
    inside = cut(torch.ones_like(values), view) > 0  # not on padding, which is not stored
    read = cut(paste(values, view, onto), view)
    assert torch.equal(read[inside], values[inside])
    assert not read[~inside].any()


@pytest.mark.parametrize("pad", [0, 2])
def test_cut_and_paste_write_into_none_of_their_arguments(pad: int) -> None:
    values, view, onto = values_of(6), views_of(6, pad), values_of(6, seed=1)
    copies = values.clone(), onto.clone()
    cut(values, view)[:] = 7
    paste(values, view, onto)[:] = 7
    assert torch.equal(values, copies[0]) and torch.equal(onto, copies[1])


# --- the store --------------------------------------------------------------------------------


def test_store_is_zero_at_first_and_changes_only_in_the_rows_of_a_batch() -> None:
    store, values = SampleStore(9, SHAPE, DistributedContext()), values_of(3)
    everyone = batch_at(list(range(9)))
    assert not store.read(everyone).any()
    store.write(batch_at([7, 0, 4]), values)
    read = store.read(everyone)
    # 1e-7: kept in float32.
    assert_near(read[torch.tensor([7, 0, 4])], values, 1e-7)
    assert not read[torch.tensor([1, 2, 3, 5, 6, 8])].any()
    assert read.dtype == torch.float64


@pytest.mark.parametrize("mirrored", [False, True])
def test_store_follows_crop_and_flip_and_keeps_cells_outside_the_crop(mirrored: bool) -> None:
    store = SampleStore(6, SHAPE, DistributedContext(), dtype=torch.float64)
    before, values, index = values_of(6), values_of(3, seed=1), [5, 2, 0]
    store.write(batch_at(list(range(6))), before)
    view = views_of(3, pad=2, mirrored=mirrored)
    store.write(batch_at(index, view), values)
    after = store.read(batch_at(list(range(6))))
    rows, shown = torch.tensor(index), seen(view, 3)
    assert torch.equal(after[rows][~shown], before[rows][~shown])
    assert torch.equal(after[rows], paste(values, view, before[rows]))
    assert torch.equal(after[torch.tensor([1, 3, 4])], before[torch.tensor([1, 3, 4])])
    assert torch.equal(store.read(batch_at(index, view)), cut(after[rows], view))


def test_each_worker_keeps_the_images_of_its_residue() -> None:
    values = values_of(11)
    for world in (1, 2, 3):
        for rank in range(world):
            store = SampleStore(
                11, SHAPE, DistributedContext(rank=rank, world=world), dtype=torch.float64
            )
            own = list(range(rank, 11, world))
            store.write(batch_at(own[::-1]), values[rank::world].flip(0))
            for i in own:
                assert torch.equal(store.read(batch_at([i]))[0], values[i])


def gathered(stores: list[SampleStore], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The state dict of several workers, their collective played by this process."""

    def gather(place: DistributedContext, values: Tensor) -> Tensor:
        if values.dim() == 1:
            total = 11
            shares = [torch.arange(r, total, place.world) for r in range(place.world)]
        else:
            shares = [s._values for s in stores]
        assert torch.equal(values, shares[place.rank])
        return torch.cat(shares)

    with monkeypatch.context() as patch:
        patch.setattr(DistributedContext, "gather", gather)
        return stores[0].state_dict()


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_store_survives_a_change_of_world_size(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, stores = values_of(11), []
    for rank in range(before):
        store = SampleStore(
            11, SHAPE, DistributedContext(rank=rank, world=before), dtype=torch.float64
        )
        store.write(batch_at(list(range(rank, 11, before))), values[rank::before])
        stores.append(store)
    state = gathered(stores, monkeypatch)
    assert torch.equal(state["values"], values)  # by global index, whoever wrote it
    for rank in range(after):
        store = SampleStore(
            11, SHAPE, DistributedContext(rank=rank, world=after), dtype=torch.float64
        )
        store.load_state_dict(state)
        own = list(range(rank, 11, after))
        assert torch.equal(store.read(batch_at(own)), values[rank::after])


def test_a_saved_store_does_not_change_with_the_live_one() -> None:
    store = SampleStore(4, SHAPE, DistributedContext())
    state = store.state_dict()
    store.write(batch_at([0, 1, 2, 3]), values_of(4))
    assert not state["values"].any()
    other = SampleStore(4, SHAPE, DistributedContext())
    other.load_state_dict(state)
    other.write(batch_at([0]), values_of(1))
    assert not state["values"].any()
