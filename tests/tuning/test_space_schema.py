"""The JSON Schema of search spaces accepts the ones there are, and no dimensions that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from raytrain.tuning.space.json_schema import space_schema

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
VALID = Draft7Validator(space_schema())


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(space_schema())


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_every_search_space_is_valid(file: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert [error.message for error in VALID.iter_errors(values)] == []
    space = values["space"]
    assert not VALID.is_valid({**values, "space": {**space, "epochs": {"flaot": [1, 2]}}})
    assert not VALID.is_valid({**values, "base": {**values["base"], "epoch": 3}})


@pytest.mark.parametrize(
    "entry",
    [
        {"float": [0, 1], "log": True, "unit": "eps", "when": {"algorithm.name": ["pgd"]}},
        {"float": ["1/8", 0.5], "step": "1/8", "also": [-1, None, "eps"]},
        {"int": [1, 9], "step": 2, "when": "algorithm.steps > 3"},
        {"choice": ["a", 1, None, True]},
        {"branch": {"pgd": {"algorithm.steps": {"int": [1, 2]}}, "trades": {}}},
        {"derive": "$reach * threat.eps"},
        [{"int": [1, 2], "when": {"ema": None}}, {"choice": [3]}],
    ],
    ids=str,
)
def test_every_kind_of_dimension_is_valid(entry: Any) -> None:
    for path in ("algorithm.steps", "$reach", "another"):
        assert VALID.is_valid({"space": {path: entry}})


@pytest.mark.parametrize(
    "entry",
    [
        {},
        3,
        [],
        {"float": [0]},
        {"float": [0, 1, 2]},
        {"float": ["low", 1]},
        {"int": [0.5, 2]},
        {"int": [1, 2], "float": [1, 2]},
        {"int": [1, 2], "unit": "eps"},
        {"choice": []},
        {"choice": [[1]]},
        {"branch": {"pgd": {"algorithm.steps": {"int": [1]}}}},
        [{"int": [1]}],
    ],
    ids=str,
)
def test_no_other_is(entry: Any) -> None:
    for path in ("algorithm.steps", "$reach", "another"):
        assert not VALID.is_valid({"space": {path: entry}})


def test_the_fields_of_every_algorithm_are_offered_as_paths() -> None:
    offered = space_schema()["properties"]["space"]["properties"]
    assert {"algorithm.name", "algorithm.c_max", "algorithm.decay.end", "optimizer.lr"} <= set(
        offered
    )
    assert offered["optimizer.lr"]["description"] == "peak learning rate"
