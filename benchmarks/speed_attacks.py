"""PGD alone, of raytrain and of the packages torchattacks and robustness: of a network, one function each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from raytrain.attacks import ProjectedAscent
from raytrain.core.cost import Meter
from raytrain.core.losses import CrossEntropy
from raytrain.core.network import FrozenNetwork, Precision, autocast
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import Linf
from raytrain.core.types import BEGINNING, Batch, BatchRandom

Attack = Callable[[Tensor, Tensor], Tensor]
"""Adversarial images of images and labels."""


@dataclass(frozen=True)
class Pgd:
    """Projected ascent in the l-inf ball from the images themselves, in eval mode."""

    eps: float
    step_size: float
    steps: int

    def of_raytrain(self, model: nn.Module, precision: Precision) -> Attack:
        frozen = FrozenNetwork.of(model, lambda module: module)
        ascent = ProjectedAscent(steps=self.steps, step_size=self.step_size, bn="eval")

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            rows = torch.arange(len(images), device=images.device)
            rng = BatchRandom(0, len(images), rows, images.device)
            batch = Batch(images, labels, rows, rng)
            oracle = Oracle(
                model,
                CrossEntropy(),
                batch,
                Meter(),
                frozen=frozen,
                attack_bn="eval",
                precision=precision,
            )
            start = torch.zeros_like(images)
            return images + ascent.maximise(oracle, Linf(eps=self.eps), start, BEGINNING).delta

        return attack

    def of_torchattacks(self, model: nn.Module, precision: Precision) -> Attack:
        from torchattacks import PGD  # pyright: ignore[reportMissingImports]

        given = PGD(model, self.eps, self.step_size, self.steps, random_start=False)

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            with autocast(images.device, precision):
                return given(images, labels)

        return attack

    def of_robustness(self, model: nn.Module, precision: Precision) -> Attack:
        from robustness.attacker import Attacker  # pyright: ignore[reportMissingImports]

        unused = SimpleNamespace(mean=torch.zeros(3), std=torch.ones(3))  # the model normalises
        given = Attacker(model, unused)

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            with ExitStack() as block:
                block.enter_context(autocast(images.device, precision))
                if not images.is_cuda:  # it moves images to a GPU in any case
                    block.enter_context(patch.object(Tensor, "cuda", lambda self: self))
                return given(
                    images,
                    labels,
                    constraint="inf",
                    eps=self.eps,
                    step_size=self.step_size,
                    iterations=self.steps,
                    use_best=False,
                    should_normalize=False,
                )

        return attack

    def of_others(self) -> dict[str, Callable[[nn.Module, Precision], Attack]]:
        """Those of the packages that can be imported, by name and version."""
        known = {"torchattacks": self.of_torchattacks, "robustness": self.of_robustness}
        return {
            f"{name} {version(name)}": attack for name, attack in known.items() if find_spec(name)
        }
