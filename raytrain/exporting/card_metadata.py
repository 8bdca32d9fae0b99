"""The YAML at the head of a model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from raytrain.evaluation.names import attack_title
from raytrain.evaluation.record import EvaluationRecord
from raytrain.exporting.robustbench import eps_text
from raytrain.exporting.subject import Subject

_ON_THE_HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "svhn": "ufldl-stanford/svhn",
}


def front_matter(subject: Subject, formats: Iterable[str], licence: str) -> str:
    """From `---` to `---`. Without an evaluation there are no results, rather than empty ones."""
    run, hub = subject.run, _ON_THE_HUB.get(subject.data)
    values: dict[str, Any] = {
        "license": licence,
        "library_name": "raytrain",
        "pipeline_tag": "image-classification",
        "tags": [
            "adversarial-training",
            "adversarial-robustness",
            run.threat.norm,
            run.algorithm.name,
            *formats,
        ],
    }
    if hub is not None:
        values["datasets"] = [hub]
    values["metrics"] = ["accuracy"]
    found = [_result(subject, one) for one in subject.record.evaluations if one.accuracies]
    if found:
        values["model-index"] = [{"name": subject.name, "results": found}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _result(subject: Subject, found: EvaluationRecord) -> dict[str, Any]:
    threat = subject.run.threat
    norm = threat.norm if found.contract is None else found.contract.norm
    eps = threat.eps if found.contract is None else found.contract.eps
    believed = " (FAILED CHECKS, do not rely on it)" if found.failed else ""
    metrics = []
    for name, got in found.accuracies.items():
        under = f"accuracy under {attack_title(name)}, {norm} eps {eps_text(norm, eps)}"
        what = "clean accuracy" if name == "clean" else under
        metrics.append({"type": "accuracy", "value": round(got.value, 6), "name": what + believed})
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "type": _ON_THE_HUB.get(subject.data, subject.data),
            "name": subject.data,
            "split": "test",
        },
        "metrics": metrics,
    }
