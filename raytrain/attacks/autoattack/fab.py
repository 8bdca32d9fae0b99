"""FAB that does not evaluate misclassified rows again, with an l-inf projection without sorting."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pyautoattack.fab_projections import projection_l1, projection_l2
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor

from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.types import Images, over_pixels

Points = Float[Tensor, "n d"]


class Fab(FABAttack_PT):
    """Targeted FAB: Croce & Hein 2020 (arXiv 1907.02044), algorithm 1 without random starts.

    The library searches the nearest adversarial image, an evaluation any one within eps: a row stops
    at the first. Images do not depend on one another.
    """

    predict: CountedModel
    target_class: int
    eps: float
    alpha_max: float
    eta: float
    beta: float

    def __init__(self, counted: CountedModel, ball: AbstractThreatModel, **numbers: Any) -> None:
        super().__init__(counted, **numbers)
        self._ball = ball

    def attack_single_run(
        self,
        x: Tensor,
        y: Tensor | None = None,
        use_rand_start: bool = False,
        is_targeted: bool = True,
    ) -> Tensor:
        """Return for each image an adversarial one within eps, or else the image itself."""
        assert y is not None and is_targeted and not use_rand_start  # as in the standard version
        target = self.predict(x).argsort(1)[:, -self.target_class]
        found = x.clone()
        rows, at = torch.arange(len(x), device=x.device), x
        for _ in range(self.n_iter):
            clean, label = x[rows], y[rows]
            at = self._step(at, clean, label, target[rows])
            other = self.predict(at).argmax(1) != label
            within = self._ball.norm_of(at - clean) <= self.eps
            fallen = self._fallen(at, label, other & within)
            found[rows[fallen]] = at[fallen]
            at = torch.where(other[:, None, None, None], clean + (at - clean) * self.beta, at)
            if bool(fallen.any()):
                rows, at = rows[~fallen], at[~fallen]
            if len(rows) == 0:
                break
        return found

    def _fallen(self, at: Images, label: Tensor, within: Tensor) -> Tensor:
        """Which of the images `within` the ball the network itself misclassifies."""
        rows = within.nonzero().flatten()
        fallen = torch.zeros_like(within)
        if len(rows):  # the attacked copy is equal up to rounding
            fallen[rows] = self.predict.classes(at[rows]) != label[rows]
        return fallen

    def _step(self, at: Images, clean: Images, label: Tensor, target: Tensor) -> Images:
        """Step to the linearised boundary and beyond (`eta`), biased towards the clean image (`alpha`)."""
        value, slope = self.get_diff_logits_grads_batch_targeted(at, label, target)
        w = slope.flatten(1)
        b = (w * at.flatten(1)).sum(1) - value.flatten()
        points = torch.cat([at.flatten(1), clean.flatten(1)])
        project = _PROJECTIONS[self._ball.norm]
        moves = project(points, torch.cat([w, w]), torch.cat([b, b])).view(2, *at.shape)
        from_at, from_clean = (self._ball.norm_of(move).clamp_min(1e-8) for move in moves)
        alpha = over_pixels((from_at / (from_at + from_clean)).clamp(0, self.alpha_max))
        forward, back = at + self.eta * moves[0], clean + self.eta * moves[1]
        return (forward * (1 - alpha) + back * alpha).clamp(0, 1)


def project_linf(points: Points, w: Points, b: Float[Tensor, " n"]) -> Points:
    """The move of least maximum norm that brings each point in [0, 1] onto <w, x> = b, or nearest to it.

    Every pixel moves by the same amount, limited by [0, 1], so the amount solves
    sum_i |w_i| min(amount, room_i) = |<w, x> - b|. The left side is concave: Newton's method from
    below ends at the solution after as many rounds as there are sets of pixels at the edge; the
    library sorts all pixels instead.
    """
    excess = (w * points).sum(1) - b
    direction = w.sign() * torch.where(excess < 0, 1.0, -1.0)[:, None]
    room, slope = torch.where(direction > 0, 1 - points, points), w.abs()
    full, left, free = slope * room, excess.abs(), slope.sum(1)
    spent, amount = torch.zeros_like(slope, dtype=torch.bool), torch.zeros_like(left)
    while True:  # from below: the amount never decreases by rounding
        amount = torch.where(free > 0, left / free, torch.inf).maximum(amount)
        now = spent | (room < amount[:, None])
        if torch.equal(now, spent):
            break
        spent = now
        left = excess.abs() - full.masked_fill(~spent, 0).sum(1)
        free = slope.masked_fill(spent, 0).sum(1)
    return direction * torch.minimum(room, amount[:, None])


_PROJECTIONS = {"linf": project_linf, "l2": projection_l2, "l1": projection_l1}
