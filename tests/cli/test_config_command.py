"""`raytrain config`, `raytrain --version` and `raytrain train --dry-run`, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from git_helpers import repository
from jsonschema import Draft7Validator
from mlflow import MlflowClient
from test_cli import answer, refusal
from typer.testing import CliRunner

from raytrain.algorithms import RECIPES
from raytrain.cli.app import app
from raytrain.cli.version import _commit, versions
from raytrain.config.request import as_run
from raytrain.data.catalogue import SOURCES

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

SMALL = ("data.train_size=64", "batch_size=32", "algorithm.steps=1", "evaluation.steps=1")


# --- config -----------------------------------------------------------------------------------


def test_every_field_is_a_line_with_path_value_type_and_meaning() -> None:
    lines = answer("config").splitlines()
    said = {line.split()[0]: line for line in lines}
    assert len(said) == len(lines) > 70
    assert said["data.train_size"].split(maxsplit=1)[1] == (
        "null            int > 0 or null               train on this many images only, stratified"
    )
    assert all(name in said["algorithm"] for name in RECIPES)
    assert all(name in said["data"] for name in SOURCES)


def test_words_after_the_path_choose_the_parts() -> None:
    (line,) = answer("config", "algorithm.c_max", "algorithm=dynamic").splitlines()
    assert line.startswith("algorithm.c_max ") and " 0.5 " in line and "FOSC threshold" in line
    (line,) = answer("config", "algorithm.c_max", "algorithm=dynamic", "algorithm.c_max=1").split(
        "\n"
    )[:1]
    assert "1.0 (default 0.5)" in line
    group = answer("config", "algorithm", "algorithm=trades").splitlines()
    assert all(line.startswith("algorithm") for line in group)
    assert [line.split()[0] for line in group][-1] == "algorithm.beta"


def test_fields_are_one_json_object() -> None:
    told = json.loads(answer("config", "ema", "ema=0.9", "--json"))
    assert told == {
        "ema": {
            "type": "float or null",
            "range": "> 0, < 1",
            "choices": [],
            "default": None,
            "required": False,
            "value": 0.9,
            "description": "decay of averaged weights, which are then evaluated",
            "record": False,
            "selects": False,
            "there": True,
        }
    }
    assert len(json.loads(answer("config", "--json"))) > 70


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("config", "trainsize"), ("trainsize: no such field", "data.train_size")),
        (("config", "algorithm.c_max"), ("dynamic has it: algorithm=dynamic",)),
        (("config", "algorithm", "algorithm=dynamc"), ("algorithm: ", "dynamic")),
        (("config", "epochs", "epochs=many"), ("epochs: ", "an integer")),
        (("config", "epochs", "seed"), ("seed: expected key=value",)),
        (("config", "--schema", "sweep"), ("--schema: expected run or space",)),
        (("config", "data", "--schema", "run"), ("--schema: ", "words")),
        (("config", "--yaml", "--json"), ("--yaml: ", "json")),
        (("config", "--yaml", "nope.yaml"), ("nope.yaml: no such file",)),
        (("config", "--yaml", "epoch=3"), ("epoch: no such field", "epochs")),
        (("config", "--yaml", "experiment=../x"), ("experiment: ",)),
    ],
)
def test_a_wrong_request_is_one_sentence(
    words: tuple[str, ...], parts: tuple[str, ...], here: Path
) -> None:
    said = refusal(*words)
    assert all(part in said for part in parts), said
    assert list(here.iterdir()) == []


def test_a_run_file_in_place_of_a_field_is_answered_with_the_option_for_it(here: Path) -> None:
    (here / "run.yaml").write_text("epochs: 3\n")
    assert "config --yaml run.yaml" in refusal("config", "run.yaml")


def test_a_complete_run_file_is_that_of_the_file_and_the_words(here: Path) -> None:
    (here / "run.yaml").write_text("algorithm: dynamic\nepochs: 3\n")
    text = answer("config", "--yaml", "run.yaml", "algorithm.c_max=0.3")
    (here / "complete.yaml").write_text(text)
    assert as_run(here / "complete.yaml") == as_run(
        {"algorithm": {"name": "dynamic", "c_max": 0.3}, "epochs": 3}
    )


@pytest.mark.parametrize(("kind", "values"), [("run", {"epochs": 3}), ("space", {"space": {}})])
def test_schemas_are_json(kind: str, values: dict[str, Any]) -> None:
    schema = json.loads(answer("config", "--schema", kind))
    assert json.loads(answer("config", "--schema", kind, "--json")) == schema
    assert Draft7Validator(schema).is_valid(values)
    assert not Draft7Validator(schema).is_valid({"nonsense": 1})


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["config"], ["ray", "mlflow", "optuna", "sklearn", "torchvision", "scipy", "pyarrow"]),
        (["config", "--schema", "space"], ["ray", "mlflow", "optuna", "sklearn", "torchvision"]),
        (["--version"], ["torch", "pydantic", "ray", "mlflow", "optuna", "sklearn", "rich"]),
    ],
    ids=str,
)
def test_nothing_heavy_is_imported(words: list[str], heavy: list[str]) -> None:
    code = f"""
import sys
from raytrain.cli.app import main
try:
    sys.argv = ["raytrain", *{words!r}]
    main()
finally:
    sys.stderr.write(str([name for name in {heavy!r} if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "[]")


def test_output_that_nobody_reads_to_the_end_is_no_error() -> None:
    code = "from raytrain.cli.app import main; import sys; sys.argv[1:] = ['config', '--schema', 'space']"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; main()"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) == b"{"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(120)) == (b"", 0)
    process.stderr.close()


# --- version ----------------------------------------------------------------------------------


def test_the_version_names_the_packages_and_the_commit_of_a_clone(tmp_path: Path) -> None:
    lines = dict(line.split(" ", 1) for line in answer("--version").splitlines())
    assert list(lines) == ["raytrain", "torch", "ray", "optuna", "mlflow", "python"]
    assert lines["raytrain"].split()[0] == version("raytrain")
    assert lines["torch"] == version("torch")
    assert answer("--version") == versions() + "\n"
    assert _commit(tmp_path) == ""


def test_a_clone_is_named_by_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    for folder, changed in ((tmp_path / "a", False), (tmp_path / "b", True)):
        commit = repository(folder, changed)
        assert _commit(folder) == f"commit {commit[:12]}" + ", changed" * changed
    (tmp_path / "a" / "inner").mkdir()
    assert _commit(tmp_path / "a" / "inner") == ""


# --- train --dry-run --------------------------------------------------------------------------


def test_a_dry_run_tells_configuration_and_cost_and_leaves_nothing_behind(here: Path) -> None:
    text = answer("train", "--dry-run", *SMALL, "algorithm=dynamic", "ema=0.9")
    rows = {line.split("│")[2].strip(): line for line in text.splitlines() if line[:1] == "│"}
    assert rows["ema"].startswith("│ *") and rows["epochs"].startswith("│  ")
    assert rows["algorithm.c_max"].split("│")[3].strip() == "0.5"
    said = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    assert "64 training images" in said["data"]
    assert "2 of 32 images per epoch, 15 epochs, 30 in all" in said["steps"]
    assert "at most 75 FE per image" in said["cost"]
    assert "eager" in said["execution"] and "activations" in said["memory"]
    assert "measured" in said["time"] and "ms each" in said["time"]
    assert list(here.iterdir()) == []


def test_a_dry_run_is_one_json_object(here: Path) -> None:
    told = json.loads(answer("train", "--dry-run", *SMALL, "epochs=2", "--json"))
    run = as_run(None, [*SMALL, "epochs=2"])
    assert told["signature"] == run.signature()
    assert told["config"] == run.model_dump(mode="json")
    assert told["changed"]["epochs"] == {"value": 2, "default": 15}
    assert set(told["changed"]) == {word.split("=")[0] for word in (*SMALL, "epochs=2")}
    assert told["fe"] == 2 * 64 * 5 and told["steps_per_epoch"] == 2
    assert told["flops"] == told["fe"] * told["forward_flops"]
    assert told["measured"]["images"] == 32 and told["seconds"] > 0
    assert told["resumed_after"] == 0
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("epoch=3",),
        ("data=cifar10",),
        ("data=nope.parquet",),
        ("threat.eps=1",),
        ("model=resnet19",),
        ("batch_size=100000",),
        ("experiment=../x",),
        ("performance=graph",),
        ("--resume", "nope"),
        ("tracking_uri=somewhere",),
        ("tracking_uri=sqlite:///nothing/mlflow.db/below.db", "storage=runs"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_a_training_refuses(words: tuple[str, ...], here: Path) -> None:
    (here / "nothing").mkdir()
    (here / "nothing" / "mlflow.db").write_text("no database")
    said = refusal("train", "--dry-run", *SMALL, *words)
    if "below.db" not in words[0]:
        assert said == refusal("train", *SMALL, *words)
    assert [file.name for file in here.iterdir()] == ["nothing"]


def test_a_dry_run_refuses_stores_and_folders_that_cannot_be_used(here: Path) -> None:
    (here / "mlflow.db").write_text("this is no database, although it is long enough to be one")
    said = refusal("train", "--dry-run", *SMALL)
    assert said.startswith("tracking_uri: ") and "file is not a database" in said
    assert said.startswith(refusal("train", *SMALL).split(" (")[0])
    (here / "mlflow.db").unlink()
    (here / "runs").write_text("no folder")
    said = refusal("train", "--dry-run", *SMALL)
    assert said.startswith("storage: ") and "expected a folder" in said
    assert refusal("train", "--dry-run", "--profile", *SMALL).startswith("--profile: ")


def test_workers_that_need_gpus_that_are_not_there_are_refused_without_ray(here: Path) -> None:
    said = refusal("train", "--dry-run", *SMALL, "workers=2", "device=cuda", "gpus_per_worker=100")
    assert said.startswith("workers: 2 workers of 1 CPU and 100 GPU each")
    assert list(here.iterdir()) == []


def test_a_dry_run_of_a_training_that_goes_on_is_of_the_whole_run(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", *SMALL, "epochs=1", "--json"])
    assert result.exit_code == 0, result.output
    run_id = json.loads(result.stdout)["run_id"]
    files = sorted(here.rglob("*"))
    held = (here / "mlflow.db").read_bytes()
    told = json.loads(answer("train", "--dry-run", "--resume", run_id, "epochs=3", "--json"))
    assert (told["resumed_after"], told["epochs"], told["fe"]) == (1, 3, 3 * 64 * 5)
    done = refusal("train", "--dry-run", "--resume", run_id)
    assert done == refusal("train", "--resume", run_id) and done.startswith("epochs: ")
    other = f"tracking_uri=sqlite:///{here}/other.db"
    folder = json.loads(result.stdout)["checkpoints"]
    said = refusal("train", "--dry-run", "--resume", folder, "epochs=3", other)
    assert run_id in said and "no such run to continue" in said
    assert sorted(here.rglob("*")) == files and (here / "mlflow.db").read_bytes() == held
    client = MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("gone"))
    gone = refusal("train", "--dry-run", *SMALL, "experiment=gone")
    assert gone == refusal("train", *SMALL, "experiment=gone")
    assert gone.startswith("experiment: 'gone' was deleted")
