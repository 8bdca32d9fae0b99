"""What makes no sense is refused when the configuration is read, with the reason; the rest composes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from raytrain.algorithms import RECIPES
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.outer import OUTERS, Awp, Clip, Engm, Plain

NAMES = [name for name in RECIPES if name != "nested"]

AT_PRESENT_WEIGHTS = {"free", "yopo", "gradalign"}
"""Algorithms whose weight gradient cannot be measured at other weights."""


def refusal(**changes: Any) -> str:
    with pytest.raises(RequestError) as caught:
        as_run(None, {path.replace("__", "."): value for path, value in changes.items()})
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("outer", OUTERS.own)
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_of_algorithm_and_outer_is_a_run_or_is_refused_with_its_reason(
    name: str, outer: str
) -> None:
    if OUTERS[outer].model_validate({}).displaces_weights and name in AT_PRESENT_WEIGHTS:
        said = refusal(algorithm=name, outer=outer)
        assert said.startswith(f"outer: {outer} does not go with {name}: ")
        assert said.endswith("expected sgd, clip or engm")
    else:
        as_run(None, {"algorithm": name, "outer": outer})


@pytest.mark.parametrize(
    ("mode", "outer", "reason"),
    [
        ("C", "awp", "one pass"),
        ("J", "awp", "one pass"),
        ("T", "awp", "table"),
        ("C", "engm", "not a mean over samples"),
        ("T", "engm", "table"),
    ],
)
def test_si_hg_s_modes_refuse_what_they_cannot_do(mode: str, outer: str, reason: str) -> None:
    fields = {"name": "si_hg", "mode": mode}
    said = refusal(algorithm=fields, outer=outer)
    assert said.startswith(f"outer: {outer} does not go with si_hg") and reason in said


def test_a_simultaneous_ssds_refuses_awp() -> None:
    said = refusal(algorithm={"name": "ssds", "order": "jacobi"}, outer="awp")
    assert "one pass" in said
    as_run(None, {"algorithm": {"name": "ssds", "order": "w_first"}, "outer": "awp"})


def test_awp_passes_on_what_its_own_update_would_be_refused_for() -> None:
    then = {"name": "awp", "then": "engm"}
    as_run(None, {"algorithm": "pgd", "outer": then})
    assert "does not go" in refusal(algorithm={"name": "si_hg", "mode": "C"}, outer=then)
    assert Awp(then=Engm()).weighs_samples and not Awp(then=Clip()).weighs_samples
    assert not Plain().displaces_weights


def test_l2l_has_no_l1_and_says_why() -> None:
    said = refusal(algorithm="l2l", threat={"norm": "l1", "eps": 3})
    assert said.startswith("threat.norm: l2l is not defined in l1") and "linf or l2" in said


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"name": "si_hg", "mode": "B", "store": "none"}, "store=per_sample"),
        ({"name": "si_hg", "mode": "J", "m": 2}, "m=1"),
        ({"name": "si_hg", "ascent": "raw", "sigma": "eps/2"}, "pixel^2 per nat"),
        ({"name": "l2l", "init": "pgd"}, "features=sign"),
        ({"name": "l2l", "start": "remembered"}, "keeps no perturbation"),
        ({"name": "yopo", "start": "remembered"}, "keeps no perturbation"),
        ({"name": "gradalign", "start": "remembered"}, "keeps no perturbation"),
        ({"name": "mart", "label_smoothing": 0.1}, "no such field"),
        ({"name": "pgd", "label_smoothing": 1.0}, "less than 1"),
        ({"name": "dynamic", "preset": "offical"}, "official"),
        ({"name": "dynamic", "attack_bn": "train"}, "compact=true"),
        ({"name": "trades", "beta": -1}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_named(algorithm: Any, words: str) -> None:
    said = refusal(algorithm=algorithm)
    assert said.startswith("algorithm") and words in said


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        ({"name": "engm", "alpha": 0}, "greater than 0"),
        ({"name": "engm", "mode": "normalise", "alpha": "inf"}, "finite alpha"),
        ({"name": "awp", "then": {"name": "awp"}}, "expected sgd, clip or engm"),
        ({"name": "clip", "max_norm": 0}, "greater than 0"),
        ("egm", "engm"),
    ],
    ids=str,
)
def test_outer_updates_are_checked_too(outer: Any, words: str) -> None:
    said = refusal(outer=outer)
    assert said.startswith("outer") and words in said


@pytest.mark.parametrize("value", [0, -3, True, "soon", {"patience": 0}, {"patients": 3}])
def test_patience_is_a_number_of_validations(value: Any) -> None:
    assert refusal(early_stop=value).startswith("early_stop")


def test_choosing_a_preset_begins_the_record_anew() -> None:
    run = as_run({"algorithm": {"name": "dynamic", "anchor": "natural", "steps": 7}})
    changed = as_run(run, {"algorithm.preset": "official", "algorithm.steps": 5})
    found: Any = changed.algorithm
    assert (found.anchor, found.weighting, found.steps) == ("start", "own_ce", 5)
    # The order of the words does not matter.
    words = ["algorithm.steps=5", "algorithm.preset=official", "algorithm=dynamic"]
    for order in itertools.permutations(words):
        assert as_run(None, order).algorithm == as_run(None, words).algorithm


def test_choosing_another_update_inside_awp_begins_its_record_anew() -> None:
    base = {"outer": {"name": "awp", "gamma": 0.01, "then": {"name": "clip", "max_norm": 2}}}
    run = as_run(base, ["outer.then=engm", "outer.then.alpha=3"])
    assert run.outer == Awp(gamma=0.01, then=Engm(alpha=3))
