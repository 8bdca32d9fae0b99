"""A search space is a valid run at every point of it, or one sentence with the file and the path."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from raytrain.config.run import RunConfig
from raytrain.core.epoch_metrics import METRICS
from raytrain.core.errors import RequestError
from raytrain.tuning.space.reading import read_space
from raytrain.tuning.space.search_space import SearchSpace

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))

DYNAMIC: dict[str, Any] = {
    "base": {"algorithm": {"name": "dynamic"}, "threat": {"norm": "linf", "eps": 0.2}},
    "space": {
        "algorithm.step_size": {"float": ["1/8", "1/2"], "log": True, "unit": "eps"},
        "algorithm.decay.kind": {"choice": ["power", "cosine", "constant"]},
        "algorithm.decay.end": {
            "float": [0.5, 1],
            "when": {"algorithm.decay.kind": ["power", "cosine"]},
        },
        "algorithm.decay.exponent": {"float": [0.5, 2], "when": {"algorithm.decay.kind": "power"}},
    },
}


def written(tmp_path: Path, values: Any) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return file


def space_of(tmp_path: Path, space: dict[str, Any], **others: Any) -> SearchSpace:
    return read_space(written(tmp_path, {"space": space, **others}))


def complaint(tmp_path: Path, values: Any) -> str:
    """What a wrong file is answered with, without its name and line."""
    file = written(tmp_path, values)
    with pytest.raises(RequestError) as caught:
        read_space(file)
    said = str(caught.value)
    assert "\n" not in said
    place, _, told = said.partition(": ")
    assert re.fullmatch(rf"{re.escape(str(file))}(:\d+)?", place)
    return told


def draws(
    space: SearchSpace, number: int, seed: int = 0
) -> list[tuple[dict[str, Any], RunConfig]]:
    """What Optuna's random sampler makes of a space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    chosen = [space.sample(study.ask()) for _ in range(number)]
    return [(values, space.run(values)) for values in chosen]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


# --- every file of the project ----------------------------------------------------------------


@cache
def bundled(file: Path) -> SearchSpace:
    return read_space(file)


def test_there_are_search_spaces() -> None:
    assert SPACES and (SPACES[0].parent / "quickstart.yaml") in SPACES


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
@pytest.mark.slow
def test_every_search_space_validates_and_samples_valid_runs(file: Path) -> None:
    space = bundled(file)
    assert space.name == file.stem
    drawn = draws(space, 120)
    assert all(isinstance(run, RunConfig) for _, run in drawn)
    assert len({run.signature() for _, run in drawn}) > 100
    paths = {variable.path for variable in space.variables if variable.path[0] != "$"}
    assert set().union(*(values for values, _ in drawn)) == paths


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_every_search_space_is_judged_on_the_validation_split(file: Path) -> None:
    assert all(one.metric.startswith("valid/") for one in bundled(file).objective)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "path", "expected"),
    [
        ({"optimizer.lrr": {"float": [0.1, 1]}}, "optimizer.lrr", "optimizer.lr"),
        ({"algorithm.decay.end": {"float": [0.5, 1]}}, "algorithm.decay", "no such field"),
        ({"epochs": {"int": [0, 5]}}, "epochs", "greater than 0"),
        ({"optimizer.momentum": {"float": [0.5, 1]}}, "optimizer.momentum", "less than 1"),
        ({"epochs": {"float": [2, 5]}}, "epochs", "an integer"),
        ({"algorithm": {"choice": ["pgd", "dynamc"]}}, "algorithm", "dynamic"),
        ({"threat.eps": {"choice": [0.1, 8]}}, "threat.eps", "8/255"),
        ({"batch_size": {"choice": [64, "many"]}}, "batch_size", "an integer"),
        ({"optimizer.lr": {"float": [1, 0.1]}}, "space.optimizer.lr", "[low, high]"),
        ({"epochs": {"int": [9, 3]}}, "space.epochs", "[low, high]"),
        ({"optimizer.lr": {"float": [0, 1], "log": True}}, "space.optimizer.lr", "log"),
        ({"epochs": {"int": [0, 5], "log": True}}, "space.epochs", "log"),
        ({"epochs": {"int": [1, 9], "log": True, "step": 2}}, "space.epochs", "step"),
        (
            {"optimizer.lr": {"float": [0.1, 1], "log": True, "step": 0.1}},
            "space.optimizer.lr",
            "step",
        ),
        ({"epochs": {"int": [1, 9], "choice": [1, 2]}}, "space.epochs", "one of"),
        ({"epochs": {"intt": [1, 9]}}, "space.epochs", "one of"),
        ({"epochs": [1, 9]}, "space.epochs", "one of"),
        ({"epochs": {"int": [1, 9], "setp": 2}}, "space.epochs.setp", "no such field"),
        ({"epochs": {"int": [1]}}, "space.epochs.int", "missing"),
        ({"epochs": {"int": ["a", 3]}}, "space.epochs.int", "an integer"),
        ({"epochs": {"choice": []}}, "space.epochs.choice", "at least 1"),
        ({"epochs": {"int": [1, 9], "step": 0}}, "space.epochs.step", "greater than 0"),
        ({"threat.eps": {"float": [0.5, 1], "unit": "eps"}}, "space.threat.eps", "eps"),
        ({"optimizer.lr": {"float": [0.1, 1], "unit": "px"}}, "space.optimizer.lr.unit", "eps"),
    ],
)
def test_a_wrong_dimension_is_answered_with_its_path(
    space: dict[str, Any], path: str, expected: str, tmp_path: Path
) -> None:
    said = complaint(tmp_path, {"space": space})
    assert path in said and expected in said


def test_a_bound_that_only_few_trials_would_meet_is_refused_before_the_sweep(
    tmp_path: Path,
) -> None:
    # One choice of 20 makes the field apply, and only one end of its range is wrong.
    space = {
        "algorithm.steps": {"choice": list(range(1, 21))},
        "epochs": {"int": [0, 200], "when": {"algorithm.steps": 20}},
    }
    assert "epochs" in complaint(tmp_path, {"space": space})


def test_a_condition_on_a_later_path_is_refused(tmp_path: Path) -> None:
    paths = list(DYNAMIC["space"])
    turned = {path: DYNAMIC["space"][path] for path in reversed(paths)}
    said = complaint(tmp_path, {**DYNAMIC, "space": turned})
    assert "space.algorithm.decay.exponent.when" in said and "algorithm.decay.kind" in said


def test_a_condition_on_a_path_that_does_not_vary_is_refused(tmp_path: Path) -> None:
    space = {"epochs": {"int": [1, 3], "when": {"seed": 1}}}
    said = complaint(tmp_path, {"space": space})
    assert "space.epochs.when" in said and "seed" in said


def test_a_condition_that_no_value_meets_is_refused(tmp_path: Path) -> None:
    space = {
        "algorithm.steps": {"choice": [1, 2]},
        "epochs": {"int": [1, 3], "when": {"algorithm.steps": 3}},
    }
    said = complaint(tmp_path, {"space": space})
    assert "space.epochs" in said and "algorithm.steps" in said


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"objective": {"metric": "valid/robst"}}, "metric", "valid/robust"),
        ({"objective": {"metric": "test/clean"}}, "metric", "valid/robust"),
        ({"objective": {"mode": "maximum"}}, "objective.mode", "max"),
        ({"search": {"sampler": "cmaes"}}, "search.sampler", "tpe"),
        ({"search": {"pruner": "wilcoxon"}}, "search.pruner", "asha"),
        ({"search": {"reduction": 1}}, "search.reduction", "2"),
        ({"search": {"first_rungs": 1}}, "search.first_rungs", "search.first_rung"),
        ({"budget": {"trials": 0}}, "budget.trials", "greater than 0"),
        ({"budgte": {"trials": 3}}, "budgte", "budget"),
        ({"base": {"epoch": 3}}, "base.epoch", "epochs"),
        ({"base": {"threat": {"eps": 8}}}, "base.threat.eps", "8/255"),
        ({"base": ["epochs"]}, "base", "found"),
        ({"base": "quick"}, "base", "found"),
        ({"space": ["epochs"]}, "space", "found"),
    ],
)
def test_a_wrong_part_of_a_study_is_answered_with_its_path(
    values: dict[str, Any], path: str, expected: str, tmp_path: Path
) -> None:
    said = complaint(tmp_path, values)
    assert path in said and expected in said


def test_an_unknown_metric_is_answered_with_the_metrics(tmp_path: Path) -> None:
    said = complaint(tmp_path, {"objective": {"metric": "accuracy"}})
    assert all(metric in said for metric in METRICS)


def test_a_study_file_with_broken_yaml_is_answered_with_its_line(tmp_path: Path) -> None:
    assert complaint(tmp_path, "base: {epochs: 3}\nspace: {a: [}\n").startswith(
        "not valid YAML in"
    )


def test_a_run_file_is_not_a_study(tmp_path: Path) -> None:
    said = complaint(tmp_path, {"algorithm": "pgd", "epochs": 3})
    assert said.startswith("algorithm: no such field")


# --- what a space means -----------------------------------------------------------------------


def test_conditional_fields_are_absent_where_their_condition_fails(tmp_path: Path) -> None:
    drawn = draws(read_space(written(tmp_path, DYNAMIC)), 60)
    wanted = {
        "power": {"kind", "end", "exponent"},
        "cosine": {"kind", "end"},
        "constant": {"kind"},
    }
    seen = set()
    for values, run in drawn:
        kind = values["algorithm.decay.kind"]
        told = {path.rsplit(".")[-1] for path in values if path.startswith("algorithm.decay")}
        assert told == wanted[kind]
        assert set(run.algorithm.model_dump()["decay"]) == wanted[kind]
        seen.add(kind)
    assert seen == set(wanted)


def test_a_multiple_of_eps_becomes_pixels(tmp_path: Path) -> None:
    for values, run in draws(read_space(written(tmp_path, DYNAMIC)), 20):
        pixels = values["algorithm.step_size"]
        assert 1 / 8 * 0.2 <= pixels <= 1 / 2 * 0.2
        assert run.algorithm.model_dump()["step_size"] == pixels


def test_a_multiple_of_eps_follows_the_eps_that_varies(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        {
            "threat.eps": {"choice": [0.1, 0.3]},
            "algorithm.step_size": {"float": [0.5, 0.5], "unit": "eps"},
        },
    )
    steps = {
        (run.threat.eps, run.algorithm.model_dump()["step_size"]) for _, run in draws(space, 20)
    }
    assert steps == {(0.1, 0.05), (0.3, 0.15)}


def test_bounds_may_be_fractions_and_are_met(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"threat.eps": {"float": ["4/255", "8/255"]}})
    radii = [run.threat.eps for _, run in draws(space, 50)]
    assert 4 / 255 <= min(radii) < max(radii) <= 8 / 255


def test_whole_numbers_keep_to_their_step(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"epochs": {"int": [2, 10], "step": 4}})
    assert {run.epochs for _, run in draws(space, 40)} == {2, 6, 10}


def test_choices_keep_their_types(tmp_path: Path) -> None:
    options = [True, False]
    space = space_of(
        tmp_path,
        {"data.flip": {"choice": options}, "data.pad": {"choice": [1, 2]}},
    )
    drawn = draws(space, 20)
    assert {type(values["data.flip"]) for values, _ in drawn} == {bool}
    assert {type(values["data.pad"]) for values, _ in drawn} == {int}


def test_a_whole_algorithm_can_be_chosen_with_its_own_fields(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        {
            "algorithm": {"choice": ["pgd", "natural"]},
            "algorithm.steps": {"int": [1, 4], "when": {"algorithm": "pgd"}},
        },
        base={"algorithm": {"name": "dynamic", "c_max": 0.3}},
    )
    for values, run in draws(space, 30):
        assert run.algorithm.name == values["algorithm"]
        assert run.algorithm.model_dump().get("steps") == values.get("algorithm.steps")


def test_an_empty_space_is_its_base_run(tmp_path: Path) -> None:
    space = space_of(tmp_path, {}, base={"epochs": 3})
    assert [(values, run) for values, run in draws(space, 2)] == [({}, space.base_run)] * 2


def test_words_change_the_base_run(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, DYNAMIC), ["epochs=3", "threat.eps=0.1"])
    assert (space.base_run.epochs, space.base_run.threat.eps) == (3, 0.1)
    assert draws(space, 1)[0][1].epochs == 3


def test_a_wrong_word_is_answered_with_its_field(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"base\.epoch: no such field; the nearest is"):
        read_space(written(tmp_path, DYNAMIC), ["epoch=3"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nope\.yaml: no such file"):
        read_space(tmp_path / "nope.yaml")


def test_a_space_can_be_made_without_a_file() -> None:
    space = SearchSpace.model_validate({"name": "mine", **DYNAMIC})
    assert all(run.algorithm.name == "dynamic" for _, run in draws(space, 10))


# --- text -------------------------------------------------------------------------------------


def test_a_study_has_the_text_that_is_written_in_it(tmp_path: Path) -> None:
    text = """\
name: 2026-11-27
description: no
base:
  run_name: 007
  experiment: on
  tracking_uri: ~
  data: {name: 2026, root: 1e3}
  threat: {norm: linf, eps: 8/255}
study: off
search: {earlier: 1:30}
space:
  optimizer.lr: {float: [0.1, 0.2]}
  $twice: {int: [1, 2]}
  epochs: {derive: 1e1}
"""
    space = read_space(written(tmp_path, text))
    run = space.run({})
    assert (space.name, space.description, space.study) == ("2026-11-27", "no", "off")
    assert space.search.earlier == "1:30"
    assert (run.run_name, run.experiment, run.tracking_uri) == ("007", "on", None)
    assert (run.data.name, run.data.root) == ("2026", Path("1e3"))
    assert draws(space, 1)[0][1].epochs == 10


def test_options_of_a_text_field_are_text_and_others_are_not(tmp_path: Path) -> None:
    text = """\
space:
  model.name: {choice: [no, 007, 2026-11-27, "~", x]}
  data: {choice: [on, 1e3]}
  data.root: {choice: [null, 1.0], when: {data: on}}
  registry: {choice: [no, yes], when: {model.name: [no, 007]}}
  batch_size:
    - {choice: [32, 64], when: {model.name: no}}
    - {int: [1, 9], when: {model.name: [007, 2026-11-27, x]}}
"""
    space = read_space(written(tmp_path, text))
    seen = [values for values, _ in draws(space, 200)]
    assert {one["model.name"] for one in seen} == {"no", "007", "2026-11-27", "~", "x"}
    assert {one["data"] for one in seen} == {"on", "1e3"}
    assert {one.get("data.root", 0) for one in seen} == {None, "1.0", 0}
    assert {one.get("registry") for one in seen} == {False, True, None}
    assert all(("registry" in one) == (one["model.name"] in ("no", "007")) for one in seen)
    assert all(("batch_size" in one) == (one["model.name"] != "~") for one in seen)
    assert all(run.model.name == values["model.name"] for values, run in draws(space, 20))


def test_branches_and_variables_go_by_what_is_written(tmp_path: Path) -> None:
    text = """\
space:
  $deep: {choice: [no, 1]}
  model.name:
    branch:
      no: {epochs: {int: [1, 2]}, data.name: {choice: [1, no]}}
      007: {epochs: {int: [3, 4], when: {$deep: no}}}
"""
    space = read_space(written(tmp_path, text))
    seen = [values for values, _ in draws(space, 100)]
    assert {one["model.name"] for one in seen} == {"no", "007"}
    assert {one["data.name"] for one in seen if one["model.name"] == "no"} == {"1", "no"}
    sevens = [one for one in seen if one["model.name"] == "007"]
    assert {one.get("epochs") for one in sevens} == {3, 4, None}


def test_a_null_is_no_option_of_a_text_that_must_be_there(tmp_path: Path) -> None:
    said = complaint(tmp_path, "space:\n  model.name: {choice: [x, null]}\n")
    assert said == "space.model.name: expected a string, found None"


def test_words_give_text_to_the_study_and_to_its_base_run(tmp_path: Path) -> None:
    file = written(tmp_path, DYNAMIC)
    words = ["study=sqlite:///a #1.db", "search.earlier=x: y", "data=/d/a #1", "run_name=[v1]"]
    words += ["budget.trials=3", "objective={metric: valid/clean}", "storage=no"]
    space = read_space(file, words)
    assert (space.study, space.search.earlier) == ("sqlite:///a #1.db", "x: y")
    assert (space.budget.trials, space.objective[0].metric) == (3, "valid/clean")
    run = space.base_run
    assert (run.data.name, run.run_name, run.storage) == ("/d/a #1", "[v1]", Path("no"))
    assert read_space(file, ["study=null", "search.earlier="]).study is None
    for contradiction in (["epochs=1", "epochs=2"], ["budget.trials=1", "budget.trials=2"]):
        with pytest.raises(RequestError, match=r": given as 1 and as 2; expected one value"):
            read_space(file, contradiction)


@pytest.mark.parametrize(
    "text", ["no", "007", "a #1", "x: y", "~", "[v1]", "{a}", "*a", " b ", "'"]
)
def test_the_copy_that_a_sweep_keeps_has_the_same_text(text: str, tmp_path: Path) -> None:
    from raytrain.commands.tune import _space_yaml

    values = {
        "description": text,
        "study": text,
        "base": {"run_name": text, "data": text, "model": {"name": text}, "storage": text},
        "space": {
            "model.name": {"branch": {text: {"epochs": {"choice": [1, 2]}}}},
            "data.root": {"choice": [text, None], "when": {"model.name": text}},
        },
    }
    space = SearchSpace.model_validate({"name": text, **values})
    again = read_space(written(tmp_path, _space_yaml(space)))
    assert again.model_dump() == space.model_dump() and again.hash() == space.hash()
    by_hand = read_space(written(tmp_path, {"name": text, **values}))
    assert by_hand.model_dump() == space.model_dump()


# --- the hash ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"description": "other"},
        {"budget": {"trials": 99, "concurrent": 3}},
        {"base": {**DYNAMIC["base"], "workers": 2}},
        {"base": {**DYNAMIC["base"], "tracking_uri": "http://localhost:5000", "storage": "/x"}},
    ],
)
def test_the_hash_ignores_name_budget_and_where_the_work_is_done(change: dict[str, Any]) -> None:
    one = SearchSpace.model_validate({"name": "mine", **DYNAMIC})
    other = SearchSpace.model_validate({"name": "mine", **DYNAMIC, **change})
    assert one.hash() == other.hash()


@pytest.mark.parametrize(
    "change",
    [
        {"space": {"epochs": {"int": [1, 3]}}},
        {"space": {**DYNAMIC["space"], "epochs": {"int": [1, 3]}}},
        {"base": {**DYNAMIC["base"], "epochs": 3}},
        {"objective": {"metric": "valid/clean"}},
        {"objective": {"mode": "min"}},
    ],
)
def test_the_hash_changes_with_what_trials_are_compared_by(change: dict[str, Any]) -> None:
    one = SearchSpace.model_validate({"name": "mine", **DYNAMIC})
    other = SearchSpace.model_validate({"name": "mine", **DYNAMIC, **change})
    assert one.hash() != other.hash()


@pytest.mark.slow
def test_the_hash_is_the_same_after_the_copy_that_a_sweep_keeps(tmp_path: Path) -> None:
    from raytrain.commands.tune import _space_yaml

    for file in [*SPACES, written(tmp_path, DYNAMIC)]:
        space = bundled(file)
        copy = tmp_path / "space.yaml"
        copy.write_text(_space_yaml(space))
        again = read_space(copy)
        assert (again.hash(), again.name, again.budget) == (space.hash(), space.name, space.budget)
