"""How long a training step takes, beside the passes of the network that it cannot do without.

For every algorithm: raytrain's step in each mode of execution, its floor (the same numbers of forward and
backward passes of the bare network, and the optimiser's step, with nothing else), and for PGD the loop as
papers write it (`.backward()` in every inner step, images in PyTorch's default memory format). All ways of
a row run in turn, in one process. Before a time is printed, the step's losses are compared with those of
plain execution. A second table has PGD alone, and that of torchattacks and robustness where they can be
imported; before its times are printed, the perturbations are compared in float64.

    python benchmarks/speed.py                         # what suits the device
    python benchmarks/speed.py --network resnet18 --batch 16 --algorithms pgd --modes eager compile

Needs torch, numpy, pydantic, jaxtyping, typing-inspection and pyautoattack only. On a CPU times are
processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speed_attacks import Attack, Pgd
from torch import Tensor, nn

from raytrain.algorithms import RECIPES, AbstractAlgorithm
from raytrain.config.performance import Mode
from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.distributed_context import DistributedContext, keep_freed_memory
from raytrain.core.git import git
from raytrain.core.network import FrozenNetwork, Precision, autocast
from raytrain.core.optimizer import Sgd
from raytrain.core.threat_models import Linf
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, BatchRandom
from raytrain.models import ModelSpec
from raytrain.outer import OUTERS
from raytrain.training.acceleration import steps_in

EPS, STEPS, STEP_SIZE = 8 / 255, 10, 2 / 255
GPU = ("pgd", "trades", "mart", "free", "yopo", "fgsm_rs", "si_hg", "ssds", "l2l", "dynamic")
JOINT = ("free",)  # whose weight gradients come with input gradients from the same pass
CPU = ("pgd", "trades", "fgsm_rs", "free", "si_hg", "pgd+awp", "pgd+engm")


@dataclass(frozen=True)
class Case:
    """A network on batches of one size."""

    network: str
    batch: int
    precision: Precision
    device: torch.device
    steps: int = STEPS

    def model(self, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
        torch.manual_seed(0)
        spec = ModelSpec(name=self.network)
        model = spec.build(3, 32, 10, (0.5,) * 3, (0.25,) * 3).to(self.device)
        return model.to(memory_format=memory_format)

    def batch_of(
        self, seed: int, memory_format: torch.memory_format = torch.channels_last
    ) -> Batch:
        """Random images and labels."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(self.batch, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        rng = BatchRandom(seed, self.batch, slice(None), self.device)
        return Batch(
            images.to(self.device).contiguous(memory_format=memory_format),
            labels.to(self.device),
            torch.arange(self.batch, device=self.device),
            rng,
        )


def algorithm_of(name: str, steps: int) -> AbstractAlgorithm:
    """`pgd`, or with an outer update `pgd+awp`; inner steps as given where it has such a field."""
    recipe, _, outer = name.partition("+")
    fields: dict[str, Any] = (
        {"steps": steps} if recipe in ("pgd", "trades", "mart", "l2l", "dynamic") else {}
    )
    update = {"estimator": "input"} if outer == "engm" else {}
    return (
        RECIPES[recipe]
        .model_validate(fields)
        .build(Linf(eps=EPS), OUTERS[outer or "sgd"].model_validate(update))
    )


def state_of(case: Case, algorithm: AbstractAlgorithm) -> TrainState:
    model, context = case.model(), DistributedContext(case.device)
    state = TrainState(
        model=model,
        wrapper=model,
        optimizer=Sgd(lr=0.01).build(model),
        precision=case.precision,
        context=context,
    )
    setup = TrainingSetup(context, model, case.batch, (3, 32, 32), case.batch, torch.float32, 0)
    state.parts = algorithm.memory(setup)
    model.train()
    return state


class RaytrainStep:
    """A training step of raytrain in a mode of execution."""

    def __init__(self, case: Case, name: str, mode: Mode) -> None:
        self._algorithm = algorithm_of(name, case.steps)
        self._state = state_of(case, self._algorithm)
        self._steps = steps_in(mode, self._state)
        self._batches = [case.batch_of(seed) for seed in range(2)]
        self.losses: list[float] = []

    def __call__(self) -> None:
        batch = self._batches[self._state.step % 2]
        result = self._steps(self._algorithm, batch, {})
        self._state.step += 1
        if len(self.losses) < 6:
            self.losses.append(float(result.losses.mean()))

    @property
    def passes(self) -> dict[str, float]:
        """Passes of a step, each of the whole batch."""
        images = self._state.step * len(self._batches[0])
        return {name: count / images for name, count in asdict(self._state.meter).items()}


class Floor:
    """The passes of a step on the bare network: forward and input gradient, forward and all gradients."""

    def __init__(self, case: Case, name: str, passes: dict[str, float], mode: Mode) -> None:
        self._case, self._model = case, case.model().train()
        self._joint = name in JOINT
        compiled = torch.compile if mode == "compile" else lambda module: module
        self._frozen = FrozenNetwork.of(self._model, compiled)
        self._frozen.module.eval()
        self._trained = compiled(self._model)
        self._optimizer = Sgd(lr=0.01).build(self._model)
        self._batch = case.batch_of(0)
        self._inner = round(passes["input_backwards"])
        self._full = round(passes["full_backwards"])
        self._only = round(passes["forwards"]) - self._inner - self._full
        self._graph: Any = None
        if mode != "eager" and case.device.type == "cuda":
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                self._step()

    def __call__(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        images, labels = self._batch.images, self._batch.labels
        precise = autocast(self._case.device, self._case.precision)
        for _ in range(self._inner):
            point = images.detach().requires_grad_(True)
            with precise:
                logits = self._frozen.predict(point)
            torch.autograd.grad(F.cross_entropy(logits.float(), labels, reduction="sum"), point)
        for _ in range(max(0, self._only)):
            with torch.no_grad(), precise:
                self._frozen.predict(images)
        for _ in range(self._full):
            self._optimizer.zero_grad(set_to_none=True)
            with precise:
                logits = self._trained(images.detach().requires_grad_(self._joint))
            F.cross_entropy(logits.float(), labels).backward()
            self._optimizer.step()


class PlainLoop:
    """PGD training as papers write it: float32, default memory format, weight gradients in every step."""

    def __init__(self, case: Case) -> None:
        self._steps = case.steps
        self._model = case.model(torch.contiguous_format)
        self._batch = case.batch_of(0, torch.contiguous_format)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )

    def __call__(self) -> None:
        model, images, labels = self._model, self._batch.images, self._batch.labels
        model.eval()
        delta = torch.empty_like(images).uniform_(-EPS, EPS)
        for _ in range(self._steps):
            delta.requires_grad_(True)
            F.cross_entropy(model((images + delta).clamp(0, 1)), labels).backward()
            assert delta.grad is not None
            delta = (delta + STEP_SIZE * delta.grad.sign()).clamp(-EPS, EPS).detach()
        model.train()
        self._optimizer.zero_grad()
        F.cross_entropy(model((images + delta).clamp(0, 1)), labels).backward()
        self._optimizer.step()


def seconds(device: torch.device, step: Callable[[], None]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    step()
    return time.process_time() - began


def row(case: Case, name: str, modes: list[Mode], repeats: int) -> list[str]:
    """Markdown rows of one algorithm; raises if a mode computes something else."""
    reference = RaytrainStep(case, name, "eager")
    ways: dict[str, Callable[[], None]] = {"raytrain, eager": reference}
    ways |= {
        f"raytrain, {mode}": RaytrainStep(case, name, mode) for mode in modes if mode != "eager"
    }
    for way in ways.values():
        for _ in range(6):  # the fourth step is the first that a graph replays
            way()
    for label, way in ways.items():
        assert isinstance(way, RaytrainStep)
        check(f"{name}: {label}", way.losses, reference.losses, case.precision)
    passes = reference.passes
    ways |= {f"floor, {mode}": Floor(case, name, passes, mode) for mode in modes}
    if name == "pgd":
        ways["plain loop, fp32"] = PlainLoop(case)
    median = medians(ways, case.device, repeats)
    fe = (
        passes["forwards"]
        + passes["input_backwards"]
        + 2 * passes["full_backwards"]
        + passes["stem"]
    )
    rows = []
    for label, value in median.items():
        mode = label.rpartition(" ")[2]
        floor = median.get(f"floor, {mode}") if label.startswith("raytrain") else None
        plain = median.get("plain loop, fp32") if label.startswith("raytrain") else None
        rows.append(
            f"| {case.network} | {case.batch} | {case.precision} | {name} | {fe:.1f} | {label} | "
            f"{1e3 * value:.1f} | {'' if floor is None else f'{value / floor:.2f}'} | "
            f"{'' if plain is None else f'{plain / value:.2f}'} |"
        )
    return rows


def attack_rows(case: Case, repeats: int) -> list[str]:
    """Markdown rows of PGD alone; raises if one finds another perturbation than the first.

    Images and weights are in PyTorch's default memory format; raytrain's also as its runs have them.
    """
    pgd = Pgd(EPS, STEP_SIZE, case.steps)
    makers = {"raytrain": pgd.of_raytrain, **pgd.of_others()}
    formats = dict.fromkeys(makers, torch.contiguous_format)
    makers["raytrain, channels last"] = pgd.of_raytrain
    formats["raytrain, channels last"] = torch.channels_last

    def perturbation(label: str) -> Tensor:
        model, batch = case.model(formats[label]).double().eval(), case.batch_of(0, formats[label])
        images = batch.images.double()
        return makers[label](model, "fp64")(images, batch.labels) - images

    def way(label: str) -> Callable[[], None]:
        attack: Attack = makers[label](case.model(formats[label]).eval(), case.precision)
        batch = case.batch_of(0, formats[label])

        def run() -> None:
            attack(batch.images, batch.labels)

        return run

    ours = perturbation("raytrain")
    differences = {label: float((perturbation(label) - ours).abs().max()) for label in makers}
    for label, difference in differences.items():
        if difference > 1e-9:
            raise SystemExit(f"{label}: a perturbation that differs by {difference:.1g}")
    median = medians({label: way(label) for label in makers}, case.device, repeats)
    return [
        f"| {case.network} | {case.batch} | {case.precision} | {case.steps} | {label} | "
        f"{1e3 * value:.1f} | {value / median['raytrain']:.2f} | {differences[label]:.0e} |"
        for label, value in median.items()
    ]


def medians(
    ways: dict[str, Callable[[], None]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median seconds of each way, all of them in turn, after one time that does not count."""
    times: dict[str, list[float]] = {label: [] for label in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for label, way in ways.items():
            times[label].append(seconds(device, way))
    return {label: statistics.median(values) for label, values in times.items()}


def check(label: str, found: list[float], wanted: list[float], precision: Precision) -> None:
    """Raise if losses of the first steps are not those of plain execution.

    They drift apart with the steps, as rounding decides the sign of small gradients.
    """
    tolerance = 0.1 if precision == "bf16" else 0.02
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if abs(ours - theirs) > tolerance * max(1.0, abs(theirs)):
            raise SystemExit(f"{label}: loss {ours:.4f} in step {step + 1}, expected {theirs:.4f}")


def described(device: torch.device) -> str:
    """Hardware, versions and commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    commit = git(Path(__file__).parent, "rev-parse", "--short", "HEAD")
    threads = "" if device.type == "cuda" else ", one thread"
    return f"{name}{threads}; torch {torch.__version__}, Python {platform.python_version()}; commit {commit}"


def _processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", nargs="+", default=None)
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="one for each network")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=None)
    parser.add_argument("--algorithms", nargs="+", default=None, help="pgd, pgd+awp, ...")
    parser.add_argument("--modes", nargs="+", default=None, choices=("eager", "graph", "compile"))
    parser.add_argument("--steps", type=int, default=None, help="inner steps of PGD")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(1)
        keep_freed_memory()
    networks = options.network or (["resnet18", "resnet18"] if on_gpu else ["small_cnn"])
    batches = options.batch or ([128, 512] if on_gpu else [64])
    modes: list[Mode] = options.modes or (
        ["eager", "graph", "compile"] if on_gpu else ["eager", "compile"]
    )
    precision: Precision = options.precision or ("bf16" if on_gpu else "fp32")
    steps = options.steps or (STEPS if on_gpu else 2)
    lines = [
        "| network | batch | precision | algorithm | FE | way | ms | over floor | plain loop over it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for network, batch in zip(networks, batches, strict=True):
        for name in options.algorithms or (GPU if on_gpu else CPU):
            case = Case(network, batch, precision, device, steps)
            for line in row(case, name, modes, options.repeats):
                print(line, flush=True)
                lines.append(line)
    table = [
        "",
        "| network | batch | precision | steps | PGD of | ms | over raytrain | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, batch in zip(networks, batches, strict=True):
        table += attack_rows(Case(network, batch, precision, device, steps), options.repeats)
    print("\n".join(table), flush=True)
    lines += table
    note = f"\n{described(device)}; medians of {options.repeats}, all ways in turn.\n"
    print(note)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n" + note)


if __name__ == "__main__":
    main()
