"""A request is a validated run or one sentence: the field or file, and what was expected."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from raytrain.algorithms import RECIPES
from raytrain.config.fields import is_text
from raytrain.config.request import as_run, override, parse_overrides, read_yaml
from raytrain.config.run import RUNTIME, RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.types import ADDED, Spec, in_pixels
from raytrain.data.catalogue import SOURCES
from raytrain.training.run_folder import to_yaml
from raytrain.tuning.space.lookup import paths_of


def complaint(config: Any = None, words: Iterable[str] | Mapping[str, Any] | str = ()) -> str:
    """What a wrong request is answered with: one line, in words that a reader of the help knows."""
    with pytest.raises(RequestError) as caught:
        as_run(config, words.split() if isinstance(words, str) else words)
    said = str(caught.value)
    assert said and "\n" not in said
    for jargon in ("pydantic", "<class", "dictionary", "instance of", "object", "Input", "tag"):
        assert jargon not in said, f"{jargon!r} is the library's word: {said}"
    return said


def run_of(words: str = "", config: Any = None) -> RunConfig:
    return as_run(config, words.split())


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


# --- unknown fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "unknown", "nearest"),
    [
        ("epoch=3", "epoch", "epochs"),
        ("bach_size=3", "bach_size", "batch_size"),
        ("algorithm.step=3", "algorithm.step", "algorithm.steps"),
        ("algorithm=dynamic algorithm.cmax=1", "algorithm.cmax", "algorithm.c_max"),
        (
            "algorithm=dynamic algorithm.decay.exponentt=2",
            "algorithm.decay.exponentt",
            "algorithm.decay.exponent",
        ),
        (
            "algorithm=dynamic algorithm.decay=cosine algorithm.decay.ende=1",
            "algorithm.decay.ende",
            "algorithm.decay.end",
        ),
        ("algorithm.start.radus=2", "algorithm.start.radus", "algorithm.start.radius"),
        ("optimizer.lrr=1", "optimizer.lrr", "optimizer.lr"),
        ("optimizer.schedule.peek=0.3", "optimizer.schedule.peek", "optimizer.schedule.peak"),
        (
            "optimizer.schedule=piecewise optimizer.schedule.milestone=[0.5]",
            "optimizer.schedule.milestone",
            "optimizer.schedule.milestones",
        ),
        ("threat.epss=0.1", "threat.epss", "threat.eps"),
        ("data.validaton=0.2", "data.validaton", "data.validation"),
        ("model.nam=resnet18", "model.nam", "model.name"),
        ("evaluation.step=3", "evaluation.step", "evaluation.steps"),
    ],
)
def test_an_unknown_field_is_named_together_with_the_nearest_one(
    words: str, unknown: str, nearest: str
) -> None:
    said = complaint(words=words)
    assert said.startswith(f"{unknown}: ")
    assert re.search(rf"nearest is {re.escape(nearest)}$", said)


@pytest.mark.parametrize(
    ("words", "unknown", "fields"),
    [
        ("algorithm=natural algorithm.qqqqqq=3", "algorithm.qqqqqq", {"name"}),
        ("optimizer.qqqqqq=3", "optimizer.qqqqqq", {"lr", "momentum", "schedule"}),
        ("optimizer.schedule.qqqqqq=[0.5]", "optimizer.schedule.qqqqqq", {"peak"}),
    ],
)
def test_an_unknown_field_that_is_near_to_none_is_answered_with_all_of_them(
    words: str, unknown: str, fields: set[str]
) -> None:
    said = complaint(words=words)
    assert said.startswith(f"{unknown}: ")
    assert fields <= set(re.findall(r"\w+", said.partition(": ")[2]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "algorithm.c_max=0.3",
            "of algorithm pgd; dynamic has it: algorithm=dynamic algorithm.c_max=0.3",
        ),
        (
            "algorithm=fat algorithm.beta=6",
            "of algorithm fat; trades, mart and l2l have it: algorithm=trades algorithm.beta=6",
        ),
        ("outer=awp outer.rho=0.1", "of outer awp; sam has it: outer=sam outer.rho=0.1"),
        (
            "optimizer.schedule=cosine optimizer.schedule.milestones=[0.5]",
            "of optimizer.schedule cosine; piecewise has it: optimizer.schedule=piecewise "
            "optimizer.schedule.milestones='[0.5]'",
        ),
    ],
)
def test_an_unknown_field_of_other_kinds_of_the_part_names_them_and_how(
    words: str, said: str
) -> None:
    assert complaint(words=words).endswith(f": no such field {said}")
    if "[" not in said:  # the command that is proposed is one
        run_of(said.partition("it: ")[2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lr=0.1", "lr: no such field; expected optimizer.lr"),
        ("algorithm.lr=0.1", "algorithm.lr: no such field; expected optimizer.lr"),
        ("steps=3", "steps: no such field; expected algorithm.steps or evaluation.steps"),
        ("optimizer.epochs=3", "optimizer.epochs: no such field; expected epochs"),
        ("c_max=1", "c_max: no such field; expected algorithm.c_max with algorithm=dynamic"),
        ("algorithm=dynamic c_max=1", "c_max: no such field; expected algorithm.c_max"),
        ("trainsize=9", "trainsize: no such field; the nearest is data.train_size"),
    ],
)
def test_a_field_at_the_wrong_place_is_answered_with_its_paths(words: str, said: str) -> None:
    assert complaint(words=words) == said


def test_a_name_of_a_fixed_list_is_answered_with_the_nearest() -> None:
    assert complaint(words="device=cud").endswith("found 'cud'; the nearest is cuda")


def test_an_unknown_field_in_a_file_is_named_by_its_dotted_path(tmp_path: Path) -> None:
    file = written(tmp_path, "optimizer: {schedule: {kind: cosine, edn: 0.5}}\n")
    assert complaint(file).startswith("optimizer.schedule.edn: ")


def test_an_unknown_field_of_the_parts_of_a_combination_is_named(tmp_path: Path) -> None:
    attack = {"steps": 3, "step_size": "eps/4", "bn": "eval", "stop": {"kind": "gap", "cmax": 1}}
    said = complaint({"algorithm": {"name": "nested", "attack": attack}})
    assert said.startswith("algorithm.attack.stop.") and "c_max" in said


# --- wrong values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        ("epochs=many", "epochs", "an integer"),
        ("epochs=2.5", "epochs", "an integer"),
        ("epochs=true", "epochs", "expected"),
        ("epochs=null", "epochs", "an integer"),
        ("epochs=0", "epochs", "greater than 0"),
        ("epochs.x=3", "epochs", "an integer"),
        ("seed=-1", "seed", "0"),
        ("workers=0", "workers", "greater than 0"),
        ("optimizer.lr=fast", "optimizer.lr", "a number"),
        ("optimizer.lr=0", "optimizer.lr", "greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "finite"),
        ("optimizer.momentum=1", "optimizer.momentum", "less than 1"),
        ("optimizer=3", "optimizer", "a record"),
        ("optimizer=adam", "optimizer", "a record"),
        ("ema=1", "ema", "less than 1"),
        ("precision=fp16", "precision", "bf16"),
        ("device=gpu", "device", "cuda"),
        ("data=", "data", "a record"),
        ("storage=", "storage", "path"),
        ("experiment=", "experiment", "a string"),
        ("seed=0b_", "seed", "not valid YAML"),
        ("seed=2026-11-27", "seed", "an integer"),
        ("seed=1:30", "seed", "an integer"),
        ("data.flip=maybe", "data.flip", "true or false"),
        ("data.validation=1.5", "data.validation", "whole number of images"),
        ("data.validation=0", "data.validation", "greater than 0"),
        ("data.train_size=-3", "data.train_size", "greater than 0"),
        ("evaluation.steps=0", "evaluation.steps", "greater than 0"),
        ("threat=null", "threat", "a record"),
        ("threat.eps=-1", "threat.eps", "0"),
        ("threat.eps=8/0", "threat.eps", "a number"),
        ("threat.eps=.nan", "threat.eps", "expected a number"),
        ("algorithm=null", "algorithm", "a record"),
        ("algorithm.steps=-1", "algorithm.steps", "0"),
        ("algorithm.step_size=0", "algorithm.step_size", "positive"),
        ("algorithm.step_size=big", "algorithm.step_size", "eps/4"),
        ("algorithm.step_size=eps/0", "algorithm.step_size", "eps/4"),
        ("algorithm.start.radius=0", "algorithm.start.radius", "greater than 0"),
    ],
)
def test_a_wrong_value_is_answered_with_its_field_and_what_was_expected(
    words: str, field: str, expected: str
) -> None:
    said = complaint(words=words)
    assert said.startswith(f"{field}: ")
    assert expected in said


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"run_name": 7}, "run_name", "a string, found 7"),
        ({"experiment": None}, "experiment", "a string, found None"),
        ({"experiment": ""}, "experiment", "a string that is not empty, found ''"),
        ({"storage": 5}, "storage", "path, found 5"),
        ({"data": 2026}, "data", "a record, found 2026"),
        ({"data": {"name": 7}}, "data.name", "a string, found 7"),
    ],
)
def test_what_is_no_text_is_refused_in_python(
    values: dict[str, Any], field: str, expected: str
) -> None:
    for said in (complaint(values), complaint(None, values)):
        assert said.startswith(f"{field}: ") and said.endswith(expected)


@pytest.mark.parametrize("eps", ["8", "1.5", "255"])
def test_a_radius_in_grey_levels_is_answered_with_the_fraction_that_was_meant(eps: str) -> None:
    said = complaint(words=f"threat.eps={eps}")
    assert said.startswith("threat.eps: ") and f"{eps}/255" in said


def test_a_radius_in_grey_levels_is_refused_in_a_file_too(tmp_path: Path) -> None:
    said = complaint(written(tmp_path, "threat: {norm: linf, eps: 8}\n"))
    assert said.startswith("threat.eps: ") and "8/255" in said


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1.0), ("l2", 8.0), ("l1", 64.0)])
def test_a_radius_as_wide_as_all_images_is_refused_once_their_shape_is_known(
    norm: str, eps: float
) -> None:
    run = run_of(f"threat.norm={norm} threat.eps={eps}")
    with pytest.raises(RequestError, match=r"^threat\.eps: .*255$"):
        run.check_radius((1, 8, 8))
    run_of(f"threat.norm={norm} threat.eps={0.99 * eps}").check_radius((1, 8, 8))


@pytest.mark.parametrize(
    ("words", "field", "names", "nearest"),
    [
        ("algorithm=dynamc", "algorithm", RECIPES, "dynamic"),
        ("algorithm.name=dynamc", "algorithm", RECIPES, "dynamic"),
        ("threat.norm=l3 threat.eps=1", "threat", ("linf", "l2", "l1"), "found 'l3'"),
        ("optimizer.schedule=onecycl", "optimizer.schedule", ("cosine",), "onecycle"),
        ("optimizer.schedule.kind=piecwise", "optimizer.schedule", ("cosine",), "piecewise"),
        ("algorithm=dynamic algorithm.decay=powr", "algorithm.decay", ("cosine",), "power"),
        ("algorithm.start=rememberd", "algorithm.start", ("zero", "uniform"), "remembered"),
    ],
)
def test_an_unknown_kind_is_answered_with_all_kinds(
    words: str, field: str, names: Iterable[str], nearest: str
) -> None:
    said = complaint(words=words)
    assert said.startswith(field) and nearest in said
    assert all(name in said for name in names)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("threat.norm=l2", "threat.eps"),
        ("threat=l2", "threat.eps"),
        ("algorithm=nested", "algorithm.attack"),
        ("algorithm=nested algorithm.attack.steps=3", "algorithm.attack.step_size"),
    ],
)
def test_a_field_without_a_default_is_asked_for(words: str, field: str) -> None:
    assert complaint(words=words).startswith(f"{field}: missing")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("batch_size=100 workers=3", ("workers", "batch_size")),
        ("optimizer.nesterov=true optimizer.momentum=0", ("optimizer", "nesterov", "momentum")),
        (
            "algorithm=dynamic algorithm.attack_bn=train",
            ("algorithm", "compact=true", "attack_bn=eval"),
        ),
        (
            "optimizer.schedule=piecewise optimizer.schedule.milestones=[0.7,0.5]",
            ("optimizer.schedule", "milestones"),
        ),
    ],
)
def test_an_impossible_combination_names_both_fields(words: str, fields: tuple[str, ...]) -> None:
    said = complaint(words=words)
    assert said.startswith(fields[0])
    assert all(field in said for field in fields)


def test_only_the_first_of_several_mistakes_is_told() -> None:
    said = complaint(words="epochs=0 seed=-1 optimizer.lr=fast")
    assert sum(field in said for field in ("epochs", "seed", "optimizer.lr")) == 1


# --- files and words --------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    said = complaint(tmp_path / "nope.yaml")
    assert said.startswith(f"{tmp_path / 'nope.yaml'}: no such file")


@pytest.mark.parametrize(
    ("text", "line"), [("epochs: 3\noptimizer: {lr: [1\n", 3), ("a: b: c\n", 1), ("\tx: 1\n", 1)]
)
def test_broken_yaml_is_answered_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    file = written(tmp_path, text)
    said = complaint(file)
    assert said.startswith(f"{file}: not valid YAML in line {line}")


def test_a_file_cannot_make_python_objects(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 3\nseed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(RequestError, match=f"^{re.escape(str(file))}: not valid YAML in line 2"):
        read_yaml(file)


@pytest.mark.parametrize(("text", "found"), [("- 1\n- 2\n", "list"), ("hello\n", "str")])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file = written(tmp_path, text)
    said = complaint(file)
    assert said.startswith(f"{file}: expected a mapping") and found in said


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    assert complaint(file).startswith(f"{file}: ")


def test_a_folder_is_not_a_run_file(tmp_path: Path) -> None:
    assert complaint(tmp_path).startswith(f"{tmp_path}: ")


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    assert run_of(config=written(tmp_path, "# nothing\n")) == RunConfig.model_validate({})


@pytest.mark.parametrize("word", ["epochs", "=3", "run.yaml", "--epochs"])
def test_a_word_without_key_and_value_is_refused(word: str) -> None:
    said = complaint(words=[word])
    assert said.startswith(f"{word}: expected key=value")


def test_a_value_that_is_not_yaml_is_refused() -> None:
    assert complaint(words=["epochs=["]).startswith("epochs: the value '['")


# --- overrides --------------------------------------------------------------------------------


def test_fields_of_a_kind_can_be_given_beside_its_bare_name() -> None:
    run = run_of(
        "algorithm=dynamic algorithm.steps=3 algorithm.decay=cosine algorithm.decay.end=1"
    )
    assert run.algorithm.model_dump(include={"name", "steps", "decay"}) == {
        "name": "dynamic",
        "steps": 3,
        "decay": {"kind": "cosine", "end": 1.0},
    }


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm=dynamic", "algorithm.steps=3", "algorithm.decay=cosine", "epochs=2"),
        ("algorithm.name=dynamic", "algorithm.decay.kind=cosine", "algorithm.decay.end=0.5"),
        ("algorithm.name=dynamic", "algorithm.decay=cosine"),
        ("data=cifar10", "data.validation=1000", "data.flip=false"),
        ("threat.norm=l2", "threat.eps=0.5"),
        ("optimizer.schedule=piecewise", "optimizer.schedule.factor=0.5", "optimizer.lr=1e-3"),
        ("algorithm.start=uniform", "algorithm.start.radius=2", "algorithm=pgd"),
    ],
)
@pytest.mark.parametrize("base", [{}, "another"], ids=["from the defaults", "over another run"])
def test_the_order_of_the_words_does_not_matter(words: tuple[str, ...], base: Any) -> None:
    if base == "another":
        other = "algorithm=n_fgsm algorithm.k=3 threat.eps=0.2 optimizer.schedule=cosine"
        base = run_of(other).model_dump(mode="json")
    runs = [as_run(base, order) for order in itertools.permutations(words)]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("choice", ["algorithm=pgd", "algorithm.name=pgd"])
@pytest.mark.parametrize("form", ["record", "bare name"])
def test_another_algorithm_drops_the_fields_of_the_one_before(choice: str, form: str) -> None:
    dynamic: Any = {"name": "dynamic", "c_max": 0.1, "steps": 3} if form == "record" else "dynamic"
    run = run_of(f"{choice} algorithm.step_size=eps", {"algorithm": dynamic})
    assert run.algorithm == run_of("algorithm.step_size=eps").algorithm


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        ({"threat": {"norm": "l1", "eps": 3, "spread": 0.2}}, "threat.norm=l2 threat.eps=1", "l2"),
        ({"threat": {"norm": "l2", "eps": 3}}, "threat.norm=linf", "linf"),
    ],
)
def test_another_norm_drops_the_radius_of_the_one_before(
    before: Any, words: str, after: str
) -> None:
    assert run_of(words, before).threat == run_of(words).threat
    assert run_of(words, before).threat.norm == after


def test_another_schedule_drops_the_fields_of_the_one_before() -> None:
    run = run_of("optimizer.schedule.kind=cosine", {"optimizer": {"schedule": {"peak": 0.1}}})
    assert run.optimizer.schedule.model_dump() == {"kind": "cosine", "end": 1.0}


@pytest.mark.parametrize("word", ["algorithm=pgd", "algorithm.name=pgd"])
def test_choosing_the_same_kind_again_keeps_its_fields(word: str) -> None:
    run = run_of(word, {"algorithm": {"name": "pgd", "steps": 3}})
    assert run.algorithm == run_of("algorithm.steps=3").algorithm


@pytest.mark.parametrize(
    ("before", "preset", "after"),
    [
        ({"steps": 3}, "official", {"name": "dynamic", "preset": "official"}),
        ({"steps": 3, "preset": "paper"}, "official", {"name": "dynamic", "preset": "official"}),
        ({"steps": 3, "preset": "paper"}, None, {"name": "dynamic", "preset": None}),
        ({"steps": 3, "preset": "paper"}, "paper", {"name": "dynamic", "preset": "paper"}),
    ],
)
def test_another_preset_drops_all_but_the_name_and_the_same_one_nothing(
    before: dict[str, Any], preset: str | None, after: dict[str, Any]
) -> None:
    values = {"algorithm": {"name": "dynamic", **before}, "epochs": 3}
    kept = {"steps": 3} if before.get("preset") == preset else {}
    found = override(values, {"algorithm.preset": preset})
    assert found == {"algorithm": {**after, **kept}, "epochs": 3}


def test_naming_a_data_set_keeps_what_else_was_said_of_data() -> None:
    run = run_of("data=cifar10", {"data": {"name": "digits", "validation": 1000}})
    assert (run.data.name, run.data.validation) == ("cifar10", 1000)
    assert run_of("data=cifar10 data.validation=1000").data == run.data


@pytest.mark.parametrize("model", ["resnet18", {"name": "resnet18"}])
def test_a_model_is_its_name_or_its_record(model: Any) -> None:
    run = run_of("model.normalise=false", {"model": model})
    assert (run.model.name, run.model.normalise) == ("resnet18", False)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("8/255", 8 / 255),
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("0.05", 0.05),
        ("0", 0.0),
        ("2.5/255", 2.5 / 255),
    ],
)
def test_a_pixel_quantity_is_a_number_or_a_fraction(
    word: str, value: float, tmp_path: Path
) -> None:
    assert run_of(f"threat.eps={word}").threat.eps == value
    assert run_of(config=written(tmp_path, f"threat: {{eps: {word}}}\n")).threat.eps == value


@pytest.mark.parametrize("word", ["1e-3", "1E-3", "1.0e-3", "0.001"])
def test_a_learning_rate_may_be_written_with_an_exponent(word: str) -> None:
    assert run_of(f"optimizer.lr={word}").optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("word", "pixels"), [("2/255", 2 / 255), ("eps/4", 0.05), ("1.25*eps", 0.25), ("0.01", 0.01)]
)
def test_a_step_size_is_in_pixels_or_in_multiples_of_eps(word: str, pixels: float) -> None:
    run = run_of(f"threat.eps=0.2 algorithm=pgd algorithm.step_size={word}")
    assert in_pixels(run.algorithm.model_dump()["step_size"], run.threat.eps) == pytest.approx(
        pixels, rel=1e-12
    )


def test_overriding_changes_neither_the_mapping_nor_the_run_it_starts_from() -> None:
    values = {"optimizer": {"lr": 0.3}, "algorithm": "dynamic"}
    run = run_of()
    override(values, {"optimizer.lr": 1, "algorithm.steps": 3, "data": "cifar10"})
    as_run(run, ["optimizer.lr=3"])
    assert values == {"optimizer": {"lr": 0.3}, "algorithm": "dynamic"}
    assert run == run_of()


def test_a_record_and_its_fields_may_be_given_beside_one_another() -> None:
    words = ["algorithm={steps: 3}", "algorithm.name=dynamic", "algorithm.decay=cosine"]
    algorithm = {"name": "dynamic", "steps": 3, "decay": {"kind": "cosine"}}
    for order in itertools.permutations(words):
        assert as_run(None, order) == as_run({"algorithm": algorithm})
    words = ["algorithm={preset: official}", "algorithm.name=dynamic", "algorithm.decay=cosine"]
    algorithm = {"name": "dynamic", "preset": "official", "decay": {"kind": "cosine"}}
    for order in itertools.permutations(words):
        assert as_run(None, order) == as_run({"algorithm": algorithm})


def test_a_whole_record_replaces_the_one_before() -> None:
    before = {"algorithm": {"name": "dynamic", "c_max": 0.3}, "data": {"validation": 1000}}
    for changes in (["algorithm={steps: 3}", "data={}"], {"algorithm": {"steps": 3}, "data": {}}):
        assert as_run(before, changes) == run_of("algorithm.steps=3")


def test_a_bare_name_is_a_kind_only_where_there_are_kinds() -> None:
    for values in ("start=eps/4", "{start: eps/4}", "{start: eps/4, until: 1}"):
        key = "curriculum.step_size" + ("=" if values[0] == "{" else ".")
        assert as_run(None, [key + values]).curriculum["step_size"].start == "eps/4"
    assert as_run(None, ["model.kwargs.start=zero"]).model.kwargs == {"start": "zero"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["epochs=1", "epochs=3"], "epochs: given as 1 and as 3; expected one value"),
        (["data=a", "data=b"], "data: given as 'a' and as 'b'; expected one value"),
        (["data=a", "data.name=b"], "data: given as 'a' and data.name as 'b'; "),
        (["data={name: a}", "data=b"], "data: given as {'name': 'a'} and as 'b'; "),
        (["data={root: a}", "data.root=b"], "data: given as {'root': 'a'} and data.root as 'b'; "),
        (["algorithm=pgd", "algorithm.name=dynamic"], "algorithm: given as 'pgd' and "),
        (
            ["sentinels=null", "sentinels.stop.zero_grad=0.5"],
            "sentinels: given as None and sentinels.stop.zero_grad as 0.5; expected one value",
        ),
        (["early_stop=3", "early_stop.min_gain=0.1"], "early_stop: given as 3 and "),
    ],
)
def test_words_that_contradict_one_another_are_refused(words: list[str], said: str) -> None:
    assert complaint(words=words).startswith(said)


def test_a_word_may_be_repeated() -> None:
    words = ["epochs=3", "data=cifar10", "data.name=cifar10", "epochs=3"]
    assert as_run(None, words) == as_run({"epochs": 3, "data": "cifar10"})


# --- text -------------------------------------------------------------------------------------

TEXTS = (
    "data",
    "data.name",
    "data.root",
    "data.test_path",
    "data.image_column",
    "data.label_column",
    "data.extra",
    "model",
    "model.name",
    "model.weights",
    "storage",
    "experiment",
    "run_name",
    "tracking_uri",
)
OPTIONAL = {
    "data.root",
    "data.test_path",
    "data.image_column",
    "data.label_column",
    "data.extra",
    "model.weights",
    "run_name",
    "tracking_uri",
}
NULLS = ("null", "Null", "NULL", "~")
UGLY = (
    """
/d/a #1/train.parquet|try #7|#|x: y|a: b: c|:|[v1]/z|[|{weird}.parquet|}{|a,b|- x|-|---|...|?|? x
007|1e3|0x1f|0b_|1_000|1:30|.5|.inf|.nan|2026-11-27|2026-13-45|no|yes|on|Off|True|false|none|~|NULL
*a|&b|!x|!!int 7|@x|`x`|%x|<<|=|a=b|==|"quoted|"quoted"|'quoted'|it's|'|"|\\n|\\|> x|>|$HOME|é ☃ 😀
""".strip()
    .replace("\n", "|")
    .split("|")
    + [" both ", "tab\t", "two\nlines", "|", "| x", "\u2028", "\x85"]
)


def field_at(values: Any, field: str) -> Any:
    for key in field.split("."):
        values = values[key] if isinstance(values, dict) else getattr(values, key)
    return values


def test_the_fields_of_text_are_these() -> None:
    fields = {*paths_of(RunConfig.model_validate({})), "data", "model"}
    assert {path for path in fields if is_text(RunConfig, tuple(path.split(".")))} == set(TEXTS)


@pytest.mark.parametrize("field", TEXTS)
def test_a_word_gives_a_text_field_what_is_written_after_its_equals_sign(field: str) -> None:
    for text in UGLY:
        assert parse_overrides([f"{field}={text}"]) == {field: text}


@pytest.mark.parametrize("field", TEXTS)
def test_a_file_gives_a_text_field_what_is_written_there(field: str, tmp_path: Path) -> None:
    def read(scalar: str) -> Any:
        parent, _, last = field.rpartition(".")
        line = f"{last}: {scalar}\n"
        file = written(tmp_path, f"{parent}:\n  {line}" if parent else line)
        return field_at(read_yaml(file), field)

    for text in UGLY:
        assert read(yaml.safe_dump(text, default_style='"')) == text
        if text not in NULLS and is_plain(text):
            assert read(text) == text


def is_plain(text: str) -> bool:
    """Whether YAML takes the text for a scalar without quotes, escapes, comments and the like."""
    try:
        return yaml.load(f"x: {text}", yaml.BaseLoader) == {"x": text}
    except yaml.YAMLError:
        return False


def test_what_yaml_guesses_of_text_is_not_believed(tmp_path: Path) -> None:
    text = "run_name: 007\nexperiment: no\ndata: 2026\nmodel: {name: 1e3}\nstorage: 2026-11-27\n"
    run = as_run(written(tmp_path, text))
    assert (run.run_name, run.experiment, run.data.name) == ("007", "no", "2026")
    assert (run.model.name, run.storage) == ("1e3", Path("2026-11-27"))


@pytest.mark.parametrize("field", TEXTS)
def test_null_and_nothing_leave_a_text_unset_where_it_may_be(field: str) -> None:
    assert parse_overrides([f"{field}="]) == {field: None}
    assert parse_overrides([f"{field}=null"]) == {field: None if field in OPTIONAL else "null"}


@pytest.mark.parametrize("null", [*NULLS, ""])
def test_an_unquoted_null_in_a_file_is_no_text(null: str, tmp_path: Path) -> None:
    run = as_run(written(tmp_path, f"run_name: {null}\ndata: {{root: {null}, name: mnist}}\n"))
    assert (run.run_name, run.data.root) == (None, None)
    assert complaint(written(tmp_path, f"experiment: {null}\n")).startswith("experiment: expected")
    assert as_run(written(tmp_path, f"run_name: '{null}'\n")).run_name == null


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back_from_the_file_that_keeps_it(text: str) -> None:
    run = RunConfig.model_validate({})
    data = {"name": text, "root": Path(text), "test_path": Path(text), "image_column": text}
    run = run.model_copy(
        update={
            "data": run.data.model_copy(update=data),
            "model": run.model.model_copy(
                update={"name": text, "weights": Path(text), "kwargs": {text: text}}
            ),
            "storage": Path(text),
            **dict.fromkeys(("experiment", "run_name", "tracking_uri"), text),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(to_yaml(run))
        assert read_yaml(file) == run.model_dump(mode="json")
    assert json.loads(run.model_dump_json()) == run.model_dump(mode="json")


def test_a_record_in_braces_stands_beside_its_bare_name() -> None:
    run = as_run(None, ["data={name: 007, root: no, validation: 1000}", "model={name: 1e3}"])
    assert (run.data.name, run.data.root, run.data.validation) == ("007", Path("no"), 1000)
    assert run.model.name == "1e3"
    assert parse_overrides(["run_name={name: 007}"]) == {"run_name": "{name: 007}"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data={weird}", "data.weird: no such field"),
        ("data={a}/{b}", "data: the value '{a}/{b}' is not valid YAML"),
        ("data={name: a, name: a}", "data.name: given a second time"),
        ("optimizer={lr: 1, momentum: 0, lr: 2}", "optimizer.lr: given a second time"),
        ("epochs=3 # three", "epochs: the value '3 # three' is not valid YAML"),
        ("epochs=#3", "epochs: the value '#3' is not valid YAML"),
        ("device=cpu #1", "device: the value 'cpu #1' is not valid YAML"),
        ("nonsense=a: b: c", "nonsense: no such field"),
        ("storage=\udcff", "storage: expected text in UTF-8"),
    ],
)
def test_what_is_neither_a_value_nor_a_text_is_refused(word: str, said: str) -> None:
    assert complaint(words=[word]).startswith(said)


def test_values_that_are_no_text_are_read_as_yaml() -> None:
    words = [
        "epochs=3",
        "registry=no",
        "optimizer.schedule.milestones=[0.5, 1/3]",
        "ema=",
        "early_stop=null",
        "algorithm.step_size=eps/4",
        "threat.eps=8/255",
        "model.kwargs.width=007",
        "model.kwargs.name='007'",
        "model.kwargs={on: {1: x}}",
        "seed=010",
        "curriculum={eps: {start: 0}}",
    ]
    assert parse_overrides(words) == {
        "epochs": 3,
        "registry": False,
        "optimizer.schedule.milestones": [0.5, "1/3"],
        "ema": None,
        "early_stop": None,
        "algorithm.step_size": "eps/4",
        "threat.eps": "8/255",
        "model.kwargs.width": "007",
        "model.kwargs.name": "007",
        "model.kwargs": {"on": {"1": "x"}},
        "seed": "010",
        "curriculum": {"eps": {"start": 0}},
    }
    assert run_of("seed=010").seed == 10


# --- forms and round trips --------------------------------------------------------------------


def test_a_run_a_mapping_and_a_file_mean_the_same(tmp_path: Path) -> None:
    values = {
        "data": "cifar10",
        "algorithm": {"name": "dynamic", "c_max": 0.3},
        "threat": {"eps": "8/255"},
    }
    file = written(tmp_path, yaml.safe_dump(values))
    forms = [values, file, str(file), RunConfig.model_validate(values)]
    changes = ["epochs=7", "algorithm.steps=5"]
    runs = [as_run(form, changes) for form in forms]  # type: ignore[arg-type]
    runs.append(as_run(values, {"epochs": 7, "algorithm.steps": 5}))
    assert all(run == runs[0] for run in runs)
    assert (runs[0].epochs, runs[0].algorithm.model_dump()["steps"]) == (7, 5)


def test_nothing_asked_for_is_the_default_run() -> None:
    assert as_run(None) == as_run({}) == RunConfig.model_validate({})


RUNS = {
    "default": "",
    **{name: f"algorithm={name}" for name in RECIPES if name != "nested"},
    "l2": "threat.norm=l2 threat.eps=128/255 algorithm.step_size=eps/7",
    "l1": "threat.norm=l1 threat.eps=12 threat.spread=0.2 algorithm.start=zero",
    "endless": "algorithm=dynamic algorithm.c_max=-.inf algorithm.decay=cosine",
    "cifar": "data=cifar10 data.validation=1000 data.root=/data/x data.flip=false",
    "pieces": "optimizer.schedule=piecewise optimizer.schedule.milestones=[1/3,0.9] ema=0.999",
    "combination": "algorithm=nested algorithm.attack.steps=3 algorithm.attack.step_size=2/255 "
    "algorithm.attack.bn=train algorithm.attack.stop=gap algorithm.attack.stop.c_max=1/3 "
    "algorithm.attack.compact=false",
    "elsewhere": "workers=2 device=cpu run_name=it storage=/x/y tracking_uri=http://h:1 seed=3",
}


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_run_written_as_yaml_reads_back_equal_with_the_same_signature(
    words: str, tmp_path: Path
) -> None:
    run = run_of(words)
    again = as_run(written(tmp_path, to_yaml(run)))
    assert again == run
    assert again.signature() == run.signature()
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


def test_a_signature_is_twelve_digits_and_the_same_in_every_process() -> None:
    assert re.fullmatch("[0-9a-f]{12}", run_of().signature())
    assert run_of("threat.eps=0.1").signature() == run_of().signature()


@pytest.mark.parametrize(
    "word",
    ["epochs=3", "seed=1", "threat.eps=0.2", "data.train_size=9", "evaluation.steps=3", "ema=0.9"],
)
def test_a_signature_changes_with_what_is_computed(word: str) -> None:
    assert run_of(word).signature() != run_of().signature()


def test_a_signature_is_that_of_earlier_versions_and_not_of_how_images_are_held() -> None:
    """The one with which runs with all defaults are recorded; a new field must not change it."""
    assert run_of().signature() == "0ce193015dbd"
    held = run_of("data.in_memory=false")
    assert held.signature() == run_of().signature() and "in_memory" not in str(held.computed())


class _Part(Spec):
    """A part as a later version has it: `new` was added."""

    old: int = 1
    new: Annotated[tuple[int, ...] | None, ADDED] = None


class _LaterRun(RunConfig):
    part: _Part = _Part()
    parts: dict[str, tuple[_Part, ...]] = {"a": (_Part(),)}
    new: Annotated[int, ADDED, Field(ge=0)] = 3


def test_added_fields_are_computed_only_where_they_are_not_the_default_at_any_depth() -> None:
    run = _LaterRun.model_validate({})
    assert run.computed() == {
        **run_of().computed(),
        "part": {"old": 1},
        "parts": {"a": [{"old": 1}]},
    }
    later = {"part": {"new": [2]}, "parts": {"a": [{"new": [4]}]}, "new": 5}
    changed = _LaterRun.model_validate(later)
    assert changed.computed() == {
        **run_of().computed(),
        "part": {"old": 1, "new": [2]},
        "parts": {"a": [{"old": 1, "new": [4]}]},
        "new": 5,
    }
    signatures = {
        _LaterRun.model_validate({key: value}).signature() for key, value in later.items()
    }
    assert len({run.signature(), *signatures}) == 4
    assert _LaterRun.model_validate(run.model_dump(mode="json")) == run


def test_a_signature_does_not_change_with_where_a_run_happens() -> None:
    elsewhere = {
        "workers": 2,
        "device": "cpu",
        "cpus_per_worker": 2,
        "gpus_per_worker": 0.5,
        "max_failures": 0,
        "storage": "/x",
        "experiment": "e",
        "run_name": "n",
        "tracking_uri": "u",
        "registry": False,
        "checkpoint_every": 3,
        "checkpoint_minutes": 1.5,
        "min_workers": 1,
        "performance": {"mode": "eager", "channels_last": False},
    }
    assert set(elsewhere) == RUNTIME
    assert as_run(elsewhere).signature() == run_of().signature()


def test_every_field_that_says_where_a_run_happens_exists() -> None:
    assert set(RunConfig.model_fields) >= RUNTIME


# --- customary radii --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_the_radius_is_the_customary_one_of_the_data_set(name: str) -> None:
    forms: list[Any] = [{"data": name}, {"data": {"name": name}}, {"data": {"name": name}}]
    forms[2]["threat"] = {"norm": "linf"}
    for form in forms:
        threat = as_run(form).threat
        assert (threat.norm, threat.eps) == ("linf", SOURCES[name].eps)
    assert as_run(None, [f"data={name}"]).threat.eps == SOURCES[name].eps


def test_the_customary_radii_are_those_of_the_literature() -> None:
    customary = {name: run_of(f"data={name}").threat.eps for name in SOURCES}
    assert customary["digits"] == customary["fashion_mnist"] == 0.1
    assert customary["mnist"] == 0.3
    assert customary["cifar10"] == customary["cifar100"] == customary["svhn"] == 8 / 255


def test_images_of_ones_own_get_the_radius_of_photographs() -> None:
    assert run_of("data=images/train.parquet").threat.eps == 8 / 255


def test_a_radius_that_is_given_is_kept() -> None:
    assert run_of("data=cifar10 threat.eps=4/255").threat.eps == 4 / 255


def test_a_bare_norm_is_its_record() -> None:
    assert run_of("threat=linf").threat == run_of().threat
    assert (
        run_of("threat=l2 threat.eps=0.5").threat == run_of("threat.norm=l2 threat.eps=0.5").threat
    )


def test_a_yaml_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, "a: {b: 8/255}\n")
    assert read_yaml(file) == {"a": {"b": "8/255"}}
