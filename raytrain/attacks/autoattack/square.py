"""Square attack without repeated evaluations of the same image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pyautoattack.square import SquareAttack
from torch import Tensor

from raytrain.attacks.autoattack.activation_cache import ActivationCache
from raytrain.attacks.autoattack.counted_model import CountedModel, NoCache
from raytrain.attacks.autoattack.regions import Region, Span

Windows = Float[Tensor, "n c size size"]

SIDE, SMALL = 16, 2
"""From this side of an image on, activations are cached once squares are at most half of it."""


class Square(SquareAttack):
    """Square attack without repeated evaluations, in l-inf; the library's in the other norms.

    All images of a batch try the same square at once. There is no improvement, and no pass, for an image
    that has not changed since that square was last tried, or that the square does not change.
    """

    predict: CountedModel
    eps: float

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm != "Linf":
            return super().attack_single_run(x, y)
        with torch.no_grad():
            return self._linf(x, y)

    def _linf(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        count, channels, height, width = x.shape
        stripes = self.random_choice([count, channels, 1, width])
        best = (x + self.eps * stripes).clamp(0, 1)
        margin = self._confirmed(_margin(self.predict(best), y), best, y)
        queries = torch.ones(count, device=x.device)
        changed = torch.zeros(count, dtype=torch.long, device=x.device)
        tried: dict[tuple[int, ...], int] = {}
        cache: NoCache | ActivationCache = NoCache(self.predict, best)
        cacheable = min(height, width) >= SIDE
        for query in range(self.n_queries):
            if bool((margin <= 0).all()):
                break
            square = self._square(query, channels, height, width)
            if cacheable and square.size * SMALL <= min(height, width):
                cache, cacheable = self.predict.activation_cache(best) or cache, False
            known, tried[square.key] = tried.get(square.key, -1), query + 1
            rows = ((margin > 0) & (changed >= known)).nonzero().flatten()
            before = square.region.of(best)[rows]
            after = square.moved(before, square.region.of(x)[rows], self.eps)
            moves = (after != before).flatten(1).any(1)
            rows, after = rows[moves], after[moves]
            if len(rows) == 0:
                continue
            found = _margin(cache.logits(rows, square.region, after), y[rows])
            over = (found <= 0).nonzero().flatten()
            if len(over):
                attempt = best[rows[over]]
                square.region.of(attempt).copy_(after[over])
                found[over] = self._confirmed(found[over], attempt, y[rows[over]])
            better = found < margin[rows]
            cache.update(better)
            rows = rows[better]
            margin[rows], square.region.of(best)[rows] = found[better], after[better]
            changed[rows], queries[rows] = query + 1, float(query + 1)
        return queries, best

    def _confirmed(self, margin: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the margins, made positive where the network itself still classifies the image correctly."""
        over = (margin <= 0).nonzero().flatten()
        if len(over):
            stands = self.predict.classes(images[over]) == labels[over]
            margin[over[stands]] = torch.finfo(margin.dtype).tiny
        return margin

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the library's values for the other norms, with a margin of exactly zero made negative."""
        margin, loss = super().margin_and_loss(x, y)  # pyright: ignore[reportGeneralTypeIssues]
        return torch.where(margin == 0, -torch.finfo(margin.dtype).tiny, margin), loss

    def _square(self, query: int, channels: int, height: int, width: int) -> _Square:
        """Draw the next proposal with the library's random numbers."""
        size = max(round(math.sqrt(self.p_selection(query) * height * width)), 1)
        size = min(size, height, width)
        top = int(self.random_int(0, height - size))
        left = int(self.random_int(0, width - size))
        return _Square(top, left, size, self.random_choice([channels, 1, 1]))


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other: the attack's loss, (n,)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


@dataclass(frozen=True)
class _Square:
    """A square window in which every channel moves by 2 eps up or down."""

    top: int
    left: int
    size: int
    signs: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        return self.top, self.left, self.size, *(int(s) for s in self.signs.flatten().tolist())

    @property
    def region(self) -> Region:
        """The window."""
        rows = Span(self.top, self.top + self.size)
        return Region(rows, Span(self.left, self.left + self.size))

    def moved(self, window: Windows, clean: Windows, eps: float) -> Windows:
        """Return the window after the move, in the ball around `clean` and in [0, 1]."""
        moved = window + 2 * eps * self.signs
        return moved.maximum(clean - eps).minimum(clean + eps).clamp(0, 1)
