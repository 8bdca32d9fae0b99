"""A share of every batch is additional images: which ones, for any number of workers."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.sample_store import SampleStore
from raytrain.core.types import Batch
from raytrain.data import prepared
from raytrain.data.loader import Splits, iter_train, open_splits
from raytrain.data.slots import Slots
from raytrain.data.spec import DataSpec, ExtraImages
from raytrain.tracking.data_sets import training_inputs
from raytrain.training.checkpoint import load, save
from raytrain.training.part_epoch import WithinEpoch
from raytrain.training.setup import preflight
from raytrain.training.trainer import fit

OWN, EXTRA, BATCH = 61, 45, 8  # images of training after a validation split of 9, additional ones
NAMES = ("cat", "dog", "owl")


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def _write(
    file: Path,
    seed: int,
    count: int,
    names: tuple[str, ...] | None = NAMES,
    channels: int = 3,
    size: int = 12,
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, size, size), np.uint8)
    labels = pa.array([k % 3 for k in range(count)])
    column = pa.array([_png(one) for one in images])
    if channels == 1:
        column = pa.array([one[0].tolist() for one in images])
    table = pa.table({"image": column, "label": labels})
    if names is not None:
        feature = {"_type": "ClassLabel", "names": list(names)}
        text = str({"info": {"features": {"label": feature}}}).replace("'", '"')
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, file)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training images, and additional ones whose class names are in another order."""
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "_WORTH_KEEPING", 0)
    _write(tmp_path / "train.parquet", 0, OWN + 9)
    _write(tmp_path / "generated.parquet", 1, EXTRA, NAMES[::-1])
    return tmp_path


def in_this_process(read: Callable[..., Tensor], requests: Sequence[Any]) -> Generator[Tensor]:
    yield from (read(*request) for request in requests)


def spec_of(folder: Path, share: float = 0.625, **changes: Any) -> DataSpec:
    extra = ExtraImages(name=str(folder / "generated.parquet"), share=share)
    return DataSpec(
        **{"name": str(folder / "train.parquet"), "validation": 9, "extra": extra} | changes
    )


def opened(spec: DataSpec, rank: int = 0, world: int = 1, batch_size: int = BATCH) -> Splits:
    context = DistributedContext(rank=rank, world=world, read_ahead=in_this_process)
    return open_splits(spec, context, batch_size=batch_size)


def epoch_of(splits: Splits, epoch: int = 0, first: int = 0, pad: int = 2) -> list[Batch]:
    args = (BATCH, 0, epoch, pad, pad > 0, first, splits.extra)
    return list(iter_train(splits.train, *args))


def by_index(batches: list[Batch]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Image, label and noise of every index in these batches of one step."""
    found = {}
    for batch in batches:
        noise = batch.rng.uniform("start", 3)
        for row, index in enumerate(batch.index.tolist()):
            assert index not in found
            found[index] = (batch.images[row], batch.labels[row], noise[row])
    return found


# --- slots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [Slots(0, 3, 8), Slots(3, 5, 8), Slots(0, 8, 8), Slots(6, 2, 8)])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_images_are_shared_out_and_found_again_by_their_index(slots: Slots, world: int) -> None:
    count, index = 29, slots.index(torch.arange(29))
    inside = range(slots.first, slots.first + slots.count)
    assert len(set(index.tolist())) == count and set((index % 8).tolist()) <= set(inside)
    assert int(index.max()) < slots.num_indices(count)
    shares = []
    for rank in range(world):
        context = DistributedContext(rank=rank, world=world)
        owned = slots.owned(count, context)
        mine = slots.index(owned)
        assert torch.equal(mine % world, torch.full_like(mine, rank))
        assert torch.equal(slots.rows(mine, context), torch.arange(len(mine)))
        own_slots = torch.arange(rank, 8, world)[slots.in_batch(context)]
        assert own_slots.tolist() == [slot for slot in inside if slot % world == rank]
        shares.append(owned)
    assert sorted(torch.cat(shares).tolist()) == list(range(count))


def test_all_slots_are_the_plain_batches() -> None:
    slots, context = Slots(0, 8, 8), DistributedContext(rank=1, world=2)
    numbers = torch.arange(103)
    assert torch.equal(slots.index(numbers), numbers) and slots.num_indices(103) == 103
    assert torch.equal(slots.owned(103, context), numbers[1::2])
    assert torch.equal(slots.rows(numbers[1::2], context), numbers[1::2] // 2)


@pytest.mark.parametrize("count", [3, 4, 17, 40])
def test_a_slot_shows_all_of_its_images_before_it_shows_one_again(count: int) -> None:
    slots = Slots(2, 3, 8)
    steps = 4 * -(-count // 3) + 1
    whole = slots.order(count, 5, 0, steps)
    assert torch.equal(whole % 8, torch.arange(2, 5).expand(steps, 3))
    for slot in range(3):
        own = set(slots.index(torch.arange(slot, count, 3)).tolist())
        shown = whole[:, slot].tolist()
        for begin in range(0, steps - len(own) + 1, len(own)):
            assert set(shown[begin : begin + len(own)]) == own
    parts = [slots.order(count, 5, first, 1) for first in range(steps)]
    assert torch.equal(torch.cat(parts), whole)  # a function of the step alone
    if count > 4:
        assert not torch.equal(slots.order(count, 6, 0, steps), whole)


# --- batches ----------------------------------------------------------------------------------


def test_every_batch_has_its_share_and_an_epoch_the_length_of_the_training_images(
    folder: Path,
) -> None:
    splits = opened(spec_of(folder))
    assert splits.train.num_images == OWN and splits.extra is not None
    seen: Counter[int] = Counter()
    for epoch in range(4):
        batches = epoch_of(splits, epoch)
        assert len(batches) == OWN // BATCH
        for batch in batches:
            assert ((batch.index % BATCH) < 3).sum() == 3 and len(batch) == BATCH
            seen.update(batch.index.tolist())
    own = [count for index, count in seen.items() if index % BATCH < 3]
    extra = [count for index, count in seen.items() if index % BATCH >= 3]
    # 28 steps: 84 visits of 61 images in rounds of 21 or 20, 140 visits of 45 in rounds of 9
    assert len(own) == OWN and set(own) <= {1, 2}
    assert len(extra) == EXTRA and set(extra) <= {3, 4}


def test_images_and_labels_are_those_of_the_files(folder: Path) -> None:
    splits = opened(spec_of(folder))
    plain = opened(spec_of(folder, extra=None))
    assert plain.extra is None and splits.extra is not None
    table = pq.read_table(folder / "generated.parquet").to_pydict()
    for batch in epoch_of(splits, pad=0):
        for row, index in enumerate(batch.index.tolist()):
            rounds, slot = divmod(index, BATCH)
            image = (batch.images[row] * 255).round().to(torch.uint8)
            if slot < 3:
                number = torch.tensor([3 * rounds + slot])
                assert torch.equal(image, plain.train.read(number)[0])
                assert batch.labels[row] == plain.train.labels[number]
            else:
                number = 5 * rounds + slot - 3
                stored = np.array(Image.open(io.BytesIO(table["image"][number])))
                assert np.array_equal(image.permute(1, 2, 0).numpy(), stored)
                assert batch.labels[row] == 2 - table["label"][number]  # classes by name


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_is_the_same_whatever_the_number_of_workers(
    folder: Path, world: int, in_memory: bool
) -> None:
    alone = epoch_of(opened(spec_of(folder)), epoch=3)
    spec = spec_of(folder, in_memory=in_memory)
    shared = [epoch_of(opened(spec, rank, world), epoch=3) for rank in range(world)]
    for step, whole in enumerate(alone):
        wanted, found = by_index([whole]), by_index([batches[step] for batches in shared])
        assert wanted.keys() == found.keys() and len(found) == BATCH
        for index, values in wanted.items():
            assert all(map(torch.equal, values, found[index]))
    for rank, batches in enumerate(shared):
        assert all((batch.index % world == rank).all() for batch in batches)


@pytest.mark.parametrize("read_ahead", [None, in_this_process])
def test_batches_decoded_ahead_are_those_of_images_in_memory(
    folder: Path, read_ahead: Any
) -> None:
    near, far = (
        open_splits(
            spec_of(folder, in_memory=in_memory),
            DistributedContext(read_ahead=read_ahead),
            batch_size=BATCH,
        )
        for in_memory in (True, False)
    )
    assert far.train.reader is not None and far.extra is not None and far.extra.reader is not None
    for one, other in zip(epoch_of(near), epoch_of(far), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index)


def test_an_epoch_goes_on_where_it_was_left(folder: Path) -> None:
    splits = opened(spec_of(folder))
    for one, other in zip(epoch_of(splits)[3:], epoch_of(splits, first=3), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        assert torch.equal(one.rng.uniform("a"), other.rng.uniform("a"))


def test_state_of_every_image_is_kept_apart(folder: Path) -> None:
    splits = opened(spec_of(folder), 1, 2)
    store = SampleStore(splits.num_indices, (), splits.train.context)
    for epoch in range(4):
        for batch in epoch_of(splits, epoch):
            store.write(batch, batch.index.float())
    for batch in epoch_of(splits, 5):
        assert torch.equal(store.read(batch), batch.index.float())


def test_validation_images_statistics_and_plain_batches_are_those_without_additional_ones(
    folder: Path,
) -> None:
    mixed, plain = opened(spec_of(folder)), opened(spec_of(folder, extra=None))
    assert mixed.source == plain.source
    assert torch.equal(mixed.valid.whole, plain.valid.whole)
    assert torch.equal(mixed.train.whole, plain.train.whole)
    assert (plain.num_indices, mixed.num_indices) == (OWN, 20 * BATCH + 1)  # 61 = 20 * 3 + 1
    assert sum(one.bytes_in_memory for one in mixed.shards) == (OWN + 9 + EXTRA) * (432 + 8)


# --- training ---------------------------------------------------------------------------------


def run_of(folder: Path, algorithm: Any = "pgd", **changes: Any) -> RunConfig:
    values = {
        "data": spec_of(folder, pad=2, flip=True).model_dump(),
        "algorithm": algorithm,
        "batch_size": BATCH,
        "epochs": 2,
        "model": "small_cnn_nobn",
        "evaluation": {"steps": 1},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.mark.parametrize("algorithm", ["atta", "ssds", "free"])
def test_training_goes_on_within_an_epoch_with_the_same_bits(
    folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrain.training.trainer._CHECK_EVERY", {"cpu": 2})
    run, context = run_of(folder, algorithm), DistributedContext()
    saved: list[Path] = []

    def keep(state: Any) -> None:
        saved.append(folder / f"{len(saved)}.pt")
        save(state, run, saved[-1], context)

    (*_, (_, whole)) = fit(run, context, within=WithinEpoch(0.0, keep))
    assert len(saved) == 6
    for file in (saved[1], saved[4]):
        (*_, (_, resumed)) = fit(run, context, load(file))
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_runs_are_recorded_with_the_additional_images(folder: Path) -> None:
    inputs = training_inputs(spec_of(folder))
    assert [one["context"] for one in inputs] == ["training", "validation", "additional"]
    assert inputs[2]["name"] == "generated" and f'"num_rows": {EXTRA}' in inputs[2]["profile"]
    assert inputs[2]["source"].endswith('generated.parquet"}')
    assert list(inputs[:2]) == list(training_inputs(spec_of(folder, extra=None)))


def test_without_additional_images_the_signature_is_that_of_earlier_versions() -> None:
    run = as_run(None)
    assert "extra" not in run.computed()["data"]
    spec = run.data.model_copy(update={"extra": ExtraImages(name="a.parquet")})
    assert run.model_copy(update={"data": spec}).signature() != run.signature()


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, expected in (("a.parquet", str(tmp_path / "a.parquet")), ("s3://b/a", "s3://b/a")):
        located = DataSpec(extra=ExtraImages(name=name)).located().extra
        assert located is not None and located.name == expected


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.extra.share=0.003"], "data.extra.share: 0.003 of a batch_size of 128 is 0 images"),
        (["data.extra.share=0.998"], "data.extra.share: 0.998 of a batch_size of 128 is 128 im"),
        (["data.extra.share=1"], "data.extra.share: expected less than 1, found 1"),
        (["batch_size=1"], r"data.extra.share: 0.7 of a batch_size of 1 is 1 images; expected 1"),
        (
            ["algorithm=si_hg", "algorithm.mode=T"],
            "data.extra: additional images do not go with si_hg: its table is a mean",
        ),
    ],
)
def test_a_request_that_makes_no_mixed_batches_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(RequestError, match=rf"^{sentence}"):
        as_run(None, ["data.extra=a.parquet", *words])


def test_files_that_do_not_fit_the_training_images_are_refused(folder: Path) -> None:
    def sentence(**changes: Any) -> str:
        with pytest.raises(RequestError) as found:
            preflight(run_of(folder, **changes))
        return str(found.value)

    def extra_at(name: str) -> str:
        spec = spec_of(folder).model_dump()
        spec["extra"]["name"] = str(folder / name)
        return sentence(data=spec)

    assert extra_at("nothing.parquet").startswith("data.extra.name: expected a Parquet file or")
    assert extra_at("generated").startswith("data.extra.name: expected a path ending in .parquet")
    _write(folder / "few.parquet", 2, 4)
    expected = "data.extra.name: expected 5 images or more, those of one batch, found 4"
    assert extra_at("few.parquet") == expected
    _write(folder / "named.parquet", 2, 9, ("cat", "dog", "emu"))
    assert "found no 'owl' and an unknown 'emu'" in extra_at("named.parquet")
    (folder / "tests").mkdir()
    _write(folder / "tests" / "test.parquet", 2, 9)
    assert extra_at("tests").startswith("data.extra.name: expected files of training images in")


def test_additional_images_of_a_data_set_by_name_must_fit_it(folder: Path) -> None:
    def extra(**changes: Any) -> list[int]:
        _write(folder / "more.parquet", 3, 12, **changes)
        data = DataSpec(extra=ExtraImages(name=str(folder / "more.parquet")))
        splits = opened(data)
        assert splits.extra is not None
        return splits.extra.labels.tolist()

    with pytest.raises(RequestError, match="expected grey images as in the training images"):
        extra(names=None, size=8)
    with pytest.raises(RequestError, match="expected 8x8 pixels as in the training images"):
        extra(names=None, channels=1)
    with pytest.raises(RequestError, match="the 10 class names of the training images"):
        extra(channels=1, size=8)
    assert extra(names=None, channels=1, size=8) == 4 * [0, 1, 2]
