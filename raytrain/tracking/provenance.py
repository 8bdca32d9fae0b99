"""Where a run comes from: commit, versions, hardware, and its configuration as flat parameters."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from raytrain.config.names import STORAGE
from raytrain.config.run import RunConfig
from raytrain.core.epoch_metrics import IN_EPS
from raytrain.core.git import git
from raytrain.core.types import in_pixels
from raytrain.data.loader import open_source
from raytrain.evaluation.contract import Contract
from raytrain.tracking.data_sets import data_name
from raytrain.training.run_folder import option

_PACKAGES = ("raytrain", "torch", "ray")

Kind = Literal["train", "sweep", "trial", "final", "imported"]


def tags(run: RunConfig, kind: Kind = "train") -> dict[str, str]:
    """The tags by which runs are searched and grouped in MLflow.

    `kind`: a training of its own, a sweep, one of its trials, a training of its best on a new seed, or a
    network in a file, which was not trained here.
    """
    contract = contract_of(run)
    return {
        "kind": kind,
        "algorithm": run.algorithm.name,
        "data": run.data.name,
        "model": model_of(run),
        "threat": f"{run.threat.norm} {run.threat.eps:.5g}",
        "contract": contract.hash,
        "contract_text": contract.text,
        "outer": run.outer.name,
        "signature": run.signature(),
        "seed": str(run.seed),
        "workers": str(run.workers),
        **({} if str(run.storage) == STORAGE else {"storage": str(run.storage)}),
        **_machine(Path.cwd()),
    }


def contract_of(run: RunConfig) -> Contract:
    """The threat-model contract of a run; reads its training images if need be."""
    source = open_source(run.data)
    statistics = run.model.statistics(source.channels, source.mean, source.std)
    return Contract.of(run.threat, *statistics)


def model_of(run: RunConfig) -> str:
    """The network by name: what `auto` stands for."""
    return run.model.resolved(open_source(run.data).size)


def parameters(run: RunConfig) -> dict[str, Any]:
    """The configuration flat, by dotted path; step sizes in pixels, so that they can be plotted.

    Those of the algorithm are there once more as multiples of the radius, `..._in_eps`: radii differ.
    """
    flat = _flatten(run.computed())
    for path, value in list(flat.items()):
        if not path.endswith("step_size"):
            continue
        pixels = in_pixels(value, run.threat.eps)
        flat[path] = pixels
        if path.startswith("algorithm."):
            flat[path + IN_EPS] = float(f"{pixels / run.threat.eps:.6g}")
    return flat


def note(run: RunConfig) -> str:
    """What a training is and what can be done with it, in Markdown; `{run_id}` stands for its id."""
    outer = "" if run.outer.name == "sgd" else f" with {run.outer.name}"
    cost = f"{run.epochs} epochs"
    if run.fe_per_image is not None:
        cost = f"{run.fe_per_image:g} forward-equivalents per image"
    contract, where = contract_of(run), option(run.storage)
    return (
        f"**{run.algorithm.name}**{outer} on {data_name(run.data)}, {model_of(run)}, {cost}, "
        f"seed {run.seed}, {run.threat.norm} {run.threat.eps:.5g}.\n\n"
        "Next, the test set: `raytrain evaluate {run_id}"
        f"{where}`\n\n"
        "```sh\n"
        f"raytrain export {{run_id}} --to my-model{where}  # weights for others, with a model card\n"
        "raytrain compare {run_id} OTHER_RUN\n"
        "```\n\n"
        f"Threat model `{contract.hash}`: {contract.text}.\n"
    )


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
def _machine(folder: Path) -> dict[str, str]:
    """Hardware, versions, and the commit of the working directory, which is `folder`, or $GIT_COMMIT."""
    commit = git(folder, "rev-parse", "HEAD") or os.environ.get("GIT_COMMIT", "").strip()
    clean = {} if not commit else {"mlflow.source.git.commit": commit, "git_commit": commit}
    if commit and git(folder, "status", "--porcelain", "--untracked-files=no"):
        clean["git_dirty"] = "true"
    versions = {f"{name}_version": found for name in _PACKAGES if (found := _version(name))}
    return {"hardware": hardware(), "python": platform.python_version(), **versions, **clean}


def _version(package: str) -> str | None:
    """None if it is not installed: training needs no Ray."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
