"""Weights to and from RobustBench: its parameter names are the backbone's own.

RobustBench (Croce et al. 2021, arXiv 2010.09670) stores a network without a prefix and, where it
has a normaliser, its statistics as `mu` and `sigma`, `mean` and `std`, or
`normalize.mean` and `normalize.std`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raytrain.core.errors import RequestError
from raytrain.models.classifier import Classifier

_STATISTICS = {
    "mu": "normalise.mean",
    "mean": "normalise.mean",
    "normalize.mean": "normalise.mean",
    "sigma": "normalise.std",
    "std": "normalise.std",
    "normalize.std": "normalise.std",
}
_OWN_STATISTICS = ("normalise.mean", "normalise.std")
_WRAPPED = ("state_dict", "model_state_dict")  # keys of a state dict within a checkpoint
_LAYOUTS = {  # first convolution, last layer, first convolution of a block of the first stage
    "resnet18": ("conv1", "linear", r"layer1\.(\d+)\.conv1"),
    "wideresnet": ("conv1", "fc", r"block1\.layer\.(\d+)\.conv1"),
    "wideresnet-silu": ("init_conv", "logits", r"layer\.0\.block\.(\d+)\.conv_0"),
}


@dataclass(frozen=True)
class Layout:
    """What the names and shapes of a RobustBench state dict are of."""

    name: str  # a name of `MODELS`
    channels: int
    classes: int
    mean: tuple[float, ...] | None  # of its normaliser; None without one
    std: tuple[float, ...] | None


def robustbench_state_dict(model: Classifier) -> dict[str, Tensor]:
    """Return the backbone's state dict, for strict loading into RobustBench's network of that name.

    The normaliser is not in it: RobustBench must be given the same mean and std.
    """
    return dict(model.backbone.state_dict())


def load_robustbench(model: Classifier, state: Mapping[str, Tensor]) -> None:
    """Load a RobustBench state dict into `model`, all of it or nothing.

    `module.` and `model.` before a name are dropped. Statistics of a normaliser are loaded where
    the state has them; where it has none, those of `model` stay, so a network trained on pixels in
    [0, 1] belongs in a model built with `normalise=False`.
    """
    own = model.state_dict()
    new = {key: value for key, value in own.items() if _may_be_missing(key)}
    for key, value in state.items():
        bare = _bare(key)
        if bare in _STATISTICS:
            new[_STATISTICS[bare]] = value.reshape(-1, 1, 1)
        # TRADES's WideResNet has these unused layers, which are part of checkpoints.
        elif not bare.startswith("sub_block1."):
            new[f"backbone.{bare}"] = value
    _check_fit(type(model.backbone).__name__, own, new)
    model.load_state_dict(new)


def read_robustbench(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or the one in a checkpoint under `state_dict` or `model_state_dict`.

    Raises:
        RequestError: if there is no such file, or it is not one. Code in it is never run.
    """
    if not path.is_file():
        raise RequestError(f"no such file: {path}; expected a checkpoint of RobustBench")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a truncated or foreign file makes the reader trip over
        raise RequestError(
            f"{path} is not a file of tensors that torch.load reads with weights_only"
        ) from error
    inner = [content[key] for key in _WRAPPED if isinstance(content, Mapping) and key in content]
    state = inner[0] if inner else content
    if not isinstance(state, Mapping) or not all(map(_is_entry, state.items())):
        raise RequestError(
            f"{path} holds no state dict; expected names and dense, real tensors, or these under "
            f"{' or '.join(_WRAPPED)}"
        )
    for key, value in state.items():
        if not value.isfinite().all():
            raise RequestError(f"{path} has numbers in {key} that are not finite")
    return dict(state)


def layout_of(path: Path) -> Layout:
    """Recognise the network of a file by its names and shapes.

    They are the same with ReLU and with SiLU: DMWideResNet's names stand for SiLU, with which all
    networks of RobustBench's CIFAR leaderboards that have these names are built.

    Raises:
        RequestError: as `read_robustbench`, or if no network of raytrain has these names.
    """
    found = path.stat() if path.is_file() else None
    return _layout_of(path, found and (found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=8)
def _layout_of(path: Path, version: tuple[int, int] | None) -> Layout:
    del version  # of the file: a sweep validates the same one for every trial
    named = read_robustbench(path)
    state = {_bare(key): value for key, value in named.items()}
    if len(state) < len(named):
        raise RequestError(
            f"{path} has names twice, with and without a prefix; expected each once"
        )
    mean, std = _normaliser(path, state)
    for kind, (first, last, block) in _LAYOUTS.items():
        blocks = [found for key in state if (found := re.fullmatch(rf"{block}\.weight", key))]
        ends = [state.get(f"{layer}.weight") for layer in (first, last)]
        ends += [state[found[0]] for found in blocks]
        if not blocks or any(weight is None or weight.dim() < 2 for weight in ends):
            continue
        return Layout(
            name=_name(kind, state, len(blocks), state[blocks[0][0]].shape[0]),
            channels=state[f"{first}.weight"].shape[1],
            classes=state[f"{last}.weight"].shape[0],
            mean=mean,
            std=std,
        )
    raise RequestError(
        f"{path} is of an unknown network (its first names: {', '.join([*state][:3])}); expected "
        "RobustBench's names of resnet18, preact_resnet18, wideresnet-D-W or wideresnet-D-W-silu"
    )


def _name(kind: str, state: Mapping[str, Tensor], num_blocks: int, width: int) -> str:
    if kind == "resnet18":
        return "resnet18" if "bn1.weight" in state else "preact_resnet18"
    stem, _, silu = kind.partition("-")
    return f"{stem}-{6 * num_blocks + 4}-{width // 16}" + (f"-{silu}" if silu else "")


def _normaliser(
    path: Path, state: Mapping[str, Tensor]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std as the shortest decimals that are these numbers in float32; None twice without any."""
    keys = {own: [key for key in state if _STATISTICS.get(key) == own] for own in _OWN_STATISTICS}
    if not any(keys.values()):
        return None, None
    if any(len(found) != 1 for found in keys.values()):
        found = ", ".join(key for key in state if key in _STATISTICS)
        raise RequestError(f"{path} has {found}; expected one mean and one std, or neither")
    mean, std = (
        tuple(float(str(value)) for value in state[key].float().numpy().ravel())
        for (key,) in keys.values()
    )
    if not all(value > 0 for value in std):
        raise RequestError(f"{path} has std {std}; expected positive numbers")
    return mean, std


def _is_entry(item: tuple[object, object]) -> bool:
    key, value = item
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_complex()


def _bare(key: str) -> str:
    return re.sub(r"^((module|model)\.)+", "", key)


def _may_be_missing(key: str) -> bool:
    """Counters are absent from checkpoints older than torch 0.4.1, statistics from most."""
    return key.startswith("normalise.") or key.endswith(".num_batches_tracked")


def _check_fit(name: str, own: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for key in sorted({*own, *new}):
        theirs = key.removeprefix("backbone.")
        if key not in new:
            raise RequestError(f"the state dict does not fit {name}: it lacks {theirs}")
        if key not in own:
            raise RequestError(f"the state dict does not fit {name}, which has no {theirs}")
        if own[key].shape != new[key].shape:
            shapes = f"{tuple(new[key].shape)}, not {tuple(own[key].shape)}"
            raise RequestError(f"the state dict does not fit {name}: {theirs} has shape {shapes}")
