"""Auto-PGD whose rows stop costing once they have fallen."""

from __future__ import annotations

from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from raytrain.attacks.autoattack.counted_model import Answers


class _EarlyExit:
    """An APGD whose rows stop costing once they have fallen."""

    model: Answers
    eps: float
    eps_orig: float

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if self.eps != self.eps_orig:  # a larger radius on the way: nothing found there counts
            return super().attack_single_run(x, y, x_init)  # pyright: ignore
        with self.model.sieving(y) as sieve:
            best, _, loss, found = super().attack_single_run(x, y, x_init)  # pyright: ignore
        if sieve.found is not None:
            found[sieve.fallen] = sieve.found[sieve.fallen]
        return best, ~sieve.fallen, loss, found  # the network's own verdicts, not its copy's


class Apgd(_EarlyExit, APGDAttack):
    """APGD on the cross-entropy."""


class ApgdTargeted(_EarlyExit, APGDAttack_targeted):
    """APGD on the targeted DLR loss, target after target."""


class ApgdMargin(ApgdTargeted):
    """With two or three classes, for which the targeted DLR is not defined: the bare difference of
    logits, its numerator."""

    y_target: Tensor

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.y_target] - x[rows, y]
