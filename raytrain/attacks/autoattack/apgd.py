"""Auto-PGD that does not evaluate misclassified rows again."""

from __future__ import annotations

from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from raytrain.attacks.autoattack.counted_model import CountedModel


class _EarlyExit:
    """APGD that does not evaluate misclassified rows again."""

    model: CountedModel
    eps: float
    eps_orig: float

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if self.eps != self.eps_orig:  # at a larger radius results do not count
            return super().attack_single_run(x, y, x_init)  # pyright: ignore
        with self.model.skipping_fallen(y) as fallen_rows:
            best, _, loss, found = super().attack_single_run(x, y, x_init)  # pyright: ignore
        if fallen_rows.found is not None:
            found[fallen_rows.fallen] = fallen_rows.found[fallen_rows.fallen]
        return best, ~fallen_rows.fallen, loss, found  # by the network itself, not its copy


class Apgd(_EarlyExit, APGDAttack):
    """APGD on the cross-entropy."""


class ApgdTargeted(_EarlyExit, APGDAttack_targeted):
    """APGD on the targeted DLR loss, for one target class after the other."""


class ApgdMargin(ApgdTargeted):
    """With two or three classes, for which the targeted DLR is not defined: the bare difference of
    logits, its numerator."""

    y_target: Tensor

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.y_target] - x[rows, y]
