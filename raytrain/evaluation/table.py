"""Verdicts as a table and as shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raytrain.evaluation.checks import Finding, after
from raytrain.evaluation.confidence import Share, wilson
from raytrain.evaluation.runner import Verdicts
from raytrain.evaluation.settings import (
    CLEAN,
    NOISE,
    EvaluationSettings,
    stages_of,
    standard_stage,
)


def flags_table(exam: EvaluationSettings, verdicts: Verdicts) -> pa.Table:
    """One row per image: `index`, `label`, `predicted`, `clean`, a flag per attack (true: survived;
    false also where `clean` is), and AutoAttack's stages, null where an image had fallen before."""
    columns: dict[str, pa.Array] = {
        "index": pa.array(np.arange(len(verdicts.labels))),
        "label": pa.array(verdicts.labels.astype(np.int64)),
        "predicted": pa.array(verdicts.predicted.astype(np.int64)),
        CLEAN: pa.array(verdicts.clean),
    }
    for attack in exam.names:
        columns[attack] = pa.array(verdicts.survived(stages_of(attack)))
    for stage, values in verdicts.by_stage.items():
        if standard_stage(stage) is not None:
            columns[stage] = pa.array(values == 1, mask=values < 0)
    return pa.table(columns)


def accuracies(exam: EvaluationSettings, verdicts: Verdicts) -> dict[str, Share]:
    """The share of images that are classified correctly, and under each attack, with 95 % limits."""
    images = len(verdicts.labels)
    shares = {CLEAN: wilson(int(verdicts.clean.sum()), images)}
    for attack in exam.names:
        shares[attack] = wilson(int(verdicts.survived(stages_of(attack)).sum()), images)
    return shares


def findings_after(exam: EvaluationSettings, verdicts: Verdicts) -> list[Finding]:
    """The checks that need verdicts."""
    if not exam.checks:
        return []
    white = verdicts.survived(exam.with_gradients)
    black = {
        name.removeprefix("aa."): verdicts.by_stage[name] != 0
        for name in (NOISE, "aa.square")
        if name in verdicts.by_stage
    }
    return after(white, black)
