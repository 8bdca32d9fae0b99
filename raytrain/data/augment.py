"""Random crops and flips of a batch, as offsets that also transform stored state."""

from __future__ import annotations

from raytrain.core.types import AugmentedView, BatchRandom


def random_view(rng: BatchRandom, pad: int, flip: bool) -> AugmentedView | None:
    """Draw crops of images padded by `pad`, mirrored with probability 1/2; None without augmentation."""
    if pad == 0 and not flip:
        return None
    mirrored = rng.uniform("flip") < (0.5 if flip else 0.0)
    top, left = rng.integers("top", 2 * pad + 1), rng.integers("left", 2 * pad + 1)
    return AugmentedView(pad, top, left, mirrored)
