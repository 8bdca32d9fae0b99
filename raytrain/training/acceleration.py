"""How a run is executed on its device: memory format, compiled passes, replayed steps.

Results differ from those of plain execution by rounding only.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from raytrain.config.cost_estimate import estimate_cost
from raytrain.config.performance import Mode
from raytrain.config.run import RunConfig
from raytrain.core.console import log_line
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.network import (
    FrozenNetwork,
    Precision,
    autocast,
    copy_of,
    forward_flops,
    mode,
)
from raytrain.core.recording import CudaGraphs
from raytrain.core.train_state import TrainState
from raytrain.core.user_code import user_code_errors
from raytrain.data.loader import Splits
from raytrain.models import ModelSpec
from raytrain.training.replay import ReplayedWherePossible, Steps, eager_steps

_WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e16}
"""Floating-point operations of a run from which compiling saves more time than it takes: about half an
hour on one core, about a minute on an H100."""

_WORTH_RECORDING = 100
"""Steps from which a CUDA graph saves more time than its recording takes."""

_TOLERANCE: dict[Precision, float] = {"fp64": 1e-6, "fp32": 1e-3, "bf16": 0.1}
"""Relative difference of logits and input gradients of a compiled network that counts as rounding."""

_MAX_COMPILED = 64
"""Forms of one function: modes of BatchNorm, shapes of batches, trials of a process."""


@dataclass(frozen=True)
class Execution:
    """A mode, and why it was chosen."""

    mode: Mode
    reason: str

    def __str__(self) -> str:
        return f"{self.mode} ({self.reason})"


def execution(run: RunConfig, splits: Splits, device: torch.device, model: nn.Module) -> Execution:
    """Choose how the steps of a run are executed, from its configuration, network and kind of device.

    Raises:
        RequestError: if the configured mode is not possible here.
    """
    check_mode(run, device)
    wanted = run.performance.mode
    if wanted == "auto":
        return _chosen(run, splits, device, model)
    return Execution(wanted, "as configured")


def check_mode(run: RunConfig, device: torch.device) -> None:
    """Check that the configured mode is possible on this machine and device.

    Raises:
        RequestError: naming what is expected.
    """
    reasons = {
        "auto": None,
        "eager": None,
        "graph": None if device.type == "cuda" else "needs a CUDA device",
        "compile": _why_not_compiled(device) if run.performance.mode == "compile" else None,
    }
    if reason := reasons[run.performance.mode]:
        raise RequestError(
            f"performance.mode: {run.performance.mode} {reason}; expected auto or eager"
        )


def _chosen(run: RunConfig, splits: Splits, device: torch.device, model: nn.Module) -> Execution:
    """The mode that is `auto` for a run."""
    num_images, theirs = splits.train.num_images, run.model.users
    passes, enough = estimate_cost(run) * num_images, _WORTH_COMPILING[device.type]
    flops, amount = passes * _most_flops(model, splits.train.shape), "at most "
    if flops >= enough and not theirs:
        flops, amount = passes * flops_of(run.model, model, splits.train.shape), ""
    length = f"a run of {amount}{flops:.0e} floating-point operations"
    if theirs:
        # A recording would fix what its code decides on the host: a counter, random.random().
        reason = "a network of the user's own is compiled or recorded only where configured"
    elif flops < enough:
        reason = f"{length} is too short to compile"
    elif why := _why_not_compiled(device):
        reason = f"compiling {why}"
    else:
        return Execution("compile", length)
    long = run.epochs * (num_images // run.batch_size) >= _WORTH_RECORDING
    recorded = long and not theirs and device.type == "cuda"
    return Execution("graph" if recorded else "eager", reason)


@cache
def _why_not_compiled(device: torch.device) -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # a kind of torch's own that is not public
        return "needs a C++ compiler such as g++"
    if device.type == "cuda" and find_spec("triton") is None:
        return "needs the package triton"
    return None


def _most_flops(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """A bound of the floating-point operations of the forward pass of one image, which costs no pass.

    Every weight is multiplied once at most per pixel, in networks that do not enlarge their input.
    """
    return 2 * sum(weight.numel() for weight in model.parameters()) * shape[1] * shape[2]


_FLOPS: dict[tuple[str, tuple[int, ...]], int] = {}  # counted once per process: trials share them


def flops_of(spec: ModelSpec, model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Floating-point operations of the forward pass of one image, without side effects.

    Raises:
        RequestError: if they cannot be counted.
    """
    key = spec.model_dump_json(), shape
    if key not in _FLOPS:
        image = next(model.parameters()).new_zeros(1, *shape)
        generators = [image.device] if image.is_cuda else []
        with (
            torch.random.fork_rng(generators),
            user_code_errors(spec.name, "cannot be counted"),
        ):
            _FLOPS[key] = forward_flops(copy_of(model), image)
    return _FLOPS[key]


def accelerate(run: RunConfig, state: TrainState, splits: Splits) -> Steps:
    """Prepare device, network and optimiser of a run for its mode; return what executes its steps.

    Raises:
        RequestError: if the configured mode is not possible here.
    """
    context = state.context
    chosen = execution(run, splits, context.device, state.model)
    if context.leads and (chosen.mode != "eager" or run.performance.mode != "auto"):
        log_line(f"raytrain: performance: {chosen}")
    steps = steps_in(chosen.mode, state)
    if state.frozen is not None:
        images = _probe_images(run, splits, context)
        if reason := _why_not_the_same(state.frozen, images, state.precision):
            chosen = Execution("eager", f"the compiled network is not used: {reason}")
            log_line(f"raytrain: performance: {chosen}")
            state.frozen = state.compiled = None
            steps = steps_in("eager", state)
    state.execution = str(chosen)
    return steps


def _probe_images(run: RunConfig, splits: Splits, context: DistributedContext) -> Tensor:
    """Random images in the form of a training batch of this worker."""
    count, train = run.batch_size // context.world, splits.train
    images = torch.rand(count, *train.shape, generator=torch.Generator().manual_seed(0))
    return images.to(context.device, train.dtype).contiguous(memory_format=train.memory_format)


def _why_not_the_same(network: FrozenNetwork, images: Tensor, precision: Precision) -> str | None:
    """Compare logits and input gradients of the compiled network with those of the plain one.

    Both run in eval mode, which is that of most attacks: what is compiled here serves training too.
    """
    found: list[tuple[Tensor, Tensor]] = []
    try:
        with mode(network.module, "eval"):
            for predict in (network.module, network.predict):
                point = images.clone().requires_grad_(True)
                with autocast(images.device, precision):
                    logits = predict(point)
                (grad,) = torch.autograd.grad(logits.float().square().sum(), point)
                found.append((logits.detach().float(), grad.float()))
    except Exception as error:  # of compilers, many kinds
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    for plain, compiled in zip(*found, strict=True):
        if not (plain - compiled).norm() <= _TOLERANCE[precision] * plain.norm():
            return "it computes something else"
    return None


def steps_in(how: Mode, state: TrainState) -> Steps:
    """Prepare a training state for a mode of execution; return what executes its steps.

    Steps are recorded on a GPU only; elsewhere `compile` runs them one by one.
    """
    device = state.context.device
    if how == "compile":
        from torch._inductor import config as inductor

        if device.type == "cpu":  # a warning that there is no CUDA is none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        torch._dynamo.config.recompile_limit = _MAX_COMPILED
        # Else compiled dropout has generators of its own, and other masks than plain dropout.
        inductor.fallback_random = True
        state.frozen = FrozenNetwork.of(state.model, torch.compile)
        state.compiled = torch.compile(state.wrapper)
    if how == "eager" or device.type != "cuda":
        return eager_steps(state)
    return ReplayedWherePossible(state, lambda: CudaGraphs(device))


def set_up_device(run: RunConfig, device: torch.device) -> None:
    """Set what torch keeps per process: TF32, the choice of convolution algorithms by measurement."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = run.performance.tf32
        torch.backends.cudnn.allow_tf32 = run.performance.tf32
    elif run.precision == "bf16" and not _has_bf16_units():
        log_line(
            "raytrain: precision: this CPU has no bf16 units and emulates them, many times slower than "
            "fp32"
        )


def _has_bf16_units() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known
    kinds = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, kind, lambda: True)() for kind in kinds)


def memory_format(run: RunConfig) -> torch.memory_format:
    """The order in memory of images and weights.

    Networks of the user's own may need contiguous features, for `x.view(len(x), -1)`, or have weights
    of five dimensions, which have no order with channels last.
    """
    wanted = run.performance.channels_last
    last = not run.model.users if wanted is None else wanted
    return torch.channels_last if last else torch.contiguous_format
