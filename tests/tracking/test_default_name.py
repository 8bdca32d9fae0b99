"""Names of runs that are given none: what they say, and that equal ones are told apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.tracking import tracked
from raytrain.tracking.default_name import LONGEST, default_name


def marked(run: RunConfig, name: str) -> str:
    return f"{name}-{run.signature()[:6]}"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "pgd-digits"),
        ({"outer": "awp"}, "pgd-awp-digits"),
        ({"data": "images/faces.parquet", "algorithm": "n_fgsm"}, "n_fgsm-faces"),
        ({"algorithm": {"name": "dynamic", "preset": "paper"}}, "dynamic-paper-digits"),
        ({"algorithm": {"name": "dynamic", "c_max": 0.3}, "epochs": 30, "seed": 1},
         "dynamic-digits-c_max0.3-seed1-epochs30"),
        ({"data": "cifar10", "model": "resnet18", "threat": {"eps": "4/255"}},
         "pgd-cifar10-model_resnet18-eps4_255"),
        ({"data": "cifar10", "threat": {"eps": "8/255"}}, "pgd-cifar10"),
        ({"threat": {"norm": "l2", "eps": 0.5}}, "pgd-digits-norm_l2-eps0.5"),
        ({"sentinels": None, "algorithm": {"step_size": "eps/8"}},
         "pgd-digits-step_size_eps_8-sentinels_none"),
    ],
)  # fmt: skip
def test_a_name_has_algorithm_outer_update_data_and_what_differs_from_the_defaults(
    values: dict[str, Any], name: str
) -> None:
    assert default_name(as_run(values)) == name


def test_what_does_not_change_the_result_is_not_in_the_name() -> None:
    run = as_run({"workers": 2, "device": "cpu", "storage": "/x", "data": {"root": "/y"}})
    assert default_name(run) == "pgd-digits"


def test_a_number_that_is_rounded_is_told_apart_by_the_signature() -> None:
    one, other = (as_run({"optimizer": {"lr": lr}}) for lr in (0.123456, 0.123457))
    assert default_name(one) == marked(one, "pgd-digits-lr0.1235")
    assert default_name(other) == marked(other, "pgd-digits-lr0.1235")


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": {"lr": 0.05, "momentum": 0.8}, "epochs": 40, "batch_size": 256, "ema": 0.9},
        {"data": "/far/" + "long" * 30 + ".parquet"},
        {"model": "torchvision:resnet34", "data": "a b'c\"d;$(e).parquet"},
        {"model": {"name": "mine:net", "kwargs": {"activation": "two words", "width": 3}}},
    ],
)
def test_a_name_is_short_and_needs_no_quotes(values: dict[str, Any]) -> None:
    run = as_run(values)
    name = default_name(run)
    assert len(name) <= LONGEST and re.fullmatch(r"[A-Za-z0-9._-]+", name)
    assert default_name(as_run(run.model_dump(mode="json"))) == name


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")
def test_equal_names_in_an_experiment_are_numbered(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with tracked(store, "e", tmp_path / "outbox.jsonl") as tracker:
        names = []
        for handle in ("a_b", "axb", "again", "more"):
            names.append(tracker.unused_name("axb" if handle == "axb" else "a_b"))
            tracker.open(handle, names[-1], {}, {})
            run_id = tracker.run_id(handle)
            assert run_id is not None and tracker.run_name(run_id) == names[-1]
    assert names == ["a_b", "axb", "a_b-2", "a_b-3"]
    with tracked(store, "another", tmp_path / "second.jsonl") as tracker:
        assert tracker.unused_name("a_b") == "a_b"
