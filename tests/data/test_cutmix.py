"""CutMix: boxes, labels and partners; the same for any number of workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generator, one_by_one
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as soft_cross_entropy
from torch.nn.functional import one_hot

from raytrain.algorithms.gradalign import Aligned
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.losses import (
    AbstractLoss,
    CrossEntropy,
    Mart,
    Trades,
    cross_entropy,
    kl_divergence,
    label_loss,
)
from raytrain.core.oracle import Oracle
from raytrain.core.types import Batch, BatchRandom, MixedLabels
from raytrain.data.cutmix import mix_images, random_boxes
from raytrain.data.loader import iter_train
from raytrain.data.shard import SplitShard
from raytrain.data.slots import Slots
from raytrain.testing.recorded import RecordedOperations
from raytrain.testing.toys import batch_of, pixels, state_of, tiny_net
from raytrain.training.checkpoint import load, save
from raytrain.training.part_epoch import WithinEpoch
from raytrain.training.replay import ReplayedSteps, eager_steps
from raytrain.training.trainer import fit

NEVER = 1e-12  # a probability below every random number but 0


def random(width: int = 2000, seed: int = 0) -> BatchRandom:
    return BatchRandom(seed, width, slice(None), torch.device("cpu"))


def shard(
    num: int = 61, rank: int = 0, world: int = 1, slots: Slots | None = None, seed: int = 0
) -> SplitShard:
    """This worker's share of `num` made-up images; the label of an image is its number."""
    every = torch.randint(256, (num, 3, 8, 8), generator=generator(seed), dtype=torch.uint8)
    context = DistributedContext(rank=rank, world=world)
    owned = torch.arange(num)[rank::world] if slots is None else slots.owned(num, context)
    return SplitShard(every[owned], owned, num, context, slots=slots)


def epoch_of(
    rank: int = 0, world: int = 1, first: int = 0, mixed: float | None = 0.6, extra: bool = False
) -> list[Batch]:
    slots = (Slots(0, 3, 8), Slots(3, 5, 8)) if extra else (None, None)
    own = shard(61, rank, world, slots[0])
    more = shard(45, rank, world, slots[1], seed=1) if extra else None
    return list(iter_train(own, 8, 0, 2, 2, True, first, more, mixed))


# --- boxes ------------------------------------------------------------------------------------


def test_a_box_has_the_drawn_size_and_place_and_ends_at_the_border() -> None:
    rng, height, width = random(), 12, 9
    boxes = random_boxes(rng, (height, width), 1.0)
    sizes = (1 - rng.uniform("cutmix/lambda")).sqrt()
    rows, columns = rng.integers("cutmix/row", height), rng.integers("cutmix/column", width)
    clipped = 0
    for box, size, row, column in zip(boxes, sizes, rows, columns, strict=True):
        wanted = torch.zeros(height, width, dtype=torch.bool)
        tall, wide = int(height * size) // 2, int(width * size) // 2
        top, left = max(int(row) - tall, 0), max(int(column) - wide, 0)
        wanted[top : int(row) + tall, left : int(column) + wide] = True
        assert torch.equal(box, wanted)
        clipped += int(wanted.sum()) < 4 * tall * wide
    assert 200 < clipped < 1800


def test_the_share_of_the_first_label_is_that_of_its_pixels() -> None:
    size = 16  # a power of two: shares are exact
    black, white = (
        Batch(
            torch.full((2000, 3, size, size), value), torch.full((2000,), label), index, random()
        )
        for value, label, index in ((0.0, 4, torch.arange(2000)), (1.0, 7, torch.arange(2000) + 9))
    )
    batch = mix_images(black, white, 1.0)
    assert batch.mixed is not None
    assert torch.equal(batch.mixed.share, 1 - batch.images.mean((1, 2, 3)))
    assert set(batch.labels.tolist()) == {4} and set(batch.mixed.other.tolist()) == {7}
    assert torch.equal(batch.index, black.index)
    # lambda is uniform where the box is not cut: the mean of the area is below one half
    assert 0.2 < float(1 - batch.mixed.share.mean()) < 0.5


def test_the_probability_is_the_share_of_images_that_are_mixed() -> None:
    rng = random(4000)
    every, some = (random_boxes(rng, (16, 16), p).flatten(1).any(1) for p in (1.0, 0.25))
    assert not bool((some & ~every).any())
    assert abs(int(some.sum()) - int(every.sum()) / 4) <= 4 * (4000 * 3 / 16) ** 0.5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_order_in_memory_and_their_precision(
    memory_format: torch.memory_format,
) -> None:
    images = pixels(4, channels=3).contiguous(memory_format=memory_format)
    batch = replace(batch_of(4), images=images)
    mixed = mix_images(batch, replace(batch, images=1 - images), 1.0)
    assert mixed.images.is_contiguous(memory_format=memory_format)
    assert mixed.images.dtype == images.dtype == torch.float64
    assert mixed.mixed is not None and mixed.mixed.share.dtype == torch.float64


# --- batches ----------------------------------------------------------------------------------


def test_without_a_box_batches_are_the_plain_ones_bit_by_bit() -> None:
    plain, mixed = epoch_of(mixed=None), epoch_of(mixed=NEVER)
    assert len(plain) == len(mixed) == 7
    for one, other in zip(plain, mixed, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index) and one.mixed is None
        assert other.mixed is not None and bool((other.mixed.share == 1).all())
        logits = torch.randn(8, 61, generator=generator(0))
        wanted = cross_entropy(logits, one.labels, 0.1)
        assert torch.equal(label_loss(logits, other, 0.1), wanted)


def test_the_partner_is_the_image_of_the_same_slot_in_the_next_batch() -> None:
    plain, mixed = epoch_of(mixed=None), epoch_of(mixed=1.0)
    for step, batch in enumerate(mixed):
        before, partner = plain[step], plain[(step + 1) % len(plain)]
        boxes = random_boxes(before.rng, (8, 8), 1.0)[:, None]
        assert batch.mixed is not None and torch.equal(batch.mixed.other, partner.labels)
        assert torch.equal(batch.images, torch.where(boxes, partner.images, before.images))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_batch_is_the_same_whatever_the_number_of_workers(world: int, extra: bool) -> None:
    shared = [epoch_of(rank, world, extra=extra) for rank in range(world)]
    for step, whole in enumerate(epoch_of(extra=extra)):
        for rank, batches in enumerate(shared):
            part, here = batches[step], whole[torch.arange(rank, 8, world)]
            assert part.mixed is not None and here.mixed is not None
            for name in ("images", "labels", "index"):
                assert torch.equal(getattr(part, name), getattr(here, name))
            assert torch.equal(part.mixed.other, here.mixed.other)
            assert torch.equal(part.mixed.share, here.mixed.share)


def test_an_epoch_goes_on_where_it_was_left() -> None:
    for first in (3, 6):
        for one, other in zip(epoch_of()[first:], epoch_of(first=first), strict=True):
            assert one.mixed is not None and other.mixed is not None
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.mixed.share, other.mixed.share)
            assert torch.equal(one.mixed.other, other.mixed.other)


# --- losses -----------------------------------------------------------------------------------


def mixed_batch(num: int = 8, seed: int = 0) -> Batch:
    batch, other = batch_of(num, seed=seed), batch_of(num, seed=seed + 1)
    share = torch.rand(num, generator=generator(seed), dtype=torch.float64)
    return replace(batch, mixed=MixedLabels(other.labels.roll(1), share))


def targets_of(batch: Batch, classes: int) -> Tensor:
    assert batch.mixed is not None
    share = batch.mixed.share[:, None]
    return share * one_hot(batch.labels, classes) + (1 - share) * one_hot(
        batch.mixed.other, classes
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_those_of_the_mixed_distribution_of_labels(smoothing: float) -> None:
    net, batch = tiny_net(), mixed_batch()
    delta = 0.1 * torch.randn(batch.images.shape, generator=generator(0), dtype=torch.float64)
    logits, moved = net(batch.images), net(batch.images + delta)

    def wanted(at: Tensor, smoothing: float) -> Tensor:
        targets = targets_of(batch, at.shape[1])
        return soft_cross_entropy(at, targets, reduction="none", label_smoothing=smoothing)

    loss = CrossEntropy(label_smoothing=smoothing)
    assert torch.allclose(loss.outer(net, batch, delta, ()), wanted(moved, smoothing), rtol=1e-12)
    assert torch.allclose(loss.inner(net, batch, delta, ()), wanted(moved, 0.0), rtol=1e-12)
    trades = Trades(beta=2.0, label_smoothing=smoothing)
    both = wanted(logits, smoothing) + 2 * kl_divergence(logits, moved)
    assert torch.allclose(trades.outer(net, batch, delta, ()), both, rtol=1e-12)
    reference = trades.reference(net, batch)
    found = trades.inner(net, batch, delta, reference)
    assert torch.allclose(found, kl_divergence(logits, moved), rtol=1e-12)


def test_gradalign_aligns_the_gradients_of_the_mixed_loss() -> None:
    net, batch = tiny_net(), mixed_batch()
    delta, eta = (
        0.1 * torch.randn(batch.images.shape, generator=generator(k), dtype=torch.float64)
        for k in range(2)
    )
    point = (batch.images + eta).requires_grad_(True)
    logits = net(point)
    targets = targets_of(batch, logits.shape[1])
    there = soft_cross_entropy(logits, targets, reduction="sum")
    (grad,) = torch.autograd.grad(there, point)
    plain = soft_cross_entropy(net(batch.images + delta), targets, reduction="none")
    found = Aligned(lam=3.0).outer(net, batch, delta, (grad, eta))
    assert torch.allclose(found, plain, rtol=1e-9)  # the gradients have the same direction


@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1), Trades()])
def test_gradients_of_samples_at_once_are_those_of_samples_alone(loss: AbstractLoss) -> None:
    net, batch = tiny_net(), mixed_batch()
    delta = torch.zeros_like(batch.images)
    wanted = one_by_one(net, loss, batch, delta)
    for chunk in (1, 3):
        oracle = Oracle(net, loss, batch, Meter(), attack_bn="eval")
        found = torch.cat(
            [
                torch.cat([grad.reshape(len(grad), -1) for grad in part], dim=1)
                for part in oracle.sample_grads(delta, "eval", chunk)
            ]
        )
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_recorded_steps_have_the_labels_of_their_batch() -> None:
    algorithm = as_run(None, ["algorithm.steps=1", "threat.eps=0.1"]).algorithm_with({})
    weights = []
    for recorded in (False, True):
        state = state_of(tiny_net(), algorithm)
        replayed = ReplayedSteps(state, RecordedOperations())
        steps = replayed if recorded else eager_steps(state)
        for seed in range(8):
            steps(algorithm, mixed_batch(seed=seed), {})
            state.step += 1
        assert not recorded or replayed.replayed > 0
        weights.append(nn.utils.parameters_to_vector(state.model.parameters()))
    assert torch.equal(*weights)


# --- training ---------------------------------------------------------------------------------


def run_of(algorithm: Any, **changes: Any) -> RunConfig:
    values = {
        "data": {"name": "digits", "train_size": 100, "validation": 60, "cutmix": 0.5},
        "algorithm": algorithm,
        "batch_size": 16,
        "epochs": 2,
        "model": "small_cnn_nobn",
        "evaluation": {"steps": 1},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


GOES: dict[str, Any] = {
    "natural": "natural",
    "fgsm_rs": "fgsm_rs",
    "n_fgsm": "n_fgsm",
    "pgd": {"name": "pgd", "steps": 2},
    "trades": {"name": "trades", "steps": 2},
    "dynamic": {"name": "dynamic", "steps": 2},
    "official": {"name": "dynamic", "steps": 2, "preset": "official"},
    "free": {"name": "free", "m": 2},
    "yopo": {"name": "yopo", "m": 2, "n": 1},
    "gradalign": "gradalign",
    "l2l": {"name": "l2l", "steps": 2, "hidden": 3},
    "si_hg": {"name": "si_hg", "store": "none"},
}
REFUSED: dict[str, Any] = {
    "mart": "its loss is not defined for two labels",
    "fat": "its attack stops where an image is misclassified, and a mixed image has two labels",
    "atta": "it remembers a perturbation of every image, and a mixed image is another one each time",
    "ssds": "it remembers a perturbation of every image, and a mixed image is another one each time",
    "si_hg": "it remembers a perturbation of every image, and a mixed image is another one each time",
}


@pytest.mark.parametrize("name", GOES)
def test_training_goes_on_within_an_epoch_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain.training.trainer._CHECK_EVERY", {"cpu": 3})
    run, context, file = run_of(GOES[name]), DistributedContext(), tmp_path / "last.pt"
    within = WithinEpoch(0.0, lambda state: save(state, run, file, context))
    (*_, (_, whole)) = fit(run, context, within=within)
    (*_, (_, resumed)) = fit(run, context, load(file))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", REFUSED)
def test_algorithms_for_which_a_mixed_image_means_nothing_are_refused(name: str) -> None:
    expected = f"data.cutmix: mixed images do not go with {name}: {REFUSED[name]}; expected null"
    with pytest.raises(RequestError) as found:
        as_run(None, ["data.cutmix=0.5", f"algorithm={name}"])
    assert str(found.value).startswith(expected)


def test_parts_of_a_combination_are_refused_as_well() -> None:
    def complaint(*words: str, cutmix: float = 1.0) -> str:
        with pytest.raises(RequestError) as found:
            as_run(None, [f"data.cutmix={cutmix}", *words])
        return str(found.value)

    assert "it remembers" in complaint("algorithm=pgd", "algorithm.start=remembered")
    assert "its table holds" in complaint("algorithm=si_hg", "algorithm.mode=T")
    assert "expected less than or equal to 1, found 1.5" in complaint(cutmix=1.5)
    assert Mart().why_not_mixed() is not None and Trades().why_not_mixed() is None


def test_without_it_the_signature_is_that_of_earlier_versions() -> None:
    assert "cutmix" not in as_run(None).computed()["data"]
    assert as_run(None, ["data.cutmix=0.5"]).signature() != as_run(None).signature()
