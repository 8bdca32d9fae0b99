"""Images that need more memory than there is: how fast they are decoded, and how much memory that takes.

The data set has the shape of ImageNet: JPEG files of 224 x 224 pixels in Parquet, 1,000 classes. One epoch of
batches is read, cropped and mirrored, without training, in turn by

    a plain DataLoader: a Dataset of one image per item, decoded by Pillow, in shuffled batches
    raytrain without Ray: processes that decode whole batches
    raytrain on Ray: Ray Data's tasks
    raytrain in memory: all pixels, for comparison

and the memory that is the process's own (no pages of the mapped file) is read after every batch.

    python benchmarks/decoding.py --images 4000 --out benchmarks/decoding.md
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raytrain.core.distributed_context import DistributedContext, ReadAhead
from raytrain.data.loader import iter_train, open_splits
from raytrain.data.spec import DataSpec
from raytrain.tracking.provenance import hardware

SIZE, CLASSES, BATCH, PAD = 224, 1000, 128, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--images", type=int, default=4000, help="at least 2,000: two of each class"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAYTRAIN_CACHE"] = f"{folder}/cache"
        file = Path(folder, "train.parquet")
        per_image = write_images(file, options.images)
        began = time.perf_counter()
        ours(file, False)
        prepared = options.images / (time.perf_counter() - began)
        rates, memory = measure(file, options.rounds)
    text = table(rates, memory) + (
        f"\n{options.images:,} images of {SIZE}x{SIZE}, {per_image / 1e3:.0f} kB each as JPEG, "
        f"{3 * SIZE * SIZE / 1e3:.0f} kB as pixels; batches of {BATCH}, {options.rounds} rounds, median and "
        f"range. Memory is that of the training process beside the images in memory, which take "
        f"{options.images * 3 * SIZE * SIZE / 1e9:.2f} GB once per machine. "
        f"Checking and copying the files, once per machine: {prepared:,.0f} images/s. "
        f"{hardware()}, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__.partition('+')[0]}.\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def write_images(file: Path, count: int) -> float:
    """Write noise that is as smooth as photographs; return the mean size of a file."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))
        stream = io.BytesIO()
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=80)
        files.append(stream.getvalue())
    labels = np.arange(count) % CLASSES
    pq.write_table(pa.table({"image": files, "label": labels}), file, row_group_size=500)
    return sum(map(len, files)) / count


class PlainImages(Dataset[tuple[Tensor, int]]):
    """What one would write without raytrain: the files in memory, an image per item."""

    def __init__(self, file: Path) -> None:
        columns = pq.read_table(file)
        self._files = columns["image"].to_pylist()
        self._labels = columns["label"].to_pylist()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.asarray(Image.open(io.BytesIO(self._files[index])))
        padded = np.pad(pixels, ((PAD, PAD), (PAD, PAD), (0, 0)))
        top, left = np.random.randint(0, 2 * PAD + 1, 2)
        cut = padded[top : top + SIZE, left : left + SIZE]
        if np.random.rand() < 0.5:
            cut = cut[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(cut.transpose(2, 0, 1))), self._labels[index]


def plain(file: Path) -> Callable[[int], Iterator[Tensor]]:
    images = PlainImages(file)

    def batches(epoch: int) -> Iterator[Tensor]:
        del epoch
        processes = torch.get_num_threads()
        for pixels, _ in DataLoader(
            images, BATCH, shuffle=True, num_workers=processes, drop_last=True
        ):
            yield pixels.float() / 255

    return batches


def ours(
    file: Path, in_memory: bool, ahead: ReadAhead | None = None
) -> Callable[[int], Iterator[Tensor]]:
    spec = DataSpec(name=str(file), in_memory=in_memory, validation=CLASSES)
    part = open_splits(spec, DistributedContext(read_ahead=ahead)).train

    def batches(epoch: int) -> Iterator[Tensor]:
        for batch in iter_train(part, BATCH, 0, epoch, PAD, True):
            yield batch.images

    return batches


def measure(file: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images per second in every round, and the most memory in GB, by name."""
    from raytrain.config.request import as_run
    from raytrain.distributed.ray_data import on_cluster
    from raytrain.distributed.ray_session import session

    on_ray = partial(on_cluster, lambda cpus: cpus)
    with session(as_run(None)):
        ways = {
            "plain DataLoader": plain(file),
            "raytrain without Ray": ours(file, False),
            "raytrain on Ray": ours(file, False, on_ray),
            "raytrain in memory": ours(file, True),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        memory = dict.fromkeys(ways, 0.0)
        for epoch in range(rounds + 1):  # the first one is not counted: processes of Ray start
            for name, batches in ways.items():
                before, began, count = own_memory(), time.perf_counter(), 0
                for images in batches(epoch):
                    count += len(images)
                    memory[name] = max(memory[name], own_memory() - before)
                if epoch:
                    rates[name].append(count / (time.perf_counter() - began))
    return rates, memory


def own_memory() -> float:
    """GB of this process without pages of files."""
    status = Path("/proc/self/status").read_text()
    return sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)) / 1e6


def table(rates: dict[str, list[float]], memory: dict[str, float]) -> str:
    lines = [
        "| | images/s | of a plain DataLoader | memory of the process, GB |",
        "|---|---|---|---|",
    ]
    first = next(iter(rates.values()))
    for name, found in rates.items():
        ratios = [one / other for one, other in zip(found, first, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) "
            f"| {statistics.median(ratios):.2f} | {memory[name]:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
