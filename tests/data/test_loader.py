"""The order in which images are visited: by residue, the same for any number of workers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import generator
from torch import Tensor

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.types import Batch, BatchRandom
from raytrain.data.augment import random_view
from raytrain.data.loader import (
    SplitShard,
    epoch_order,
    iter_eval,
    iter_train,
    num_steps,
    open_splits,
    open_test,
    split_validation,
)
from raytrain.data.spec import DataSpec

WORLDS = [1, 2, 4]


def part_of(num: int = 103, rank: int = 0, world: int = 1, dtype=torch.float32) -> SplitShard:
    """This worker's share of `num` made-up images; the label of an image is its index."""
    pixels = torch.randint(256, (num, 1, 6, 6), generator=generator(0), dtype=torch.uint8)
    context = DistributedContext(rank=rank, world=world)
    return SplitShard(pixels[rank::world], torch.arange(num)[rank::world], num, context, dtype)


def visits(world: int, *, num: int = 103, size: int = 8, seed: int = 0, epoch: int = 0):
    """The batches of one epoch, [rank][step]."""
    return [
        list(iter_train(part_of(num, rank, world), size, seed, epoch, pad=2, flip=True))
        for rank in range(world)
    ]


def by_index(batches: list[Batch]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Image, label and noise of every index in these batches of one step."""
    found = {}
    for batch in batches:
        noise = batch.rng.uniform("start", 3)
        for row, index in enumerate(batch.index.tolist()):
            found[index] = (batch.images[row], batch.labels[row], noise[row])
    return found


# --- an epoch ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "size"), [(103, 8), (96, 8), (8, 8), (15, 8), (50, 1), (7, 5)])
def test_every_image_comes_at_most_once_per_epoch(num: int, size: int) -> None:
    for seed in range(20):
        order = epoch_order(num, size, seed)
        assert order.shape == (num // size, size)
        seen = order.flatten().tolist()
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(num))


def test_each_slot_holds_the_images_of_its_residue() -> None:
    for seed in range(20):
        order = epoch_order(103, 8, seed)
        assert torch.equal(order % 8, torch.arange(8).expand_as(order))


def test_images_left_out_of_an_epoch_change_from_one_to_the_next() -> None:
    # 103 images in steps of 8: each of the slots 0..6 leaves one of its 13 images out.
    left_out = Counter()
    for epoch in range(100):
        left_out.update(set(range(103)) - set(epoch_order(103, 8, epoch).flatten().tolist()))
    # 700 times in all, over 91 images; the slot 7 has twelve images and shows them all.
    assert sum(left_out.values()) == 700
    assert set(left_out) == {i for i in range(103) if i % 8 != 7}
    assert max(left_out.values()) <= 25  # mean 7.7, standard deviation 2.7, six of them


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(torch.cat([batch.index for batch in visits(1, seed=seed, epoch=epoch)[0]]).tolist())
        for seed in (0, 1)
        for epoch in range(5)
    }
    assert len(orders) == 10


def test_an_epoch_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    for one, other in zip(visits(1)[0], visits(1)[0], strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        assert torch.equal(one.rng.normal("a", 2), other.rng.normal("a", 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_batch_holds_the_same_images_and_noise_whatever_the_number_of_workers(
    world: int,
) -> None:
    alone, shared = visits(1)[0], visits(world)
    assert len(alone) == 12 and all(len(batches) == 12 for batches in shared)
    for step, whole in enumerate(alone):
        wanted, found = by_index([whole]), by_index([batches[step] for batches in shared])
        assert wanted.keys() == found.keys() and len(found) == 8
        for index, values in wanted.items():
            assert all(map(torch.equal, values, found[index]))


@pytest.mark.parametrize("world", [2, 4])
def test_a_worker_meets_only_images_of_its_own_residue(world: int) -> None:
    for epoch in range(3):
        for rank, batches in enumerate(visits(world, epoch=epoch)):
            assert all((batch.index % world == rank).all() for batch in batches)
            assert all(len(batch) == 8 // world for batch in batches)


def test_labels_and_pixels_are_those_of_the_index() -> None:
    whole = part_of()
    for world in WORLDS:
        for rank in range(world):
            part = part_of(rank=rank, world=world)
            for batch in iter_train(part, 8, 0, 0, pad=0, flip=False):
                assert batch.view is None
                assert torch.equal(batch.labels, batch.index)
                assert torch.equal(batch.images, whole.whole[batch.index].float() / 255)


def test_pixels_lie_between_zero_and_one_in_the_wanted_precision() -> None:
    for dtype in (torch.float32, torch.float64):
        part = part_of(dtype=dtype)
        batch = next(iter(iter_train(part, 8, 0, 0, pad=2, flip=True)))
        assert batch.images.dtype == dtype
        assert 0 <= float(batch.images.min()) < float(batch.images.max()) <= 1
        levels = batch.images * 255
        assert float((levels - levels.round()).abs().max()) <= 1e-4  # k / 255 * 255 rounds


# --- augmentation -----------------------------------------------------------------------------


def test_crops_and_flips_are_uniform_over_what_was_asked_for() -> None:
    rng = BatchRandom(0, 5000, slice(None), torch.device("cpu"))
    view = random_view(rng, pad=2, flip=True)
    assert view is not None and view.pad == 2
    for offsets in (view.top, view.left):
        counts = offsets.bincount(minlength=5)
        # Mean 1000, standard deviation 28; four of them. The seed is fixed.
        assert len(counts) == 5 and int((counts - 1000).abs().max()) <= 113
    assert abs(int(view.mirrored.sum()) - 2500) <= 4 * 35.4
    together = torch.corrcoef(
        torch.stack([view.top.double(), view.left.double(), view.mirrored.double()])
    )
    assert float((together - torch.eye(3)).abs().max()) <= 4 / 5000**0.5


def test_flip_alone_and_crop_alone_do_nothing_else() -> None:
    rng = BatchRandom(0, 100, slice(None), torch.device("cpu"))
    flipped, cropped = random_view(rng, 0, True), random_view(rng, 1, False)
    assert flipped is not None and not flipped.top.any() and not flipped.left.any()
    assert 0 < int(flipped.mirrored.sum()) < 100
    assert cropped is not None and not cropped.mirrored.any() and bool(cropped.top.any())
    assert random_view(rng, 0, False) is None


# --- a sweep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [3, 8, 103, 500])
def test_a_sweep_visits_every_image_once_for_any_world_and_batch_size(
    world: int, size: int
) -> None:
    seen: list[int] = []
    alone = {}
    for batch in iter_eval(part_of(), size, seed=0):
        alone |= by_index([batch])
    for rank in range(world):
        for batch in iter_eval(part_of(rank=rank, world=world), size, seed=0):
            assert batch.view is None and len(batch) <= size
            seen += batch.index.tolist()
            for index, values in by_index([batch]).items():
                assert all(map(torch.equal, values, alone[index]))
    assert sorted(seen) == list(range(103))


# --- splits -----------------------------------------------------------------------------------


def labels_of(num: int = 400) -> Tensor:
    return torch.randint(10, (num,), generator=generator(0)) ** 2 // 10  # uneven classes


@pytest.mark.parametrize(("validation", "size"), [(0.1, 40), (100, 100), (0.5, 200)])
def test_validation_split_is_disjoint_stratified_and_of_the_size_asked_for(
    validation: float, size: int
) -> None:
    labels = labels_of()
    held, kept = split_validation(labels, DataSpec(validation=validation))
    assert len(held) == size and sorted([*held, *kept]) == list(range(400))
    share = labels.bincount() * size / 400
    assert float((labels[torch.from_numpy(held)].bincount() - share).abs().max()) < 1


def test_validation_split_depends_on_the_split_seed_and_on_nothing_else() -> None:
    labels = labels_of()
    plain, _ = split_validation(labels, DataSpec(validation=50))
    for spec in (
        DataSpec(validation=50, train_size=100),
        DataSpec(validation=50, pad=0, flip=True),
    ):
        assert (split_validation(labels, spec)[0] == plain).all()
    assert set(split_validation(labels, DataSpec(validation=50, split_seed=1))[0]) != set(plain)


def test_train_size_takes_a_stratified_part_of_the_training_images() -> None:
    labels = labels_of()
    held, everyone = split_validation(labels, DataSpec(validation=50))
    small_held, small = split_validation(labels, DataSpec(validation=50, train_size=120))
    assert len(small) == 120 and set(small) < set(everyone) and not set(small) & set(small_held)
    share = labels[torch.from_numpy(everyone)].bincount() * 120 / 350
    assert float((labels[torch.from_numpy(small)].bincount() - share).abs().max()) < 1
    assert (split_validation(labels, DataSpec(validation=50, train_size=350))[1] == everyone).all()


@pytest.mark.parametrize("world", WORLDS)
def test_digits_are_shared_out_whole_and_never_reach_the_test_set(world: int) -> None:
    spec = DataSpec(validation=100, train_size=300)
    alone = open_splits(spec, DistributedContext())
    for name, num in (("train", 300), ("valid", 100)):
        whole: SplitShard = getattr(alone, name)
        assert whole.num_images == len(whole.whole) == num and whole.shape == (1, 8, 8)
        for rank in range(world):
            part: SplitShard = getattr(
                open_splits(spec, DistributedContext(rank=rank, world=world)), name
            )
            assert part.num_images == num
            assert torch.equal(part.whole, whole.whole[rank::world])
            assert torch.equal(part.labels, whole.labels[rank::world])
    test, source = open_test(spec, DistributedContext())
    assert test.num_images == 397 and source == alone.source and len(source.classes) == 10


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (DataSpec(validation=400), r"data\.validation: 400 of 400 images cannot be taken"),
        (DataSpec(validation=1000), r"data\.validation: 1000 of 400 images cannot be taken"),
        (DataSpec(validation=2), r"data\.validation: 2 of 400 images .* every class"),
        (DataSpec(validation=0.001), r"data\.validation: 0\.001 of 400 .* every class"),
        (DataSpec(validation=50, train_size=3), r"data\.train_size: 3 of 350 .* every class"),
        (DataSpec(validation=50, train_size=351), r"data\.train_size: 351 .* 350 are left"),
    ],
    ids=repr,
)
def test_a_split_that_cannot_be_made_is_refused_with_its_field(
    spec: DataSpec, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        split_validation(labels_of(), spec)


def test_a_class_of_one_image_cannot_be_split() -> None:
    with pytest.raises(RequestError, match=r"data\.validation: .* every class"):
        split_validation(torch.tensor([0] * 50 + [1]), DataSpec(validation=10))


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    assert num_steps(part_of(), 103) == 1
    with pytest.raises(
        RequestError, match=r"batch_size: 104 is more than the 103 training images"
    ):
        num_steps(part_of(), 104)
