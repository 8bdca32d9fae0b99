"""The evaluation record: what is written is read again, from its file or from metrics alone."""

from __future__ import annotations

import json
import math

import pytest

from raytrain.core.threat_models import Linf
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import wilson
from raytrain.evaluation.contract import Contract
from raytrain.evaluation.record import (
    EvaluationRecord,
    RecordedContract,
    checks_tag,
    is_of_last,
    metrics_by_scope,
    scope_of,
)

TRAINED = Contract.of(Linf(eps=0.1), (0.5,), (0.25,))
OTHER = Contract.of(Linf(eps=1e-5), (0.5,), (0.25,))


def record(scope: str, other: bool = False, **changes: object) -> EvaluationRecord:
    values: dict[str, object] = {
        "scope": scope,
        "checkpoint": "last" if is_of_last(scope) else "best",
        "epoch": 3,
        "contract": RecordedContract.of(OTHER if other else TRAINED),
        "same_contract": not other,
        "images": 397,
        "accuracies": {"clean": wilson(380, 397), "pgd20": wilson(97, 397), "aa": wilson(96, 397)},
        "findings": (Finding("range", True, "Fine.", math.inf),),
        "trusted": True,
        "fe": 10**12,
        "seconds": 0.1,
        "hardware": "one CPU",
        "versions": {"torch": "2"},
        "key": {"weights": "w", "seed": 0, "versions": {"torch": "2"}},
        "seed": 0,
    }
    return EvaluationRecord.model_validate({**values, **changes})


def test_a_written_record_is_read_as_it_was() -> None:
    written = record("test")
    text = json.dumps(written.model_dump(mode="json"))
    assert EvaluationRecord.model_validate_json(text) == written
    later = json.dumps({**json.loads(text), "of a later version": 1})
    assert EvaluationRecord.model_validate_json(later) == written


@pytest.mark.parametrize("checkpoint", ["best", "last"])
@pytest.mark.parametrize("images", [None, 397])
@pytest.mark.parametrize("other", [False, True])
def test_metrics_alone_give_scope_counts_and_threat_model(
    checkpoint: str, images: int | None, other: bool
) -> None:
    scope = scope_of(checkpoint, images, OTHER if other else TRAINED, TRAINED)
    written = record(scope, other)
    found = metrics_by_scope({**written.metrics(), "valid/clean": 1.0, "tested/aa": 1.0})
    assert list(found) == [scope] and is_of_last(scope) is (checkpoint == "last")
    read = EvaluationRecord.from_metrics(scope, found[scope])
    assert read is not None and read.accuracies == written.accuracies
    assert (read.checkpoint, read.images) == (checkpoint, 397)
    assert read.same_contract is not other and read.trusted is None
    assert not other or (
        read.contract and (read.contract.norm, read.contract.eps) == ("linf", 1e-5)
    )


@pytest.mark.parametrize("failed", [[], ["modes"], ["modes", "black_box (test_1000)"]])
def test_the_tag_of_the_checks_names_what_failed(failed: list[str]) -> None:
    metrics = metrics_by_scope(record("test").metrics())["test"]
    read = EvaluationRecord.from_metrics("test", metrics, checks_tag(failed))
    assert read is not None and read.trusted is (not failed)
    assert [finding.check for finding in read.failed] == failed


def test_a_record_that_is_not_trusted_has_failed_whatever_it_names() -> None:
    assert [one.check for one in record("test", trusted=False).failed] == ["trusted"]
    named = (Finding("modes", False, "No."),)
    assert record("test", trusted=False, findings=named).failed == list(named)
