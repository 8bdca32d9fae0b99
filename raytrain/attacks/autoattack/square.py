"""Square that does not evaluate the same image twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pyautoattack.square import SquareAttack
from torch import Tensor

from raytrain.attacks.autoattack.counted_model import CountedModel

Windows = Float[Tensor, "n c size size"]


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
        margin = self._judged(_margin(self.predict(best), y), best, y)
        queries = torch.ones(count, device=x.device)
        changed = torch.zeros(count, dtype=torch.long, device=x.device)
        tried: dict[tuple[int, ...], int] = {}
        for query in range(self.n_queries):
            if bool((margin <= 0).all()):
                break
            square = self._square(query, channels, height, width)
            known, tried[square.key] = tried.get(square.key, -1), query + 1
            rows = ((margin > 0) & (changed >= known)).nonzero().flatten()
            images = best[rows]
            before = square.window(images)
            after = square.moved(before, square.window(x[rows]), self.eps)
            moves = (after != before).flatten(1).any(1)
            rows, images = rows[moves], images[moves]
            if len(rows) == 0:
                continue
            square.window(images).copy_(after[moves])
            found = self._judged(_margin(self.predict(images), y[rows]), images, y[rows])
            better = found < margin[rows]
            rows = rows[better]
            margin[rows], best[rows] = found[better], images[better]
            changed[rows], queries[rows] = query + 1, float(query + 1)
        return queries, best

    def _judged(self, margin: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Margins of which none marks an image as fallen that only the attacked copy misclassifies."""
        over = (margin <= 0).nonzero().flatten()
        if len(over):
            stands = self.predict.classes(images[over]) == labels[over]
            margin[over[stands]] = torch.finfo(margin.dtype).tiny
        return margin

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The library's, for the other norms; it takes no margin of exactly zero for a success."""
        margin, loss = super().margin_and_loss(x, y)  # pyright: ignore[reportGeneralTypeIssues]
        return torch.where(margin == 0, -torch.finfo(margin.dtype).tiny, margin), loss

    def _square(self, query: int, channels: int, height: int, width: int) -> _Square:
        """The next proposal, drawn as the library draws it."""
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

    def window(self, images: Tensor) -> Windows:
        """The part of images that the square covers: a view."""
        rows = slice(self.top, self.top + self.size)
        return images[:, :, rows, self.left : self.left + self.size]

    def moved(self, window: Windows, clean: Windows, eps: float) -> Windows:
        """A window after the move, inside the ball around the `clean` one and [0, 1]."""
        moved = window + 2 * eps * self.signs
        return moved.maximum(clean - eps).minimum(clean + eps).clamp(0, 1)
