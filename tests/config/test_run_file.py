"""A complete run file is the run it was made of, with nothing left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from raytrain.algorithms import RECIPES
from raytrain.config.field_list import fields_of
from raytrain.config.json_schema import run_schema
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.config.run_file import complete_run_file
from raytrain.core.errors import RequestError
from raytrain.outer import OUTERS

NESTED: dict[str, Any] = {
    "name": "nested",
    "attack": {
        "steps": 2,
        "step_size": "eps/2",
        "bn": "eval",
        "stop": {"kind": "gap", "c_max": 1},
    },
    "objective": "trades",
}


def assert_same(run: RunConfig, file: Path) -> None:
    text = complete_run_file(run)
    file.write_text(text, encoding="utf-8")
    again = as_run(file)
    assert again == run and again.signature() == run.signature()
    assert complete_run_file(again) == text
    values = yaml.safe_load(text)
    assert [error.message for error in Draft7Validator(run_schema()).iter_errors(values)] == []
    for field in fields_of(run):
        inner: Any = values
        for key in field.path.split(".") if field.there else ():
            assert key in inner, field.path
            inner = inner[key]


@pytest.mark.parametrize("name", RECIPES.own)
def test_it_is_read_as_the_same_run_with_every_algorithm_and_outer_update(
    name: str, tmp_path: Path
) -> None:
    algorithm = NESTED if name == "nested" else name
    made = 0
    for outer in OUTERS.own:
        try:
            run = as_run({"algorithm": algorithm, "outer": outer})
        except RequestError:  # they do not go together
            continue
        made += 1
        assert_same(run, tmp_path / "run.yaml")
    assert made >= 2


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"threat": {"norm": "l2", "eps": 0.5}, "data": "cifar10"},
        {
            "threat": {"norm": "l1", "eps": 12},
            "model": {"name": "m:f", "kwargs": {"a": [1, 1e-5]}},
        },
        {"algorithm": {"name": "dynamic", "preset": "official", "c_max": float("inf")}},
        {"algorithm": {"name": "dynamic", "decay": "cosine"}, "early_stop": 3, "ema": 1e-5},
        {"outer": {"name": "sam", "then": {"name": "engm", "quantile": 0.5}}, "sentinels": None},
        {"curriculum": {"eps": {"start": 0, "end": "8/255"}, "step_size": {"start": "eps"}}},
        {"sentinels": {"stop": {"zero_grad": 0.5}}, "optimizer": {"schedule": "piecewise"}},
        {"model": {"name": "m:f", "kwargs": {"text": "a: #b\nc", "no": None, "3": True}}},
    ],
)
def test_it_is_read_as_the_same_run_whatever_is_set(
    values: dict[str, Any], tmp_path: Path
) -> None:
    assert_same(as_run(values), tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text",
    ["007", "no", "null", "~", "a: b #c", "[x", "'", '"', "é", "2026-11-27", " x ", "1:30", "\\n"],
)
def test_text_is_kept_letter_by_letter(text: str, tmp_path: Path) -> None:
    run = as_run({"run_name": text, "data": f"{text}.parquet", "storage": text})
    assert_same(run, tmp_path / "run.yaml")


def test_fields_of_records_that_the_run_lacks_are_comments() -> None:
    lines = complete_run_file(as_run(None)).splitlines()
    assert [line for line in lines if line.startswith("early_stop: null")]
    assert [line for line in lines if line.startswith("#   patience: ...")]
    assert [line for line in lines if line.startswith("#     start: ...")]
    assert [line for line in lines if line.startswith("  eps: 0.1") and "# radius" in line]


def test_what_differs_from_a_default_names_it() -> None:
    text = complete_run_file(as_run({"epochs": 3}))
    (line,) = [line for line in text.splitlines() if line.startswith("epochs: ")]
    assert line.endswith("# passes over the training images; int > 0; default 15")
