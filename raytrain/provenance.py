"""Where a run comes from: commit, versions, hardware, and its configuration as flat parameters."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from raytrain.config import RUNTIME, RunConfig
from raytrain.data.loader import open_source
from raytrain.evaluation.contract import Contract
from raytrain.types import in_pixels


def tags(run: RunConfig) -> dict[str, str]:
    """What runs are searched and grouped by in MLflow."""
    contract = contract_of(run)
    return {
        "algorithm": run.algorithm.name,
        "data": run.data.name,
        "model": run.model.name,
        "threat": f"{run.threat.norm} {run.threat.eps:.5g}",
        "contract": contract.hash,
        "contract_text": contract.text,
        "outer": run.outer.name,
        "signature": run.signature(),
        "seed": str(run.seed),
        "workers": str(run.workers),
        **_machine(),
    }


def contract_of(run: RunConfig) -> Contract:
    """The threat-model contract of a run; reads its training images where nobody has yet."""
    source = open_source(run.data)
    return Contract.of(run.threat, source.mean, source.std)


def parameters(run: RunConfig) -> dict[str, Any]:
    """The configuration flat, by dotted path; step sizes in pixels, so that they can be plotted."""
    flat = _flatten(run.model_dump(mode="json", exclude=set(RUNTIME)))
    for path, value in flat.items():
        if path.endswith("step_size") and isinstance(value, str):
            flat[path] = in_pixels(value, run.threat.eps)
    return flat


def describe(run: RunConfig) -> str:
    """What a run is, at a glance: its name where the user gives none."""
    return f"{run.algorithm.name}-{_stem(run.data.name)}-{run.signature()[:6]}"


def hardware() -> str:
    """The accelerator, or else the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def _machine() -> dict[str, str]:
    commit = _git("rev-parse", "HEAD")
    clean = {} if not commit else {"mlflow.source.git.commit": commit, "git_commit": commit}
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        clean["git_dirty"] = "true"
    versions = {f"{name}_version": version(name) for name in ("raytrain", "torch", "ray")}
    return {"hardware": hardware(), "python": platform.python_version(), **versions, **clean}


def _git(*words: str) -> str:
    """What git says of the working directory; nothing outside a repository."""
    try:
        found = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _stem(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".parquet")
