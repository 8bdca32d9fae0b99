"""The list of fields is what a run has: all of its values, and what each may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from raytrain.algorithms import RECIPES
from raytrain.attacks import INITS, STOPPINGS
from raytrain.config.field_list import (
    RunField,
    all_paths,
    below,
    fields_of,
    fields_with,
    fraction_text,
)
from raytrain.config.request import as_run, override, parse_overrides
from raytrain.core.errors import RequestError
from raytrain.core.losses import LOSSES
from raytrain.core.registry import Registry
from raytrain.core.schedules import SHAPES
from raytrain.core.threat_models import THREAT_MODELS
from raytrain.outer import OUTERS

ATTACK = "algorithm.attack={steps: 2, step_size: eps/2, bn: eval}"


def of(*words: str) -> dict[str, RunField]:
    """The fields of the run of these words, by path."""
    return {one.path: one for one in fields_with(override({}, parse_overrides(words)))}


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a run by path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


@pytest.mark.parametrize(
    "words",
    [
        "",
        "threat=l2 threat.eps=1",
        "early_stop=3 curriculum.eps.start=0 data=cifar10 sentinels.stop.fgsm_gap=0.3",
        "sentinels=null outer=awp outer.then=clip performance=eager",
        *(f"algorithm={name}" for name in RECIPES.own if name != "nested"),
        *(f"outer={name}" for name in OUTERS.own),
    ],
)
def test_a_run_has_exactly_the_listed_values(words: str) -> None:
    run = as_run(None, words.split())
    listed = {one.path: one.value for one in fields_of(run) if one.there}
    held = dict(leaves(run.model_dump(mode="json")))
    assert {path: value for path, value in listed.items() if path in held} == held
    records = {path for path in listed if path not in held}
    assert all(any(path.startswith(f"{one}.") for path in held) for one in records)


def test_of_the_default_run_nothing_is_changed_and_all_is_the_default() -> None:
    for one in fields_of(as_run(None)):
        assert not one.changed, one.path
        assert one.required or not one.there or one.value == one.default


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("epochs=3 ema=0.9", {"epochs", "ema"}),
        ("epochs=15", set()),
        ("data=cifar10", {"data", "data.name"}),  # and not the radius, customary for it
        ("data=cifar10 threat.eps=0.1", {"data", "data.name", "threat.eps"}),
        ("algorithm=dynamic", {"algorithm", "algorithm.name"}),
        ("algorithm=pgd algorithm.steps=3", {"algorithm.steps"}),
        ("algorithm.start=zero", {"algorithm.start", "algorithm.start.kind"}),
        (
            "algorithm=dynamic algorithm.preset=official",  # and not what the preset sets
            {"algorithm", "algorithm.name", "algorithm.preset"},
        ),
        (
            "algorithm=dynamic algorithm.decay=cosine",  # and not cosine's own end
            {"algorithm", "algorithm.name", "algorithm.decay", "algorithm.decay.kind"},
        ),
        (
            "algorithm=dynamic algorithm.decay.exponent=2",  # a new record: its end is power's
            {"algorithm", "algorithm.name", "algorithm.decay.exponent", "algorithm.decay.end"},
        ),
        ("threat=l2 threat.eps=1", {"threat", "threat.norm", "threat.eps"}),
        ("early_stop=3", {"early_stop.patience"}),
        ("sentinels=null", {"sentinels"}),
        ("curriculum.eps.start=0", {"curriculum.eps.start"}),
    ],
)
def test_what_differs_from_the_defaults_of_the_chosen_parts_is_changed(
    words: str, changed: set[str]
) -> None:
    assert {one.path for one in fields_of(as_run(None, words.split())) if one.changed} == changed


def test_fields_tell_type_range_and_choices() -> None:
    fields = of("algorithm=dynamic", "optimizer.schedule=piecewise")
    said = {path: field.values for path, field in fields.items()}
    assert said["epochs"] == "int > 0"
    assert said["ema"] == "float > 0, < 1 or null"
    assert said["threat.eps"] == "float >= 0 or 8/255"
    assert said["algorithm.step_size"] == "float > 0 or eps/4"
    assert said["device"] == "auto | cpu | cuda"
    assert said["algorithm.preset"] == "paper | official | null"
    assert said["optimizer.schedule.milestones"] == "list of float > 0, <= 1"
    assert said["outer"] == "sgd | clip | engm | awp | sam | module:Class"
    assert said["early_stop"] == "int > 0 or null"
    assert said["registry"] == "bool"
    assert fields["algorithm"].choices == list(RECIPES)
    assert (fields["ema"].type, fields["ema"].range) == ("float or null", "> 0, < 1")
    assert fields["early_stop.patience"].required and not fields["early_stop.patience"].there


def test_missing_fields_are_listed_as_required_and_wrong_ones_are_refused() -> None:
    assert of("threat=l2")["threat.eps"].required
    nested = of("algorithm=nested")
    assert nested["algorithm.attack.bn"].required and nested["algorithm.attack.bn"].there
    assert not nested["algorithm.attack.compact"].required
    assert of("algorithm=nested", ATTACK)["algorithm.attack.steps"].value == 2
    for words in ("epoch=3", "epochs=many", "threat=l2 threat.norm=l3", "ema=2"):
        with pytest.raises(RequestError, match=r"^(epoch|epochs|threat|threat.norm|ema): "):
            of(*words.split())


def test_a_path_is_a_field_or_a_group() -> None:
    fields = fields_of(as_run(None))
    assert [one.path for one in below(fields, "epochs")] == ["epochs"]
    assert [one.path for one in below(fields, "threat")] == ["threat", "threat.norm", "threat.eps"]
    assert [one.path for one in below(fields, "curriculum.eps.until")] == ["curriculum.NAME.until"]
    assert len(below(fields, "algorithm.start")) == 3


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("trainsize", "trainsize: no such field; the nearest is data.train_size"),
        ("algorithm.c_max", "no such field of algorithm pgd; dynamic has it: algorithm=dynamic"),
        (
            "algorithm.decay.factor",
            "of algorithm pgd; dynamic has it: algorithm=dynamic algorithm.decay=",
        ),
        ("optimizer.schedule.milestones", "piecewise has it: optimizer.schedule=piecewise"),
        (
            "algorithm.beta",
            "algorithm pgd; trades, mart and l2l have it: algorithm=trades",
        ),
        ("algorithm.betta", "the nearest is algorithm.beta with algorithm=trades, "),
        ("zzz", "zzz: no such field; expected one of data, model, threat, algorithm"),
        ("epochs.first", "epochs.first: no such field; the nearest is epochs"),
        ("", ": no such field; expected one of data"),
    ],
)
def test_an_unknown_path_is_answered_with_the_kind_that_has_it_or_the_nearest(
    path: str, sentence: str
) -> None:
    with pytest.raises(RequestError) as caught:
        below(fields_of(as_run(None)), path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_fields_of_every_kind_have_a_path() -> None:
    paths = all_paths()
    for registry, holder in ((RECIPES, "algorithm"), (OUTERS, "outer"), (THREAT_MODELS, "threat")):
        for part in registry.own.values():
            assert {f"{holder}.{name}" for name in part.model_fields} <= paths.keys()


@pytest.mark.parametrize(
    "registry", [RECIPES, OUTERS, THREAT_MODELS, INITS, STOPPINGS, SHAPES, LOSSES]
)
def test_every_field_of_a_part_has_a_description(registry: Registry[Any]) -> None:
    for part in registry.own.values():
        bare = [name for name, field in part.model_fields.items() if not field.description]
        assert set(bare) <= {registry.key}, part


def test_every_field_of_a_run_has_a_description() -> None:
    bare = [one.path for one in fields_of(as_run(None)) if not one.description]
    assert bare == ["curriculum.NAME"]


def test_fractions_are_shown_in_pixel_units_only() -> None:
    fields = of(
        "algorithm=dynamic", "outer=engm", "algorithm.start=gaussian", "curriculum.eps.start=0"
    )
    with_fraction = {path for path, one in fields.items() if "8/255" in one.type}
    assert with_fraction == {
        "threat.eps",
        "evaluation.eps",
        "algorithm.start.std",
        "curriculum.eps.start",
        "curriculum.eps.end",
    }
    assert fields["algorithm.c_max"].type == fields["outer.alpha"].type == "float"
    assert fields["algorithm.c_max"].shown(8 / 255) == str(8 / 255)
    run = as_run(None, ["algorithm=dynamic", "algorithm.c_max=1/4"])
    assert run.algorithm.model_dump()["c_max"] == 0.25


def test_fractions_of_255_are_written_as_such_where_that_is_shorter() -> None:
    for level in range(256):
        text = fraction_text(level / 255)
        numerator, _, denominator = text.partition("/")
        assert float(numerator) / float(denominator or 1) == level / 255
        assert ("/" in text) == (level % 51 != 0)
    assert fraction_text(0.1) == "0.1" and fraction_text(float("inf")) == "inf"
