"""The language of search spaces: branches, formulas, constraints, single values beside a range."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from raytrain.core.errors import RequestError
from raytrain.tuning.space.checks import check
from raytrain.tuning.space.draws import Draw
from raytrain.tuning.space.encoding import defaults, encode
from raytrain.tuning.space.reading import read_space
from raytrain.tuning.space.search_space import SearchSpace

FOLDER = Path(__file__).parents[2] / "search_spaces"

EVERYTHING = """
base: {threat: {norm: linf, eps: 0.1}, epochs: 3}
space:
  optimizer.lr: {float: [0.01, 0.4], log: true}
  algorithm.name:
    branch:
      pgd:
        algorithm.steps: {int: [2, 10]}
      trades:
        algorithm.steps: {int: [2, 10], step: 2}
        algorithm.beta: {float: [1, 20], log: true}
      dynamic:
        algorithm.c_max: {float: [0.02, 1], log: true, also: [-1]}
      ssds:
        algorithm.ascent: {choice: [steepest, raw]}
        algorithm.sigma:
          - {float: [0.1, 2], unit: eps, when: {algorithm.ascent: steepest}}
          - {float: [10, 1000], log: true, when: "algorithm.ascent == 'raw'"}
      natural: {}
  $reach: {float: [1, 4], when: "algorithm.name in ['pgd', 'trades', 'dynamic']"}
  algorithm.step_size:
    derive: $reach * threat.eps / algorithm.steps
    when: "not (algorithm.name == 'natural' or algorithm.name == 'ssds')"
  epochs: {int: [1, 9]}
constraints:
  - algorithm.steps * algorithm.step_size >= threat.eps * 1.5
  - "algorithm.name == 'natural' or epochs <= 8"
"""

GRID = """
base: {threat: {norm: linf, eps: 0.1}}
space:
  algorithm.name:
    branch:
      pgd: {algorithm.steps: {int: [2, 8], step: 3}}
      dynamic:
        algorithm.c_max: {float: [0.25, 1], step: 0.25, also: [-1]}
        algorithm.decay.kind: {choice: [power, constant]}
        algorithm.decay.end: {float: [0.5, 1], step: 0.25, when: {algorithm.decay.kind: power}}
      natural: {}
  epochs: {int: [1, 2]}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return file


def space_of(text: str) -> SearchSpace:
    space = SearchSpace.model_validate({"name": "mine", **yaml.safe_load(text)})
    check(space)
    return space


def small(space: dict[str, Any], *constraints: str, **base: Any) -> SearchSpace:
    return SearchSpace.model_validate(
        {"name": "mine", "base": base, "space": space, "constraints": constraints}
    )


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(RequestError) as caught:
        read_space(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path}/")


class Recorded(Draw):
    """A random trial that remembers what it answered."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, {})
        self.params: dict[str, Any] = {}

    def suggest_float(self, name: str, *bounds: float, **how: Any) -> float:
        return self.params.setdefault(name, super().suggest_float(name, *bounds, **how))

    def suggest_int(self, name: str, *bounds: int, **how: Any) -> int:
        return self.params.setdefault(name, super().suggest_int(name, *bounds, **how))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.params.setdefault(name, super().suggest_categorical(name, choices))


def trials(space: SearchSpace, number: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and values of random trials."""
    asked = [Recorded(seed) for seed in range(number)]
    return [(trial.params, values) for trial in asked for values in [space.sample(trial)]]


def params_of(space: SearchSpace, number: int) -> list[dict[str, Any]]:
    return [params for params, _ in trials(space, number)]


SPACES = [*sorted(FOLDER.glob("*.yaml")), EVERYTHING, GRID]


@cache
def any_space(source: Path | str) -> SearchSpace:
    return read_space(source) if isinstance(source, Path) else space_of(source)


def label(source: Path | str) -> str:
    return source.stem if isinstance(source, Path) else source[7:10].strip() + str(len(source))


# --- sample, values, encode and grid walk the same way ----------------------------------------


@pytest.mark.parametrize("source", SPACES, ids=label)
@pytest.mark.slow
def test_the_parameters_of_a_trial_give_its_values_again(source: Path | str) -> None:
    space = any_space(source)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(40):
        trial = study.ask()
        values = space.sample(trial)
        assert space.values(trial.params) == values
        assert not any(path.startswith("$") for path in values)


@pytest.mark.parametrize("source", SPACES, ids=label)
@pytest.mark.slow
def test_a_run_leads_back_to_the_parameters_it_was_made_of(source: Path | str) -> None:
    space = any_space(source)
    encoded = 0
    for params in params_of(space, 100):
        run = space.run(space.values(params))
        again = encode(space, run)
        if any(key.startswith("$") for key in params):
            assert again is None or space.run(space.values(again)) == run
            continue
        encoded += 1
        assert again is not None and again.keys() == params.keys()
        for key, raw in params.items():
            close = isinstance(raw, float) and isinstance(again[key], float)
            assert again[key] == (pytest.approx(raw, rel=1e-12) if close else raw), key
        assert space.run(space.values(again)) == run
    assert encoded > 0


@pytest.mark.parametrize("source", SPACES, ids=label)
def test_keys_are_as_many_as_dimensions_and_the_same_every_time(source: Path | str) -> None:
    space, other = any_space(source), any_space(source)
    keys = [variable.key for variable in space.variables if variable.key]
    assert len(set(keys)) == len(keys)
    assert keys == [variable.key for variable in other.variables if variable.key]
    drawn = set().union(*params_of(space, 300))
    assert {key.removesuffix(" is") for key in drawn} == set(keys)


def test_keys_are_paths_where_they_can_be() -> None:
    keys = [variable.key for variable in space_of(EVERYTHING).variables]
    assert keys == [
        "optimizer.lr",
        "algorithm.name",
        "algorithm.steps [name=pgd]",
        "algorithm.steps [name=trades]",
        "algorithm.beta",
        "algorithm.c_max",
        "algorithm.ascent",
        "algorithm.sigma [name=ssds, ascent=steepest]",
        "algorithm.sigma [name=ssds, algorithm.ascent == 'raw']",
        "$reach",
        "",
        "epochs",
    ]


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(RequestError, match=r"'epochs'"):
        small({"epochs": {"int": [1, 3]}}).values({"seed": 1})


# --- branches, formulas, single values --------------------------------------------------------


def test_each_option_of_a_branch_brings_its_own_fields() -> None:
    wanted = {
        "pgd": {"steps", "step_size"},
        "trades": {"steps", "beta", "step_size"},
        "dynamic": {"c_max", "step_size"},
        "ssds": {"ascent", "sigma"},
        "natural": set[str](),
    }
    space, seen = space_of(EVERYTHING), set()
    for _, values in trials(space, 100):
        name = values["algorithm.name"]
        own = {path.split(".")[1] for path in values if path.startswith("algorithm.")}
        assert own - {"name"} == wanted[name]
        assert space.run(values).algorithm.name == name
        seen.add(name)
    assert seen == set(wanted)


def test_a_formula_is_computed_from_what_was_drawn_and_from_what_was_not() -> None:
    space = space_of(EVERYTHING)
    for params in params_of(space, 100):
        values = space.values(params)
        if "$reach" in params:
            steps = values.get("algorithm.steps", 10)  # the default of dynamic
            assert values["algorithm.step_size"] == params["$reach"] * 0.1 / steps
        else:
            assert "algorithm.step_size" not in values


def test_a_formula_follows_the_eps_that_varies() -> None:
    space = small(
        {
            "threat.eps": {"choice": ["4/255", "8/255"]},
            "algorithm.step_size": {"derive": "threat.eps / 4"},
        }
    )
    told = {values["threat.eps"]: values["algorithm.step_size"] for _, values in trials(space, 30)}
    assert told == {"4/255": 4 / 255 / 4, "8/255": 8 / 255 / 4}


def test_a_multiple_of_an_eps_that_is_written_as_a_fraction() -> None:
    space = small(
        {
            "threat.eps": {"choice": ["8/255"]},
            "algorithm.step_size": {"float": [0.5, 0.5], "unit": "eps", "also": ["eps/3", 0.25]},
        }
    )
    assert {values["algorithm.step_size"] for _, values in trials(space, 60)} == {
        0.5 * (8 / 255),
        0.25 * (8 / 255),
        "eps/3",
    }


def test_a_step_size_in_an_expression_is_its_pixels() -> None:
    space = small({}, "algorithm.step_size <= 0.02", threat={"norm": "linf", "eps": 0.1})
    excess = space.violations({})["algorithm.step_size <= 0.02"]
    assert excess == 0.1 / 4 - 0.02  # the default of pgd is eps/4
    assert space.violations({"algorithm.step_size": "eps/10"})[space.constraints[0]] == 0.01 - 0.02


def test_single_values_lie_beside_the_range_and_are_drawn_as_often_as_it() -> None:
    space = small(
        {"algorithm.c_max": {"float": [0.02, 1], "log": True, "also": [-1, 9]}},
        algorithm={"name": "dynamic"},
    )
    drawn = [values["algorithm.c_max"] for _, values in trials(space, 300)]
    inside = [one for one in drawn if 0.02 <= one <= 1]
    assert set(drawn) - set(inside) == {-1, 9}
    assert all(70 < count < 130 for count in (len(inside), drawn.count(-1), drawn.count(9)))


def test_a_list_has_one_dimension_at_a_time() -> None:
    for _, values in trials(space_of(EVERYTHING), 100):
        sigma = values.get("algorithm.sigma")
        if sigma is not None:
            low, high = (0.01, 0.2) if values["algorithm.ascent"] == "steepest" else (10, 1000)
            assert low <= sigma <= high


def test_two_dimensions_of_a_path_that_apply_at_once_are_refused() -> None:
    space = small({"epochs": [{"int": [1, 3]}, {"int": [4, 6], "when": "seed == 0"}]})
    with pytest.raises(RequestError, match=r"^space\.epochs: two of its dimensions"):
        check(space)


def test_an_expression_may_say_or() -> None:
    space = small(
        {
            "optimizer.nesterov": {"choice": [True, False]},
            "optimizer.momentum": {"choice": [0.5, 0.9]},
            "epochs": {"int": [1, 3], "when": "optimizer.nesterov or optimizer.momentum == 0.5"},
        }
    )
    seen = set()
    for _, values in trials(space, 50):
        holds = values["optimizer.nesterov"] or values["optimizer.momentum"] == 0.5
        assert ("epochs" in values) == holds
        seen.add(holds)
    assert seen == {True, False}


def test_a_name_that_was_not_drawn_has_the_value_of_the_finished_run() -> None:
    space = small(
        {
            "algorithm": {"choice": ["pgd", "trades", "natural"]},
            "seed": {"int": [7, 7], "when": "algorithm.steps == 10"},  # natural has no steps
            "batch_size": {"derive": "epochs * 2"},
        },
        epochs=4,
    )
    for _, values in trials(space, 20):
        assert ("seed" in values) == (values["algorithm"] != "natural")
        assert values["batch_size"] == 8


# --- constraints ------------------------------------------------------------------------------


def test_violations_tell_by_how_much_each_constraint_is_broken() -> None:
    space = space_of(EVERYTHING)
    reach, fewer = space.constraints
    both = set()
    for params, values in trials(space, 200):
        told = space.violations(values)
        assert list(told) == [reach, fewer]
        if values["algorithm.name"] in ("natural", "ssds"):
            assert told[reach] <= 0  # it has no steps, or no step_size
        else:
            assert told[reach] == pytest.approx(0.15 - params["$reach"] * 0.1)
        assert (told[fewer] > 0) == (
            values["algorithm.name"] != "natural" and values["epochs"] > 8
        )
        assert space.allows(values) == (max(told.values()) <= 0)
        both.add(space.allows(values))
    assert both == {True, False}


def test_constraints_that_nothing_meets_are_refused() -> None:
    space = small({"epochs": {"int": [1, 5]}}, "epochs > 5")
    with pytest.raises(RequestError, match="none of 1000 random configurations"):
        check(space)


def test_an_end_that_the_constraints_exclude_need_not_be_a_valid_run() -> None:
    check(small({"epochs": {"int": [0, 5]}}, "epochs >= 1"))
    with pytest.raises(RequestError, match=r"^space\.epochs: expected greater than 0"):
        check(small({"epochs": {"int": [0, 5]}}))


def test_the_hash_changes_with_the_constraints() -> None:
    one, other = (small({"epochs": {"int": [1, 5]}}, f"epochs > {n}") for n in (1, 2))
    assert one.hash() != other.hash()


# --- grids ------------------------------------------------------------------------------------


def test_a_grid_holds_every_configuration_once() -> None:
    space = space_of(GRID)
    # pgd: 3 steps; dynamic: 4 thresholds and -1, times (3 ends of power, and constant); natural
    points = list(space.grid())
    assert len(points) == (3 + (4 + 1) * (3 + 1) + 1) * 2
    assert len({tuple(sorted(point.items(), key=str)) for point in points}) == len(points)
    assert len({space.run(space.values(point)).signature() for point in points}) == len(points)


def test_a_grid_holds_what_is_drawn_from_its_space() -> None:
    space = space_of(GRID)
    points = list(space.grid())
    for params in params_of(space, 200):
        assert any(
            point.keys() == params.keys()
            and all(
                math.isclose(point[key], raw) if isinstance(raw, float) else point[key] == raw
                for key, raw in params.items()
            )
            for point in points
        )


def test_a_grid_leaves_out_what_breaks_a_constraint() -> None:
    space = small(
        {"epochs": {"int": [1, 4]}, "seed": {"int": [1, 4]}, "$double": {"derive": "epochs * 2"}},
        "epochs + seed <= 5",
    )
    told = [(point["epochs"], point["seed"]) for point in space.grid()]
    assert told == [(a, b) for a, b in itertools.product(range(1, 5), repeat=2) if a + b <= 5]


def test_a_grid_over_a_range_without_steps_is_refused() -> None:
    space = small({"epochs": {"int": [1, 4]}, "optimizer.lr": {"float": [0.1, 1]}})
    with pytest.raises(RequestError, match=r"^space\.optimizer\.lr: a grid needs a step$"):
        list(space.grid())
    assert len(list(small({"optimizer.lr": {"float": [0.1, 0.1]}}).grid())) == 1
    assert list(small({}).grid()) == [{}]


# --- from runs to parameters ------------------------------------------------------------------


def test_the_defaults_of_every_algorithm_that_has_them_in_the_space() -> None:
    space = small(
        {
            "algorithm.name": {
                "branch": {
                    "pgd": {"algorithm.step_size": {"float": [0.1, 1], "unit": "eps"}},
                    "trades": {"algorithm.beta": {"float": [1, 20], "log": True}},
                    "mart": {"algorithm.beta": {"float": [6, 9]}},  # its default is 5
                    "natural": {},
                }
            },
            "optimizer.lr": {"float": [0.01, 0.4], "log": True},
        },
        optimizer={"lr": 0.05},
        algorithm={"name": "trades", "beta": 3.0},
    )
    mine, pgd, *others = defaults(space)
    beta, rate = "algorithm.beta [name=trades]", {"optimizer.lr": 0.05}
    assert mine == {"algorithm.name": "trades", beta: 3.0, **rate}
    step = {"algorithm.step_size": 0.25}
    assert pgd == {"algorithm.name": "pgd", **step, **rate}
    assert others == [{"algorithm.name": "natural", **rate}]


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        ({"float": [0.1, 0.5]}, [0.1, 0.3, 0.5], [0.05, 0.6]),
        ({"float": [0.1, 0.5], "step": 0.2}, [0.1, 0.3, 0.5], [0.2]),
        ({"choice": [0.1, 0.25]}, [0.1, 0.25], [0.2]),
        ({"float": [0.1, 0.5], "also": [0.9]}, [0.2, 0.9], [0.8]),
    ],
)
def test_what_is_outside_of_a_dimension_has_no_parameters(
    dimension: dict[str, Any], inside: list[float], outside: list[float]
) -> None:
    space = small({"optimizer.momentum": dimension})
    for wanted in inside:
        params = encode(space, space.run({"optimizer.momentum": wanted}))
        assert params is not None
        assert space.run(space.values(params)).optimizer.momentum == pytest.approx(wanted, 1e-12)
    for wanted in outside:
        assert encode(space, space.run({"optimizer.momentum": wanted})) is None


@pytest.mark.parametrize(("epochs", "found"), [(2, True), (5, True), (4, False), (8, False)])
def test_whole_numbers_off_their_steps_have_no_parameters(epochs: int, found: bool) -> None:
    space = small({"epochs": {"int": [2, 7], "step": 3}})
    assert encode(space, space.run({"epochs": epochs})) == ({"epochs": epochs} if found else None)


def test_a_derived_value_must_come_out_as_the_run_has_it() -> None:
    space = small({"seed": {"int": [0, 9]}, "epochs": {"derive": "seed + 1"}})
    assert encode(space, space.run({"seed": 3, "epochs": 4})) == {"seed": 3}
    assert encode(space, space.run({"seed": 3, "epochs": 5})) is None


def test_a_variable_that_is_no_field_is_taken_from_its_middle() -> None:
    space = small({"$half": {"int": [1, 5]}, "epochs": {"derive": "2 * $half"}})
    assert encode(space, space.run({"epochs": 6})) == {"$half": 3}
    assert encode(space, space.run({"epochs": 4})) is None


def test_options_may_be_written_as_a_run_has_them() -> None:
    space = small(
        {
            "threat.eps": {"choice": ["8/255"]},
            "algorithm.step_size": {"choice": ["eps/4", "eps/2"]},
        }
    )
    for step in ("eps/4", "eps/2"):
        values = {"threat.eps": 8 / 255, "algorithm.step_size": step}
        assert encode(space, space.run(values)) == {**values, "threat.eps": "8/255"}


@pytest.mark.parametrize("text", [EVERYTHING, GRID])
def test_a_space_survives_being_written_down(text: str) -> None:
    space = space_of(text)
    copy = yaml.safe_dump(
        space.model_dump(mode="json", by_alias=True, exclude_defaults=True), sort_keys=False
    )
    again = SearchSpace.model_validate(yaml.safe_load(copy))
    assert again.hash() == space.hash()
    assert [space.values(one) for one in params_of(again, 20)] == [
        again.values(one) for one in params_of(space, 20)
    ]


# --- what a reader is shown -------------------------------------------------------------------


def test_rows_tell_path_range_and_condition() -> None:
    rows = space_of(EVERYTHING).rows()
    assert rows[:3] == [
        ("optimizer.lr", "0.01 .. 0.4, log", ""),
        ("algorithm.name", "pgd | trades | dynamic | ssds | natural", ""),
        ("algorithm.steps", "2 .. 10", "algorithm.name = pgd"),
    ]
    told = {(path, words): condition for path, words, condition in rows}
    branch = "algorithm.name = ssds"
    assert told["algorithm.steps", "2 .. 10, step 2"] == "algorithm.name = trades"
    assert told["algorithm.c_max", "0.02 .. 1, log, or -1"] == "algorithm.name = dynamic"
    assert told["algorithm.sigma", "0.1 .. 2 eps"] == f"{branch} and algorithm.ascent = steepest"
    raw = f"{branch} and algorithm.ascent == 'raw'"
    assert told["algorithm.sigma", "10 .. 1000, log"] == raw
    assert ("algorithm.step_size", "= $reach * threat.eps / algorithm.steps") in told


# --- errors with their lines ------------------------------------------------------------------

LINES = EVERYTHING.splitlines()


def line_of(part: str) -> int:
    (number,) = [number for number, line in enumerate(LINES, 1) if part in line]
    return number


@pytest.mark.parametrize(
    ("part", "instead", "said"),
    [
        ("optimizer.lr:", "optimizer.lrr:", "space.optimizer.lrr: no such field"),
        ("algorithm.beta:", "algorithm.bet:", "space.algorithm.bet: no such field"),
        ("[1, 20], log: true", "[1, 20], lag: true", "algorithm.beta.lag: no such field"),
        ("[1, 20], log: true", "[-3, 20]", "space.algorithm.beta: expected greater than"),
        ("[10, 1000]", "[1000, 10]", "expected [low, high], found [1000, 10]"),
        (
            "$reach * threat.eps /",
            "$reech * threat.eps /",
            "there is no $reech; the nearest is $re",
        ),
        (
            "threat.eps / algo",
            "threat.epps / algo",
            "threat.epps: no configuration has this field",
        ),
        ("eps / algorithm.steps", "eps / algorithm.stebs", "; the nearest is algorithm.steps"),
        ("derive: $reach *", "derive: $reach +*", "is not an expression"),
        ("derive: $reach *", "derive: open($reach) *", "is not allowed"),
        ("== 'raw'", "== 'row'", "when: not met by any of 1000 random configurations"),
        ("{algorithm.ascent: steepest}", "{algorithm.ascend: steepest}", "is not a path listed"),
        ("{algorithm.ascent: steepest}", "{algorithm.ascent: steep}", "is never 'steep'"),
        ("epochs <= 8", "epoch <= 8", "constraints: epoch: no configuration has this field"),
        ("epochs <= 8", "$reach <= 8", "constraints: "),
        ("epochs <= 8", "epochs <= ", "is not an expression"),
        ("epochs <= 8", "1 / (epochs - epochs) < 3", "division by zero"),
        ("epochs: 3}", "epoch: 3}", "base.epoch: no such field; the nearest is epochs"),
        ("eps: 0.1", "eps: 8", "base.threat.eps: 8 is not in pixels"),
        ("epochs: {int: [1, 9]}", "epochs: {int: [0, 9]}", "space.epochs: expected greater than"),
        ("epochs: {int: [1, 9]}", "optimizer.lr: {int: [1, 9]}", "given a second time"),
        ("natural: {}", "pgd: {}", "given a second time"),
    ],
)
def test_a_mistake_is_answered_with_its_line(
    part: str, instead: str, said: str, tmp_path: Path
) -> None:
    wrong = EVERYTHING.replace(part, instead, 1)
    told = complaint(tmp_path, wrong)
    assert told.startswith(f"study.yaml:{line_of(part)}: ") and said in told


def test_an_option_that_is_no_algorithm_is_answered_with_its_line(tmp_path: Path) -> None:
    text = "space:\n  algorithm.name:\n    branch: {pgd: {}, natral: {}}\n"
    told = complaint(tmp_path, text)
    assert told.startswith("study.yaml:2: space.algorithm: ") and "nearest is natural" in told


def test_a_word_is_named_instead_of_a_line(tmp_path: Path) -> None:
    file = written(tmp_path, EVERYTHING)
    for word, path in {"epoch=3": "base.epoch", "threat.eps=8": "base.threat.eps"}.items():
        with pytest.raises(RequestError) as caught:
            read_space(file, ["seed=3", word])
        assert str(caught.value).startswith(f"{word}: {path}: ")


@pytest.mark.parametrize(
    "space",
    [
        {"algorithm.step_size": {"derive": "threat.eps / 4"}, "threat.eps": {"float": [0.1, 0.2]}},
        {"epochs": {"int": [1, 3], "when": "seed > 1"}, "seed": {"int": [0, 3]}},
        {"epochs": {"derive": "epochs + 1"}},
        {
            "algorithm.step_size": {"float": [0.1, 1], "unit": "eps"},
            "threat.norm": {"choice": ["linf"]},
        },
    ],
    ids=["derive", "when", "itself", "unit"],
)
def test_nothing_may_look_ahead(space: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not decided before it"):
        small(space)


def test_branches_apart_do_not_stand_in_each_others_way() -> None:
    steps = {"algorithm.steps": {"int": [2, 9]}}
    derived = {"algorithm.step_size": {"derive": "threat.eps / algorithm.steps"}}
    space = small({"algorithm.name": {"branch": {"pgd": {**steps, **derived}, "trades": steps}}})
    check(space)
    for _, values in trials(space, 20):
        assert ("algorithm.step_size" in values) == (values["algorithm.name"] == "pgd")


def test_a_copy_with_another_base_is_asked_about_that_base() -> None:
    space = small({"algorithm.step_size": {"float": [0.5, 0.5], "unit": "eps"}})
    for eps in (0.1, 0.3):
        moved = space.model_copy(update={"base": {"threat": {"norm": "linf", "eps": eps}}})
        assert moved.sample(Draw(0, {})) == {"algorithm.step_size": 0.5 * eps}


def test_words_may_change_the_search_and_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("base: {epochs: 3}\nspace:\n  optimizer.lr: {float: [0.1, 0.2]}\n")
    space = read_space(file, ["search.sampler=gp", "budget.fe_per_image=500", "epochs=5"])
    assert (space.search.sampler, space.budget.fe_per_image) == ("gp", 500)
    assert space.base_run.epochs == 5
    with pytest.raises(RequestError, match=r"^search.samplr=gp: search.samplr: no such field"):
        read_space(file, ["search.samplr=gp"])
    with pytest.raises(RequestError, match=r"^budget.trials=0: budget.trials: expected"):
        read_space(file, ["budget.trials=0"])


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@host/name",
        "postgresql+psycopg://me:sec/secret@host:5432/name",
        "postgresql://me@host/name?password=secret",
        "mysql://me@host/name?charset=utf8&passwd=secret",
    ],
)
def test_a_password_does_not_get_into_the_file_of_a_sweep(tmp_path: Path, url: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"study: {url}\n")
    with pytest.raises(RequestError, match=r"study: .*without a password") as error:
        read_space(file)
    assert "secret" not in str(error.value)
    file.write_text("study: postgresql://me@host:5432/name\n")
    assert read_space(file).study == "postgresql://me@host:5432/name"


def test_a_base_may_be_written_with_dotted_paths(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    searched = "space: {optimizer.lr: {float: [0.1, 0.2]}}\n"
    file.write_text("base: {data: digits, data.train_size: 200, epochs: 2}\n" + searched)
    found = read_space(file)
    file.write_text("base: {data: {name: digits, train_size: 200}, epochs: 2}\n" + searched)
    assert found.base_run == read_space(file).base_run
