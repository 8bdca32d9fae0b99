"""A study that takes seconds, and records that are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.problem import Problem, Task, read_problem
from benchmarks.study.records import Record
from benchmarks.study.schedule import Schedule

TINY: dict[str, Any] = {
    "title": "Two methods on 60 digits",
    "base": {
        "data": {"name": "digits", "validation": 40, "train_size": 60},
        "threat": {"norm": "linf", "eps": 0.1},
        "batch_size": 20,
        "evaluation": {"steps": 2, "every": 2},
    },
    "methods": {
        "fgsm_rs": {"space": "fgsm_rs"},
        "pgd": {"space": "pgd", "fixed": {"algorithm.steps": 2}},
    },
    "tuning": {"trials": 2, "fe_per_image": 10},
    "budgets": [20],
    "seeds": 2,
    "evaluations": [
        {"attacks": "fgsm,pgd", "steps": 3, "images": 30, "batch_size": 10, "checks": False}
    ],
    "questions": [
        {"claim": "Does it?", "source": "here", "method": "pgd", "against": ["fgsm_rs"]}
    ],
}


def tiny_file(folder: Path, **changes: Any) -> Path:
    """The file of a problem called `tiny`."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, **changes}))
    return file


def tiny(folder: Path, **changes: Any) -> Problem:
    """The same, read."""
    return read_problem(str(tiny_file(folder, **changes)))


def record_of(
    schedule: Schedule,
    task: Task,
    robust: float | None = 0.5,
    survived: Sequence[bool] = (),
    state: str = "finished",
    metrics: Mapping[str, float] | None = None,
    cost: float | None = None,
) -> Record:
    """The record of a task; with `survived` it was evaluated under PGD, on images that all are clean."""
    count, run = len(survived), schedule.config(task)
    share = {"value": sum(survived) / max(1, count), "low": 0.0, "high": 1.0}
    share |= {"count": sum(survived), "images": count}
    result = {
        "scope": f"test_{count}",
        "checkpoint": "best",
        "images": count,
        "accuracies": {"clean": {**share, "value": 1.0, "count": count}, "pgd20": share},
    }
    images = task.budget if cost is None else cost
    return Record(
        **vars(task),
        signature=run.signature(),
        state=state,
        began=len(task.key),
        epochs=2,
        train_images=60,
        valid_images=40,
        fe_per_image=images,
        seconds=1.0,
        valid_clean=0.9,
        valid_robust=robust,
        metrics={"cost/fe": 60 * images, "valid/robust": robust or 0.0, **(metrics or {})},
        curves={"valid/robust": {2: robust or 0.0}, "cost/samples": {1: 60.0, 2: 120.0}},
        params={"algorithm.name": task.method, "seed": str(task.seed), "budget": str(task.budget)},
        tags={"contract": "c1"},
        evaluation_seconds=2.0 if count else None,
        result=result if count else None,
        image=list(range(count)),
        label=[k % 10 for k in range(count)],
        predicted=[k % 10 for k in range(count)],
        flags={"clean": [True] * count, "pgd20": list(survived)} if count else {},
    )
