"""The JSON Schema of run files accepts what a run does, and refuses what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft7Validator

from raytrain.algorithms import RECIPES
from raytrain.config.json_schema import run_schema
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.outer import OUTERS

VALID = Draft7Validator(run_schema())


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(run_schema())


@pytest.mark.parametrize(
    "values",
    [
        {},
        *({"algorithm": name} for name in RECIPES.own if name != "nested"),
        *({"outer": name} for name in OUTERS.own),
        *({"outer": {"name": name}} for name in OUTERS.own),
        {"algorithm": {"steps": 3}},  # of the default kind
        {"algorithm": {"name": "dynamic", "decay": {"end": 0.5}, "start": "zero"}},
        {"threat": "linf"},
        {"threat": {"norm": "linf"}},
        {"threat": {"eps": "8/255"}},
        {"threat": {"norm": "l2", "eps": "128/255"}},
        {"data": "cifar10", "model": "resnet18", "performance": "eager"},
        {"data": {"name": "images.parquet", "validation": 100}},
        {"early_stop": 3},
        {"early_stop": {"patience": 3}},
        {"sentinels": None},
        {"sentinels": {"stop": None}},
        {"sentinels": {"stop": {"fgsm_gap": "1/3"}}},
        {"outer": {"name": "awp", "then": "clip"}},
        {"outer": {"name": "awp", "then": {"max_norm": 2, "name": "clip"}}},
        {"optimizer": {"schedule": "piecewise"}},
        {"optimizer": {"schedule": {"peak": 0.3}}},
        {"curriculum": {"eps": {"start": 0, "end": "eps/2"}}},
        {"fe_per_image": 100, "ema": None, "evaluation": {"step_size": "1.25*eps", "eps": 0}},
    ],
    ids=str,
)
def test_what_a_run_accepts_is_valid(values: dict[str, Any]) -> None:
    as_run(values)
    assert [error.message for error in VALID.iter_errors(values)] == []


@pytest.mark.parametrize(
    "values",
    [
        {"epoch": 3},
        {"epochs": 0},
        {"epochs": 2.5},
        {"epochs": True},
        {"ema": 1},
        {"algorithm": "dynamc"},
        {"algorithm": {"c_max": 1}},  # not of the default kind
        {"algorithm": {"name": "pgd", "c_max": 1}},
        {"algorithm": "nested", "seed": -1},
        {"algorithm": {"name": "nested"}},
        {"algorithm": {"decay": "power"}},
        {"threat": {"norm": "l2"}},
        {"threat": {"norm": "l3", "eps": 1}},
        {"threat": {"eps": "many"}},
        {"threat": {"eps": -1}},
        {"optimizer": {"lr": -1}},
        {"optimizer": {"schedule": {"milestones": [0.5]}}},
        {"outer": {"name": "awp", "then": {"max_norm": 2}}},
        {"data": {"size": 1}},
        {"performance": "fast"},
        {"sentinels": {"stop": {"fgsm_gap": 2}}},
        {"curriculum": {"eps": {}}},
        {"evaluation": {"step_size": "8 pixels"}},
        {"device": None},
    ],
    ids=str,
)
def test_what_a_run_refuses_is_not_valid(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        as_run(values)
    assert not VALID.is_valid(values)


def test_classes_of_other_packages_have_any_fields() -> None:
    assert VALID.is_valid({"algorithm": "mypackage.module:Recipe"})
    assert VALID.is_valid({"algorithm": {"name": "mypackage.module:Recipe", "share": 0.5}})
    assert not VALID.is_valid({"optimizer": {"schedule": "mypackage.module:Shape"}})


def test_parts_are_chosen_by_their_name() -> None:
    strings, _, records = run_schema()["properties"]["algorithm"]["anyOf"]
    assert strings["enum"] == list(RECIPES)
    mapping = records["discriminator"]["mapping"]
    assert set(RECIPES.own) <= mapping.keys()
    for name, ref in mapping.items():
        definition = run_schema()["$defs"][ref.rpartition("/")[2]]
        assert definition["properties"]["name"]["const"] == name
        assert {"$ref": ref} in records["oneOf"]
        assert ("name" in definition.get("required", ())) == (name != "pgd")
