"""Strong and weak scaling of a training, the collective's share of a step, and what 8 to 512 GPUs would do.

    python benchmarks/scaling.py              # all of it; a quarter of an hour on two cores
    python benchmarks/scaling.py --measure    # measure and print only: needs neither Ray, MLflow nor Optuna
    python benchmarks/scaling.py --again      # the same measurements, model and plan anew

Measured are steps of raytrain's trainer in 1, 2 and 4 processes that share every batch (strong) or have a
batch each (weak): gloo on CPUs with one thread each, NCCL where there is a GPU for each. Steps with the
all-reduce of the gradients and steps without it alternate in the same processes; every round starts processes
anew, and only times of the same round are divided by one another. The model of more GPUs is in
scaling_model.py, with its assumptions; the capacity plan in scaling_plan.py. Writes scaling.md,
scaling.parquet and scaling.png beside this file, and the plan into cluster/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling_model import (
    BETWEEN,
    FE,
    LEAST,
    NETWORKS,
    NVLINK,
    PEAK,
    PER_NODE,
    STRONG,
    UTILISATION,
    WEAK,
    Link,
    all_reduce,
    passes,
    ring,
    share,
    size_of,
    speed_up,
)
from torch.multiprocessing.spawn import spawn

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext, keep_freed_memory
from raytrain.training.acceleration import set_up_device, steps_in
from raytrain.training.progress import StepProgress
from raytrain.training.setup import splits_of, start
from raytrain.training.trainer import train_epoch

HERE = Path(__file__).parent
WORLDS = (1, 2, 4)
PAIRS = 4  # of steps in a round, beside a first one that is left out
SMALL, LARGE = 1024, 2**24  # numbers in the collectives that give latency and bandwidth
GPUS = (8, 16, 32, 64, 128, 256, 512)
Row = dict[str, Any]


class Enough(Exception):
    """Steps have been measured."""


def run_of(network: str, algorithm: str, batch: int) -> RunConfig:
    values = {
        "data": {"name": "digits"},
        "model": network,
        "algorithm": {"name": algorithm, **({"steps": 10} if algorithm == "pgd" else {})},
        "batch_size": batch,
        "epochs": 100,
        "optimizer": {"lr": 0.001, "schedule": "constant"},
    }
    return RunConfig.model_validate(values)


def work(rank: int, world: int, network: str, batch: int, folder: str) -> None:
    """What each process does; the first writes what it found."""
    on_gpus = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        keep_freed_memory()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world > 1:
        meeting = f"file://{folder}/meeting"
        kind = "nccl" if on_gpus else "gloo"
        dist.init_process_group(kind, init_method=meeting, rank=rank, world_size=world)
    context = DistributedContext(device, rank, world)
    found = collectives(context)
    for kind, images in (("strong", 2 * batch), ("weak", world * batch)):
        for algorithm in FE:
            found += steps_of(run_of(network, algorithm, images), context, kind)
    if context.leads:
        Path(folder, "found.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def collectives(context: DistributedContext) -> list[Row]:
    """Seconds of all-reduces of few and of many numbers: medians."""
    found: list[Row] = []
    for count in (SMALL, LARGE) if context.world > 1 else ():
        values = torch.zeros(count, device=context.device)
        laps = []
        for _ in range(12):
            _synchronise(context)
            began = time.perf_counter()
            dist.all_reduce(values)
            _synchronise(context)
            laps.append(time.perf_counter() - began)
        seconds = statistics.median(laps[2:])
        found.append({"kind": "all-reduce", "numbers": count, "seconds": seconds})
    return found


def steps_of(run: RunConfig, context: DistributedContext, kind: str) -> list[Row]:
    """Pairs of steps with the all-reduce and without it, which begin together on all processes.

    A step is over when the slowest process is done with it: waiting for that one is no collective.
    """
    splits = splits_of(run, context)
    set_up_device(run, context.device)
    state = start(run, splits, context)
    watch = Watch(state.wrapper, context)
    with suppress(Enough):
        train_epoch(run, splits, state, steps_in("eager", state), watch)
    weights = sum(weight.numel() for weight in state.model.parameters())
    each = {
        "kind": kind,
        "algorithm": run.algorithm.name,
        "images": run.batch_size // context.world,
        "weights": weights,
    }
    return [{**each, "whole": whole, "bare": bare} for whole, bare in watch.pairs()]


class Watch:
    """Times steps, and turns the all-reduce of every second one off."""

    def __init__(self, wrapper: Any, context: DistributedContext) -> None:
        self._wrapper, self._context = wrapper, context
        self._laps: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, done: StepProgress) -> None:
        del done
        _synchronise(self._context)
        lap = torch.tensor(time.perf_counter() - self._began, device=self._context.device)
        if self._context.world > 1:
            dist.all_reduce(lap, dist.ReduceOp.MAX)
            self._wrapper.require_backward_grad_sync = len(self._laps) % 2 == 1
        self._laps.append(float(lap))
        if len(self._laps) == 2 * (1 + PAIRS):
            raise Enough
        self._context.barrier()
        self._began = time.perf_counter()

    def pairs(self) -> list[tuple[float, float]]:
        """Seconds with and without it; of one process, which has none, of both steps."""
        return list(zip(self._laps[2::2], self._laps[3::2], strict=True))


def _synchronise(context: DistributedContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def measured(network: str, batch: int, rounds: int) -> list[Row]:
    """Rows of all rounds and numbers of processes."""
    rows: list[Row] = []
    for number in range(rounds):
        for world in WORLDS:
            with tempfile.TemporaryDirectory() as folder:
                spawn(work, (world, network, batch, folder), nprocs=world)
                found = json.loads(Path(folder, "found.json").read_text())
            load = os.getloadavg()[0]
            more = {"round": number, "world": world, "load": load, "network": network}
            rows += [{**more, **row} for row in found]
            print(f"round {number + 1}, {world} processes, load {load:.1f}", flush=True)
    return rows


# ------------------------------------------------------------------ what was measured


def link_of(rows: list[Row], world: int) -> Link:
    """The link that explains the all-reduces of so many processes: medians over rounds."""
    small, large = (
        statistics.median(
            row["seconds"]
            for row in rows
            if row["kind"] == "all-reduce" and row["world"] == world and row["numbers"] == count
        )
        for count in (SMALL, LARGE)
    )
    hops = 2 * (world - 1)
    return Link(small / hops, hops / world * 4 * LARGE / (large - small))


def steps(rows: list[Row], which: str, **wanted: Any) -> dict[int, float]:
    """Median seconds of steps, by round: `whole`, or `bare` of the all-reduce."""
    found: dict[int, list[float]] = {}
    for row in chosen(rows, **wanted):
        found.setdefault(row["round"], []).append(row[which])
    return {number: statistics.median(each) for number, each in found.items()}


def chosen(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def spread(values: list[float], form: str) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def shares(rows: list[Row], **wanted: Any) -> list[float]:
    """The collective's share of a step, by pair."""
    return [1 - row["bare"] / row["whole"] for row in chosen(rows, **wanted)]


def predicted(rows: list[Row], **wanted: Any) -> float:
    """The share by the all-reduces that were measured alone, and steps without one."""
    world = wanted["world"]
    bare = statistics.median(row["bare"] for row in chosen(rows, **wanted))
    collective = ring(4 * weights_of(rows), world, link_of(rows, world))
    return collective / (collective + bare)


def agreement(rows: list[Row]) -> str:
    """The formula beside what was measured in two processes."""
    ratios = {}
    for algorithm in FE:
        wanted = [{"kind": k, "algorithm": algorithm, "world": 2} for k in ("strong", "weak")]
        ratios[algorithm] = [
            statistics.median(shares(rows, **one)) / predicted(rows, **one) for one in wanted
        ]
    said = "; ".join(
        f"{'PGD-10' if name == 'pgd' else name} {low:.1f} and {high:.1f} times (strong, weak)"
        for name, (low, high) in ratios.items()
    )
    return f"In two processes the collective's share was, of what the formula predicts: {said}."


def weights_of(rows: list[Row]) -> int:
    return next(int(row["weights"]) for row in rows if row.get("weights"))


def measured_tables(rows: list[Row]) -> list[str]:
    lines = [
        "| | step | processes | images each | ms | of one process's speed | collective | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in ("strong", "weak"):
        for algorithm in FE:
            of_kind = {"kind": kind, "algorithm": algorithm}
            one = steps(rows, "whole", world=1, **of_kind)
            for world in WORLDS:
                wanted = {**of_kind, "world": world}
                whole = steps(rows, "whole", **wanted)
                gains = [one[number] / seconds for number, seconds in whole.items()]
                share_of = " | "
                if world > 1:
                    found = spread(shares(rows, **wanted), ".0%")
                    share_of = f"{found} | {predicted(rows, **wanted):.0%}"
                cells = [
                    kind,
                    "PGD-10" if algorithm == "pgd" else algorithm,
                    f"{world}{_crowded(world)}",
                    f"{chosen(rows, **wanted)[0]['images']:.0f}",
                    f"{1e3 * statistics.median(whole.values()):.0f}",
                    spread(gains, ".2f"),
                    share_of,
                ]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| processes | latency of a hop, µs | bandwidth, MB/s |", "|---|---|---|"]
    for world in WORLDS[1:]:
        link = link_of(rows, world)
        lines.append(
            f"| {world}{_crowded(world)} | {1e6 * link.latency:.0f} | {link.bandwidth / 1e6:,.0f} |"
        )
    return lines


def _crowded(world: int) -> str:
    cores = len(os.sched_getaffinity(0))
    crowded = torch.cuda.device_count() < world and world > cores
    return f" on {cores} cores" if crowded else ""


# ------------------------------------------------------------------ the model, and the report


def model_table() -> list[str]:
    lines = [
        "| network | weights, M | GPUs | between nodes | all-reduce, ms | natural: collective | PGD-10: "
        f"collective | PGD-10: speed-up, {STRONG:,} images in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        size = size_of(network)
        for gpus in (8, 64, 512):
            for name, between in BETWEEN.items() if gpus > PER_NODE else (("", NVLINK),):
                natural, pgd = (share(size, algorithm, gpus, between) for algorithm in FE)
                lines.append(
                    f"| {network} | {size.weights / 1e6:.1f} | {gpus} | {name} | "
                    f"{1e3 * all_reduce(size.bytes, gpus, between):.2f} | {natural:.1%} | {pgd:.1%} | "
                    f"{speed_up(size, 'pgd', gpus, between):.0f} |"
                )
    return lines


def assumptions() -> str:
    links = {
        "NVLink, per GPU": NVLINK,
        **{f"{name}, per node": it for name, it in BETWEEN.items()},
    }
    said = "; ".join(
        f"{name}: {one.bandwidth / 1e9:.0f} GB/s, {1e6 * one.latency:.0f} µs per hop"
        for name, one in links.items()
    )
    step = 1e3 * passes(size_of("resnet18"), "pgd", WEAK)
    return (
        f"Assumed, not measured (`scaling_model.py`): GPUs of {PEAK / 1e12:.0f} TFLOP/s, of which passes "
        "reach "
        f"{UTILISATION:.0%}, no faster below {LEAST} images; {PER_NODE} in a node; {said}; float32 "
        "gradients; "
        f"nothing overlaps. {WEAK} images per GPU, of 32x32 pixels; a step of PGD-10 on resnet18 then takes "
        f"{step:.0f} ms. A step of PGD-10 has eleven gradients and one collective; since attack gradients "
        f"leave out those of the weights, it has {FE['pgd'] / FE['natural']:.1f} times the passes of a "
        "natural "
        "one, and the collective's share is smaller by up to that."
    )


def report(rows: list[Row], plan: list[str]) -> str:
    loads = [row["load"] for row in rows]
    rounds = len({row["round"] for row in rows})
    network, weights = rows[0]["network"], weights_of(rows)
    return "\n".join(
        [
            "# Scaling",
            "",
            "## Measured",
            "",
            *measured_tables(rows),
            "",
            f"{network} ({weights / 1e6:.1f} million weights) on the digits, {_machine()}. Medians, with "
            f"quartiles in brackets, of {rounds} rounds of {PAIRS} pairs of steps; `strong`: the same images "
            "shared, `weak`: as many for each; `collective`: the part of a step that is gone without the "
            "all-reduce, by pair; `predicted`: by the ring's formula with latency and bandwidth of "
            "all-reduces alone. More processes than cores share them: these rows say nothing of more "
            f"machines. The load of the machine was {min(loads):.1f} to {max(loads):.1f}, the processes' own "
            "included: on a machine with other work the speeds are too low, and single shares mean little.",
            "",
            agreement(rows),
            "",
            "## Modelled",
            "",
            *model_table(),
            "",
            assumptions(),
            "",
            "![Collective's share, measured and modelled](scaling.png)",
            "",
            "## Capacity",
            "",
            *plan,
            "",
        ]
    )


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, NCCL"
    return f"{len(os.sched_getaffinity(0))} cores, gloo, one thread per process"


def figure(rows: list[Row], file: Path) -> None:
    """What was measured, beside the model."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11.0, 4.3), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    colours = {"natural": "#d55e00", "pgd": "#0072b2"}
    names = {"natural": "natural", "pgd": "PGD-10"}
    for algorithm, colour in colours.items():
        wanted = {"kind": "weak", "algorithm": algorithm}
        found = {world: quartiles(shares(rows, world=world, **wanted)) for world in WORLDS[1:]}
        middles = [100 * middle for _, middle, _ in found.values()]
        low = [100 * (middle - low) for low, middle, _ in found.values()]
        high = [100 * (high - middle) for _, middle, high in found.values()]
        left.errorbar(
            list(found),
            middles,
            [low, high],
            color=colour,
            lw=2,
            capsize=4,
            label=names[algorithm],
        )
        expected = [100 * predicted(rows, world=world, **wanted) for world in found]
        left.plot(list(found), expected, "x", color=colour, ms=8, label="by the ring's formula")
        for network, width in ((NETWORKS[0], 2.2), (NETWORKS[-1], 1.0)):
            size = size_of(network)
            for name, style in zip(BETWEEN, ("-", "--"), strict=True):
                values = [100 * share(size, algorithm, gpus, BETWEEN[name]) for gpus in GPUS]
                label = f"{names[algorithm]}, {network}, {name}"
                middle.plot(GPUS, values, style, color=colour, lw=width, label=label)
                gains = [speed_up(size, algorithm, gpus, BETWEEN[name]) for gpus in GPUS]
                right.plot(GPUS, gains, style, color=colour, lw=width)
    left.set_title(f"measured: {rows[0]['network']}, weak")
    left.set_xticks(WORLDS[1:], [f"{world}{_crowded(world)}" for world in WORLDS[1:]])
    left.set_xlabel("processes")
    middle.set_title(f"modelled: {WEAK} images per GPU")
    right.set_title(f"modelled: {STRONG:,} images in all")
    right.plot(GPUS, GPUS, ":", color="#333333", lw=1)
    for axes in (left, middle):
        axes.set_ylabel("collective's share of a step, %")
        axes.set_ylim(bottom=0)
    right.set_ylabel("times as fast as one GPU")
    right.set_yscale("log", base=2)
    for axes in (middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.set_xlabel("GPUs")
    left.legend(frameon=False, fontsize=7)
    lines, labels = middle.get_legend_handles_labels()
    picture.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    left.set_xlim(1.5, 4.5)
    right.set_yticks([2**k for k in range(10)], [str(2**k) for k in range(10)])
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    picture.savefig(file, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=8, help="images of a process, weak scaling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="measure and print only")
    parser.add_argument("--again", action="store_true", help="the measurements of scaling.parquet")
    options = parser.parse_args()
    stored = HERE / "scaling.parquet"
    if not options.again:
        rows = measured(options.network, options.batch, options.rounds)
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(stored).to_pylist()
    if options.measure:
        print("\n".join(measured_tables(rows)))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq
    from scaling_plan import into_readme, plan_table

    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), stored)
    plan = plan_table()
    (HERE / "scaling.md").write_text(report(rows, plan))
    figure(rows, HERE / "scaling.png")
    into_readme(plan)


if __name__ == "__main__":
    main()
