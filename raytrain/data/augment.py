"""Pad, crop and mirror as batched tensor code, with the offsets known so that stored state can follow."""

from __future__ import annotations

from raytrain.core.types import AugmentedView, BatchRandom


def random_view(rng: BatchRandom, pad: int, flip: bool) -> AugmentedView | None:
    """A random crop of the image padded by `pad`, mirrored half of the time; None where nothing moves."""
    if pad == 0 and not flip:
        return None
    mirrored = rng.uniform("flip") < (0.5 if flip else 0.0)
    top, left = rng.integers("top", 2 * pad + 1), rng.integers("left", 2 * pad + 1)
    return AugmentedView(pad, top, left, mirrored)
