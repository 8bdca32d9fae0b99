"""Results as a table and as shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raytrain.evaluation.checks import Finding, after
from raytrain.evaluation.confidence import Share, wilson
from raytrain.evaluation.runner import StageResults
from raytrain.evaluation.settings import (
    CLEAN,
    NOISE,
    EvaluationSettings,
    stages_of,
    standard_stage,
)


def flags_table(settings: EvaluationSettings, results: StageResults) -> pa.Table:
    """One row per image: `index`, `label`, `predicted`, `clean`, a flag per attack (true: survived;
    false also where `clean` is), and AutoAttack's stages, null where an image had fallen before."""
    columns: dict[str, pa.Array] = {
        "index": pa.array(np.arange(len(results.labels))),
        "label": pa.array(results.labels.astype(np.int64)),
        "predicted": pa.array(results.predicted.astype(np.int64)),
        CLEAN: pa.array(results.clean),
    }
    for attack in settings.names:
        columns[attack] = pa.array(results.survived(stages_of(attack)))
    for stage, values in results.by_stage.items():
        if standard_stage(stage) is not None:
            columns[stage] = pa.array(values == 1, mask=values < 0)
    return pa.table(columns)


def accuracies(settings: EvaluationSettings, results: StageResults) -> dict[str, Share]:
    """The share of images that are classified correctly, and under each attack, with 95 % limits."""
    images = len(results.labels)
    shares = {CLEAN: wilson(int(results.clean.sum()), images)}
    for attack in settings.names:
        shares[attack] = wilson(int(results.survived(stages_of(attack)).sum()), images)
    return shares


def findings_after(settings: EvaluationSettings, results: StageResults) -> list[Finding]:
    """The checks that need attack results."""
    if not settings.checks:
        return []
    white = results.survived(settings.with_gradients)
    black = {
        name.removeprefix("aa."): results.by_stage[name] != 0
        for name in (NOISE, "aa.square")
        if name in results.by_stage
    }
    return after(white, black)
