"""Weights to and from RobustBench: its parameter names are the backbone's own.

RobustBench (Croce et al. 2021, arXiv 2010.09670) stores a network without a prefix and, where it
has a normaliser, its statistics as `mu` and `sigma`, `mean` and `std`, or
`normalize.mean` and `normalize.std`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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
        bare = re.sub(r"^((module|model)\.)+", "", key)
        if bare in _STATISTICS:
            new[_STATISTICS[bare]] = value.reshape(-1, 1, 1)
        # TRADES's WideResNet has these unused layers, which are part of checkpoints.
        elif not bare.startswith("sub_block1."):
            new[f"backbone.{bare}"] = value
    _check_fit(type(model.backbone).__name__, own, new)
    model.load_state_dict(new)


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
