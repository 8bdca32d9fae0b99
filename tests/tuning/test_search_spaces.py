"""One search space per algorithm and outer update: valid everywhere, and within what its card announces."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raytrain.algorithms import RECIPES
from raytrain.config.request import override, parse_overrides
from raytrain.config.run import RunConfig
from raytrain.core.card import Card, Options, Range, alternatives
from raytrain.core.types import in_pixels
from raytrain.outer import OUTERS
from raytrain.training.setup import preflight
from raytrain.tuning.space.dimensions import Choice, Real
from raytrain.tuning.space.reading import read_space
from raytrain.tuning.space.search_space import SearchSpace

FOLDER = Path(__file__).parents[2] / "search_spaces"
FILES = sorted(file.stem for file in FOLDER.glob("*.yaml"))

ALGORITHMS = [name for name in RECIPES if name != "nested"]
OUTER_UPDATES = [name for name in OUTERS if name != "sgd"]
CARDS: dict[str, Card] = {
    **{f"algorithm.{name}": RECIPES[name].card for name in ALGORITHMS},
    **{f"outer.{name}": OUTERS[name].card for name in OUTER_UPDATES},
}
OWN = [*ALGORITHMS, *OUTER_UPDATES, "nested"]

TO_CIFAR10 = "data=cifar10 model=resnet18 threat.eps=8/255"

# What a card announces and its file leaves out.
NOT_SEARCHED = {
    "yopo": {"n": "with a linear first layer n steps of s are one of n s, and that is searched"},
}

# file -> field -> the other field, and with which of its values there is such a field at all
ESTIMATED = ("outer.estimator", ("affine", "loss"))
ASCENT = ("algorithm.ascent", ("steepest", "raw"))  # in one unit or in the other
AHEAD = ("algorithm.mode", ("A", "C"))
MULTIPLIED = ("algorithm.budget", ("multiplier",))
STOP, START = "algorithm.attack.stop", "algorithm.attack.start"
ONLY_WITH: dict[str, dict[str, tuple[str, tuple[str | None, ...]]]] = {
    "natural": {"optimizer.schedule.peak": ("optimizer.schedule.kind", ("onecycle",))},
    "dynamic": {
        "algorithm.decay.end": ("algorithm.decay.kind", ("power", "cosine")),
        "algorithm.decay.exponent": ("algorithm.decay.kind", ("power",)),
    },
    "si_hg": {
        "algorithm.sigma": ASCENT,
        "algorithm.theta": AHEAD,
        "algorithm.theta_warmup": AHEAD,
        "algorithm.init": ("algorithm.store", ("none",)),
        "algorithm.shrink": ("algorithm.store", ("per_sample",)),
    },
    "ssds": {
        "algorithm.sigma": ASCENT,
        "algorithm.v0": MULTIPLIED,
        "algorithm.c1": MULTIPLIED,
        "algorithm.clamp_delta": MULTIPLIED,
    },
    "l2l": {
        "algorithm.beta": ("algorithm.loss", ("trades",)),
        "algorithm.hidden": ("algorithm.cell", ("lstm", "gru", "rnn")),
    },
    "engm": {
        "outer.alpha": ("outer.quantile", (None,)),
        "outer.renorm": ("outer.mode", ("clip",)),
        **dict.fromkeys(("outer.tau", "outer.mu", "outer.fit", "outer.probes"), ESTIMATED),
    },
    "awp": {"algorithm.beta": ("algorithm", ("trades",))},
    "nested": {
        f"{START}.radius": (START, ("uniform",)),
        f"{STOP}.c_max": (STOP, ("gap",)),
        f"{STOP}.over": (STOP, ("gap",)),
        f"{STOP}.decay": (STOP, ("gap",)),
        f"{STOP}.decay.end": (f"{STOP}.decay", ("power",)),
        "algorithm.objective.beta": ("algorithm.objective", ("mart",)),
    },
}


class Draws:
    """A trial that draws as Optuna's random sampler does, and remembers what it was asked for."""

    def __init__(self, seed: str) -> None:
        self._source = random.Random(seed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is not None:
            return low + step * self._source.randint(0, math.floor((high - low) / step + 1e-9))
        if log:
            drawn = math.exp(self._source.uniform(math.log(low), math.log(high)))
            return min(high, max(low, drawn))
        return self._source.uniform(low, high)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        if log:
            return round(self.suggest_float(name, low, high, log=True))
        return self._source.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._source.choice(choices)


@functools.cache
def space_of(name: str) -> SearchSpace:
    return read_space(FOLDER / f"{name}.yaml")


@functools.cache
def drawn_from(name: str) -> list[tuple[dict[str, Any], RunConfig]]:
    """200 points of a space and their runs."""
    space = space_of(name)
    chosen = [space.sample(Draws(f"{name} {number}")) for number in range(200)]
    return [(values, space.run(values)) for values in chosen]


def dimensions(name: str, path: str) -> list[Any]:
    """What stands for a path in a space."""
    return [one.entry for one in space_of(name).variables if one.path == path]


def field_at(run: RunConfig, path: str) -> Any:
    """The field of a run; the name or kind of a record, which is what is chosen of it."""
    here: Any = run.model_dump()
    for part in path.split("."):
        here = here[part]
    return here.get("name", here.get("kind")) if isinstance(here, Mapping) else here


# --- every file -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
def test_every_point_is_a_run_whose_algorithm_builds(name: str) -> None:
    for _, run in drawn_from(name):
        run.algorithm.build(run.threat, run.outer)


@pytest.mark.parametrize("name", FILES)
def test_what_is_drawn_arrives_in_the_run(name: str) -> None:
    for values, run in drawn_from(name):
        assert {path: field_at(run, path) for path in values} == values


@pytest.mark.parametrize("name", FILES)
def test_conditional_fields_are_drawn_exactly_where_their_conditions_hold(name: str) -> None:
    drawn = [values for values, _ in drawn_from(name)]
    variables = space_of(name).variables
    for path in {variable.path for variable in variables if variable.path[0] != "$"}:
        needs = [variable.needs() for variable in variables if variable.path == path]
        met = [
            sum(all(values.get(other) in wanted for other, wanted in one.items()) for one in needs)
            for values in drawn
        ]
        assert met == [int(path in values) for values in drawn], path
        assert any(met) and (all(met) or all(needs)), path


@pytest.mark.parametrize("name", FILES)
def test_every_dimension_is_part_of_some_configuration_that_the_constraints_allow(
    name: str,
) -> None:
    space = space_of(name)
    allowed = [values for values, _ in drawn_from(name) if space.allows(values)]
    assert len(allowed) >= len(drawn_from(name)) / 2  # few proposals are thrown away
    for variable in space.variables:
        assert variable.path[0] == "$" or any(variable.path in values for values in allowed)


# --- one for each algorithm and outer update --------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_the_base_runs_as_it_is_on_the_embedded_digits(name: str) -> None:
    run = space_of(name).base_run
    assert (run.data.name, run.threat.norm, run.threat.eps) == ("digits", "linf", 0.1)
    assert run.model == RunConfig.model_validate({}).model
    assert run.epochs <= 12 and run.batch_size == 64
    assert in_pixels(run.evaluation.step_size, run.threat.eps) == 0.1 / 4
    preflight(run)


@pytest.mark.parametrize("name", OWN)
def test_it_moves_to_cifar10_as_its_description_says(name: str) -> None:
    space = space_of(name)
    told = " ".join(space.description.split())
    (words,) = re.findall(re.escape(TO_CIFAR10) + r" epochs=\d+ batch_size=128", told)
    for change in (TO_CIFAR10, words):
        base = override(space.base, parse_overrides(change.split()))
        moved = space.model_copy(update={"base": base})
        run = moved.base_run
        assert (run.data.name, run.model.name, run.threat.eps) == ("cifar10", "resnet18", 8 / 255)
        for number in range(20):
            moved.run(moved.sample(Draws(f"{change} {number}")))


@pytest.mark.parametrize("name", [*ALGORITHMS, "nested"])
def test_every_algorithm_has_a_space_of_its_own(name: str) -> None:
    assert {run.algorithm.name for _, run in drawn_from(name)} == {name}
    assert {run.outer.name for _, run in drawn_from(name)} == {"sgd"}


@pytest.mark.parametrize("name", OUTER_UPDATES)
def test_every_outer_update_has_a_space_of_its_own(name: str) -> None:
    assert {run.outer.name for _, run in drawn_from(name)} == {name}


@pytest.mark.parametrize("name", OWN)
def test_rate_and_weight_decay_are_searched_on_a_log_scale(name: str) -> None:
    for path in ("optimizer.lr", "optimizer.weight_decay"):
        (dimension,) = dimensions(name, path)
        assert isinstance(dimension, Real) and dimension.log and not dimension.when


@pytest.mark.parametrize("name", OWN)
def test_fields_that_exist_only_with_others_are_searched_only_with_them(name: str) -> None:
    table = ONLY_WITH.get(name, {})
    conditional = {variable.path for variable in space_of(name).variables if variable.needs()}
    assert conditional == set(table)
    for path, (other, wanted) in table.items():
        for values, _ in drawn_from(name):
            assert (path in values) == (values.get(other) in wanted), (path, values)


# --- what the cards announce ------------------------------------------------------------------


@pytest.mark.parametrize("key", CARDS)
def test_what_a_card_announces_is_searched_or_excused(key: str) -> None:
    record, name = key.split(".")
    left_out = NOT_SEARCHED.get(name, {})
    searched = {path.removeprefix(f"{record}.") for path in space_of(name).space}
    assert set(CARDS[key].ranges) - searched == set(left_out)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (key, field)
        for key, card in CARDS.items()
        for field in card.ranges
        if field not in NOT_SEARCHED.get(key.split(".")[1], {})
    ],
)
def test_what_is_searched_lies_within_what_the_card_announces(key: str, field: str) -> None:
    record, name = key.split(".")
    ranges = alternatives(CARDS[key].ranges[field])
    found = dimensions(name, f"{record}.{field}")
    assert len(found) == len(ranges)  # one for each unit it may be in
    for announced, dimension in zip(ranges, found, strict=True):
        check_within(announced, dimension)


def check_within(announced: Range | Options, dimension: Any) -> None:
    unit = announced.unit if isinstance(announced, Range) else ""
    assert (getattr(dimension, "unit", None) == "eps") == (unit == "eps")
    if isinstance(announced, Options):
        assert isinstance(dimension, Choice) and set(dimension.options) <= set(announced.values)
        return
    ends = [end for end in dimension.ends() if end is not None]
    assert all(announced.low <= end <= announced.high for end in ends)
    assert getattr(dimension, "log", False) == announced.log


@pytest.mark.parametrize(
    ("key", "field"),
    [
        (key, field)
        for key, card in CARDS.items()
        for field in card.ranges
        if any(one.when for one in alternatives(card.ranges[field]))
    ],
)
def test_what_matters_with_other_fields_only_is_searched_with_them_only(
    key: str, field: str
) -> None:
    record, name = key.split(".")
    drawn = set()
    for values, run in drawn_from(name):
        matters = any(
            all(
                field_at(run, f"{record}.{other}") in (value if type(value) is tuple else (value,))
                for other, value in one.when.items()
            )
            for one in alternatives(CARDS[key].ranges[field])
        )
        assert (f"{record}.{field}" in values) == matters
        drawn.add(matters)
    assert True in drawn


@pytest.mark.parametrize("name", ["dynamic", "dynamic_cifar10", "quickstart"])
def test_dynamic_attacks_can_cross_the_ball_where_they_are_trained(name: str) -> None:
    space, both = space_of(name), set()
    for values, run in drawn_from(name):
        recipe = run.algorithm.model_dump()
        crosses = recipe["steps"] * recipe["step_size"] >= run.threat.eps
        assert space.allows(values) == crosses
        both.add(crosses)
    assert both == {True, False}


def test_all_algorithms_are_in_the_space_of_all() -> None:
    drawn = drawn_from("all")
    papers = {"dynamic", "si_hg", "ssds", "l2l"}
    assert {run.algorithm.name for _, run in drawn} == papers | {"pgd", "trades", "mart"}
    assert {run.outer.name for _, run in drawn} == {"sgd", "awp", "engm"}
    for _, run in drawn:
        recipe = run.algorithm.model_dump()
        if recipe["name"] in ("pgd", "trades", "mart", "dynamic"):
            reach = recipe["steps"] * recipe["step_size"] / run.threat.eps
            assert 1 - 1e-9 <= reach <= 4 + 1e-9


@pytest.mark.parametrize("file", ["raytrain/tuning/README.md", "search_spaces/README.md"])
def test_the_examples_of_the_documentation_are_valid(file: str, tmp_path: Path) -> None:
    text = (FOLDER.parent / file).read_text()
    blocks = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    spaces = [block for block in blocks if "\nspace:" in block]
    assert spaces
    for number, block in enumerate(spaces):
        example = tmp_path / f"example{number}.yaml"
        example.write_text(block)
        read_space(example)
