"""The threat-model contract: what a robust accuracy is a number of, and when two may be compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from raytrain.core.threat_models import AbstractThreatModel


@dataclass(frozen=True)
class Contract:
    """Which perturbations the attacker may make of which pixels, and what the network is when attacked.

    `eps` is in pixels of `input_range`, before the normaliser (x - mean) / std, which is a part of the
    network. `bn` is the mode of BatchNorm and dropout while a network is attacked and evaluated.
    """

    norm: str
    eps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: tuple[float, float] = (0.0, 1.0)
    bn: str = "eval"

    @classmethod
    def of(
        cls, threat: AbstractThreatModel, mean: Sequence[float], std: Sequence[float]
    ) -> Contract:
        """For a ball and a normaliser; numbers are kept to six digits, which survive a text file."""
        return cls(threat.norm, _short(threat.eps), _all_short(mean), _all_short(std))

    @property
    def hash(self) -> str:
        """8 hexadecimal digits that two runs share exactly when their numbers mean the same."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def text(self) -> str:
        """In words."""
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        low, high = self.input_range
        inside = f"normaliser inside (mean {mean}, std {std})"
        if not any(self.mean) and set(self.std) == {1.0}:
            inside = "no normaliser"
        return (
            f"{self.norm} eps {self.eps:g} in [{low:g}, {high:g}], {inside}, BatchNorm {self.bn}"
        )


def threat_in(text: str) -> str | None:
    """Return the `text` of a contract without the normaliser, a part of the network; None for other text.

    >>> threat_in("l2 eps 0.5 in [0, 1], normaliser inside (mean 0.3, std 0.4), BatchNorm eval")
    'l2 eps 0.5 in [0, 1], BatchNorm eval'
    """
    threat, found = re.subn(r"(normaliser inside \([^)]*\)|no normaliser), ", "", text)
    return threat if found else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _all_short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(_short(value) for value in values)
