"""Names of what a step does, for profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DATA, STEP, NETWORK = "raytrain::data", "raytrain::step", "raytrain::network"


def region(name: str) -> AbstractContextManager[object]:
    """Label what runs inside the block, if a profiler is at work."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(name)
    return nullcontext()
