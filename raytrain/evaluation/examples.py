"""A few images before and after an attack, as pictures."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from raytrain.core.threat_models import AbstractThreatModel
from raytrain.evaluation.evaluator import Attacked
from raytrain.evaluation.runner import StageResults

SHOWN = 10
ATTACK = "pgd20"


def examples_table(
    attacked: Callable[[Tensor], Attacked], results: StageResults, ball: AbstractThreatModel
) -> pa.Table:
    """The first correctly classified image of each of up to ten classes, under PGD-20.

    `image`, `adversarial` and `perturbation` are PNG; grey is no perturbation, black and white are
    -eps and eps (l-inf) or the largest change of any pixel; `distance` is in the norm.
    """
    rows = _chosen(results)
    table = {"index": rows.tolist(), "label": results.labels[rows].tolist()}
    table["predicted"] = results.predicted[rows].tolist()
    if len(rows) == 0:
        return pa.table({**table, **dict.fromkeys(_PICTURES, [])})
    images, delta, classes = attacked(torch.from_numpy(rows))
    widest = ball.eps if ball.norm == "linf" else float(delta.abs().max())
    shown = delta / (2 * max(widest, 1e-12)) + 0.5
    return pa.table(
        {
            **table,
            "attacked": classes.tolist(),
            "attack": [ATTACK] * len(rows),
            "distance": ball.norm_of(delta).double().tolist(),
            "image": [png(image) for image in images],
            "adversarial": [png(image) for image in images + delta],
            "perturbation": [png(image) for image in shown],
        }
    )


_PICTURES = ("attacked", "attack", "distance", "image", "adversarial", "perturbation")


def png(image: Tensor) -> bytes:
    """A (c, h, w) image in [0, 1] as PNG, grey or in colours."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    picture = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels[:3], 0, -1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def _chosen(results: StageResults) -> np.ndarray:
    """Up to ten images, of different classes as far as possible, in order."""
    right = results.clean.nonzero()[0]
    _, first = np.unique(results.labels[right], return_index=True)
    ours = right[np.sort(first)][:SHOWN]
    more = np.setdiff1d(right, ours)[: SHOWN - len(ours)]
    return np.sort(np.concatenate([ours, more]))
