"""Where the time of training steps goes: a trace, and a table of shares."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from raytrain.core.console import log_line
from raytrain.core.files import write_atomically
from raytrain.core.regions import DATA, NETWORK, STEP

TRACE, TABLE = "trace.json", "profile.md"

_NUM_SKIPPED = 5  # steps before the first that counts: libraries are set up, graphs recorded
_NUM_STEPS = 10
_OPTIMIZER = "Optimizer.step#"
_COLLECTIVES = ("c10d::", "nccl:", "gloo:")
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "aten::item")
_NUM_OPERATIONS = 12


class StepProfile:
    """Profiles steps 6 to 15 of a training, `step` being called after each; writes to `folder`.

    `trace.json` is for chrome://tracing or Perfetto, `profile.md` has the shares and the costliest
    operations. Of a training of fewer steps all from the sixth on are profiled.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines of its own on stderr
        self._folder, self._seen, self._runs = folder, 0, False
        self.written = False  # whether there was a step to profile
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._runs:
            self._finish()
        if not self.written:
            log_line(
                f"raytrain: --profile: nothing was profiled: this training had {self._seen} steps, and a "
                f"profile begins with step {_NUM_SKIPPED + 1}"
            )

    def step(self) -> None:
        """A step has ended."""
        self._seen += 1
        if self._seen == _NUM_SKIPPED:
            self._profiler.start()
            self._runs = True
        elif self._seen == _NUM_SKIPPED + _NUM_STEPS:
            self._finish()

    def _finish(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        self._runs = False
        if self._seen == _NUM_SKIPPED:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / TRACE))
        text = table(self._profiler.events() or (), self._seen - _NUM_SKIPPED)
        write_atomically(self._folder / TABLE, text)
        self.written = True


def table(events: Iterable[Any], steps: int) -> str:
    """Markdown: shares of the parts of a step, and the operations that take most.

    Only what runs within steps and while batches are made counts. On a GPU times are those of its
    kernels; the kernels of a replayed step belong to no part but the step.
    """
    inside = [event for event in events if _is_inside(event)]
    on_gpu = any(event.device_time_total > 0 for event in inside)

    def per_step(microseconds: float) -> float:
        return microseconds / 1e3 / steps

    def total(*names: str) -> float:
        chosen = [event for event in inside if event.name.startswith(names)]
        return per_step(sum(e.device_time_total if on_gpu else e.cpu_time_total for e in chosen))

    network, optimiser, collectives = total(NETWORK), total(_OPTIMIZER), total(*_COLLECTIVES)
    whole = total(STEP) + total(DATA)
    parts = {
        "network, forward and backward": network,
        "optimiser": optimiser,
        "collectives": collectives,
        "attack arithmetic and losses": total(STEP) - network - optimiser - collectives,
        "data and augmentation": total(DATA),
    }
    kind = "of the GPU" if on_gpu else "of the processor"
    lines = [f"| part of a step, mean of {steps} | ms {kind} | share |", "|---|---|---|"]
    lines += [f"| {name} | {ms:.2f} | {_share(ms, whole)} |" for name, ms in parts.items()]
    waits = per_step(sum(event.cpu_time_total for event in inside if event.name in _WAITS))
    lines += ["", f"The host waits for the device for {waits:.2f} ms per step.", ""]

    calls, times = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in inside:
        if not event.name.startswith(("raytrain::", _OPTIMIZER)):
            calls[event.name] += 1
            times[event.name] += (
                event.self_device_time_total if on_gpu else event.self_cpu_time_total
            )
    lines += ["| operation | calls per step | ms | share |", "|---|---|---|---|"]
    for name in sorted(times, key=lambda name: times[name], reverse=True)[:_NUM_OPERATIONS]:
        ms = per_step(times[name])
        lines.append(f"| {name} | {calls[name] / steps:.1f} | {ms:.2f} | {_share(ms, whole)} |")
    return "\n".join(lines) + "\n"


def _is_inside(event: Any) -> bool:
    """Whether an event lies within a step, or within the making of a batch."""
    while event is not None:
        if event.name in (STEP, DATA):
            return True
        event = event.cpu_parent
    return False


def _share(ms: float, whole: float) -> str:
    return f"{ms / whole:.1%}" if whole > 0 else "-"
