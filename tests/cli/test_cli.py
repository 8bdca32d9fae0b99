"""The command: its help, its exit status, one sentence on stderr, one JSON object on stdout."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from raytrain.algorithms import RECIPES
from raytrain.cli.app import app, split
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.outer import OUTERS
from raytrain.tracking import tracking_uri
from raytrain.tracking.run_names import run_of
from raytrain.training.checkpoint import load

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

OUTSIDE = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
COMMANDS = ("train", "tune", "evaluate", "compare", "export", "ui", "algorithms", "config")
QUICK = ("data.train_size=128", "evaluation.steps=1", "batch_size=64", "algorithm.steps=1")
SMALL = (*QUICK, "epochs=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one small run has been trained."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, ["train", *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    (folder / "train.json").write_text(result.stdout)
    (folder / "train.err").write_text(result.stderr)
    return folder


def answer(*words: str, status: int = 0) -> str:
    """What the command prints on stdout, in this process."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    return result.stdout


def refusal(*words: str, status: int = 2) -> str:
    """The one line on stderr with which the command refuses."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("raytrain: ") and "Traceback" not in line
    return line.removeprefix("raytrain: ")


def runs_in(folder: Path, experiment: str = "raytrain") -> list[Any]:
    """The runs in the folder's own store; none if there is no store."""
    if not (folder / "mlflow.db").is_file():
        return []
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


# --- help and imports -------------------------------------------------------------------------


def test_a_wrong_request_ends_the_process_with_status_two_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from raytrain.cli.app import main; main()", "train", "epoch=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "raytrain: epoch: no such field; the nearest is epochs\n"


def test_the_root_help_names_every_command() -> None:
    text = answer("--help")
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    text = answer(name, "--help")
    assert "Usage" in text and "--debug" in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ui"])
def test_every_command_with_a_result_prints_it_as_json_on_request(name: str) -> None:
    assert "--json" in answer(name, "--help")


@pytest.mark.parametrize("words", [["nonsense"], ["train", "--nonsense"], ["evaluate"]])
def test_a_wrong_command_line_has_exit_status_two(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_asking_for_help_imports_nothing_heavy(words: list[str]) -> None:
    heavy = ["torch", "ray", "mlflow", "optuna", "torchvision", "sklearn"]
    if not words:
        heavy.append("pydantic")  # typer itself takes it to read the options of a command
    code = f"""
import sys
import raytrain
from raytrain.cli.app import app
from typer.testing import CliRunner
assert CliRunner().invoke(app, {[*words, "--help"]!r}).exit_code == 0
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_api_has_the_names_it_promises() -> None:
    import raytrain

    assert {"train", "evaluate", "tune", "RunConfig", "RequestError"} <= set(raytrain.__all__)
    assert all(getattr(raytrain, name) is not None for name in raytrain.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        raytrain.__getattr__("trian")


def test_the_first_word_is_a_file_unless_it_sets_a_field() -> None:
    assert split(None) == (None, [])
    assert split(["run.yaml"]) == (Path("run.yaml"), [])
    assert split(["run.yaml", "epochs=3"]) == (Path("run.yaml"), ["epochs=3"])
    assert split(["epochs=3", "seed=1"]) == (None, ["epochs=3", "seed=1"])
    long = f"run_name={'x' * 5000}"
    assert split([long]) == (None, [long])


def test_a_file_may_have_an_equals_sign_in_its_name(here: Path) -> None:
    (here / "lr=0.1").mkdir()
    (here / "lr=0.1" / "run.yaml").write_text("epoch: 3\n")
    assert split(["lr=0.1/run.yaml", "seed=1"]) == (Path("lr=0.1/run.yaml"), ["seed=1"])
    assert refusal("train", "lr=0.1/run.yaml").startswith("epoch: no such field")
    assert split(["lr=0.1/none.yaml"]) == (None, ["lr=0.1/none.yaml"])


# --- the catalogue ----------------------------------------------------------------------------


def test_the_catalogue_lists_every_algorithm() -> None:
    text = answer("algorithms")
    assert all(name in text for name in (*RECIPES, *OUTERS))
    assert set(json.loads(answer("algorithms", "--json"))) == {*RECIPES, *OUTERS}


@pytest.mark.parametrize("name", [*RECIPES, *OUTERS])
def test_an_algorithm_tells_its_paper_its_cost_and_its_hyperparameters(name: str) -> None:
    told = json.loads(answer("algorithms", name, "--json"))
    assert told["name"] == name and told["paper"] and told["rule"] and told["cost"]
    fields = set({**RECIPES, **OUTERS}[name].model_fields) - {"name"}
    assert fields <= {row["name"] for row in told["hyperparameters"]}
    text = answer("algorithms", name)
    assert all(field in text for field in fields)


def test_dynamic_training_tells_the_ranges_to_search() -> None:
    rows = json.loads(answer("algorithms", "dynamic", "--json"))["hyperparameters"]
    ranges = {row["name"]: row["range"] for row in rows}
    assert all(ranges[name] for name in ("c_max", "steps", "step_size", "decay.kind"))


def test_an_unknown_algorithm_is_answered_with_the_known_ones() -> None:
    said = refusal("algorithms", "nope")
    assert said.startswith("nope: ") and all(name in said for name in RECIPES)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("algorithms", "dynamik"), "dynamic"),
        (("algorithms", "AWP"), "awp"),
        (("tune", "--resume", "lrstpe"), "lrstep"),
        (("tune", "--resume", "lrstpe", "experiment=raytrain"), "lrstep"),
        (("train", "data=cifra10"), "cifar10"),
        (("train", "model=resnt18"), "resnet18"),
        (("evaluate", "last", "attacks=pgdd"), "pgd"),
        (("evaluate", "last", "stepz=50"), "steps"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(
    words: tuple[str, ...], near: str, here: Path
) -> None:
    file = here / "runs/raytrain/lrstep/space.yaml"
    file.parent.mkdir(parents=True)
    file.touch()
    assert refusal(*words).endswith(f"; the nearest is {near}")


def test_a_field_of_a_run_that_an_evaluation_may_change_is_named_by_its_path(here: Path) -> None:
    assert refusal("evaluate", "last", "eps=8/255").endswith("; expected threat.eps")


# --- wrong requests ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train", "epoch=3"), ("epoch: no such field", "epochs")),
        (("train", "threat.eps=8"), ("threat.eps: ", "8/255")),
        (("train", "algorithm=dynamc"), ("algorithm: ", "dynamic")),
        (("train", "epochs=many"), ("epochs: ", "an integer")),
        (("train", "epochs=3", "run.yaml"), ("run.yaml: expected key=value",)),
        (("train", "nope.yaml"), ("nope.yaml: no such file",)),
        (("train", "data=cifar11"), ("data.name: ", "cifar10")),
        (("train", "data=nope.parquet"), ("data.name: ", "nope.parquet")),
        (("train", "data=cifar10"), ("data.root: ", "cifar10")),
        (("train", "model=resnet19"), ("model.name: ", "resnet18")),
        (("train", "threat.eps=1"), ("threat.eps: ", "1/255")),
        (("train", "batch_size=100000"), ("batch_size: ",)),
        (("train", "data.validation=100000"), ("data.validation: ",)),
        (("train", "batch_size=64", "workers=3"), ("workers: ", "batch_size")),
        (("train", "--resume", "nope"), ("nope: neither a checkpoint nor",)),
        (("tune",), ("SPACE.yaml: ", "--resume")),
        (("tune", "nope.yaml"), ("nope.yaml: no such file",)),
        (("tune", "--resume", "nope"), ("--resume: there is no sweep nope",)),
        (("evaluate", "nonsense"), ("nonsense: neither a checkpoint nor",)),
        (("evaluate", "nonsense", "--which", "worst"), ("--which: ", "best or last")),
        (("evaluate", "nonsense", "epochs=3"), ("epochs: ", "steps", "threat")),
        (("evaluate", "nonsense", "attacks=bim"), ("attacks", "pgd")),
        (("evaluate", "nonsense", "steps"), ("steps: expected key=value",)),
        (("evaluate", "nonsense", "steps=3", "steps=4"), ("steps: given as 3 and as 4",)),
        (("evaluate", "nonsense", "attacks=pgd #1"), ("attacks: ", "comment")),
        (("evaluate", "nonsense", "tracking_uri=a: b: c"), ("nonsense: neither",)),
        (("evaluate", "nonsense", "attacks=pgd, aa", "data=a #1"), ("nonsense: neither",)),
        (("evaluate", "*"), ("*: neither a checkpoint nor",)),
        (("train", "--resume", "*"), ("*: neither a checkpoint nor",)),
        (("train", "epochs=1", "epochs=3"), ("epochs: given as 1 and as 3; expected one",)),
        (("train", "data=/d/a #1/x.parquet"), ("data.name: ", "/d/a #1/x.parquet")),
        (("train", "data={weird}.parquet"), ("data.name: ", "{weird}.parquet")),
        (("train", "model=no"), ("model.name: ", "'no'")),
        (("tune", "--resume", "*"), ("--resume: there is no sweep *",)),
        (("tune", "--resume", "x", "storage=a #1"), ("there is no sweep x below a #1",)),
        (("export", "nonsense", "--format", ","), ("--format: ", "found none")),
        (("export", "nonsense", "--format", "onnx, safetensors"), ("nonsense: neither",)),
        (("ui",), ("mlflow.db: no such MLflow database",)),
    ],
)
def test_a_wrong_request_is_one_sentence_on_stderr_and_leaves_nothing_behind(
    words: tuple[str, ...], parts: tuple[str, ...], here: Path
) -> None:
    said = refusal(*words)
    assert all(part in said for part in parts), said
    assert list(here.iterdir()) == []


def test_broken_yaml_is_answered_with_file_and_line(here: Path) -> None:
    (here / "run.yaml").write_text("epochs: 3\noptimizer: {lr: [\n")
    assert refusal("train", "run.yaml").startswith("run.yaml: not valid YAML in line 3")


def test_a_file_that_is_no_checkpoint_is_refused(here: Path) -> None:
    (here / "weights.pt").write_bytes(b"PK\x03\x04 truncated")
    said = refusal("evaluate", "weights.pt")
    assert "weights.pt: not a checkpoint" in said
    (here / "folder").mkdir()
    assert "best.pt" in refusal("evaluate", "folder")


def test_a_key_given_twice_in_a_file_is_answered_with_file_and_line(here: Path) -> None:
    (here / "run.yaml").write_text("epochs: 3\nseed: 1\nepochs: 3\n")
    for command in ("train", "tune"):
        assert refusal(command, "run.yaml") == "run.yaml:3: epochs: given a second time"


def test_blanks_around_what_the_environment_says_are_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytrain.distributed.ray_session import wanted_cluster

    for name in OUTSIDE:
        monkeypatch.setenv(name, " \n")
    assert wanted_cluster() is None
    assert refusal("ui").startswith(f"{here / 'mlflow.db'}: no such MLflow database")
    for name in OUTSIDE:
        monkeypatch.setenv(name, " http://host:5000\n")
    assert wanted_cluster() == "http://host:5000"
    assert tracking_uri(None) == "http://host:5000"


def test_a_truncated_parquet_file_is_refused_before_any_run_is_made(here: Path) -> None:
    images = pa.FixedSizeListArray.from_arrays(pa.array(list(range(64)) * 20, pa.uint8()), 64)
    table = pa.table({"image": images, "label": [i % 2 for i in range(20)]})
    pq.write_table(table, here / "train.parquet")
    whole = (here / "train.parquet").read_bytes()
    (here / "train.parquet").write_bytes(whole[: len(whole) // 2])
    said = refusal("train", "data=train.parquet")
    assert "train.parquet" in said and "whole Parquet file" in said
    assert runs_in(here) == [] and not (here / "runs").exists()


def test_a_gpu_that_is_not_there_is_refused_before_any_run_is_made(here: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    said = refusal("train", *SMALL, "device=cuda")
    assert said.startswith("device: ") and "CUDA" in said
    assert runs_in(here) == []


def test_an_mlflow_server_that_does_not_answer_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = refusal("train", *SMALL, "tracking_uri=http://127.0.0.1:9")
    assert said.startswith("tracking_uri: MLflow at http://127.0.0.1:9 does not answer")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("words", [("train", "epoch=3"), ("algorithms", "nope")])
def test_the_traceback_is_shown_on_request_and_the_exit_status_stays(
    words: tuple[str, ...], here: Path
) -> None:
    said = refusal(*words)
    result = CliRunner().invoke(app, [*words, "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "RequestError" in result.stderr
    assert said in result.stderr


# --- training ---------------------------------------------------------------------------------


def last_object(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def test_training_prints_one_json_object_and_nothing_else_on_stdout(home: Path) -> None:
    text = (home / "train.json").read_text()
    assert len(text.splitlines()) == 1
    told = json.loads(text)
    assert told["status"] == "FINISHED" and len(told["run_id"]) == 32
    assert {"valid/clean", "valid/robust", "train/fosc", "cost/fe"} <= set(told["metrics"])
    assert Path(told["checkpoints"]).joinpath("last.pt").is_file()


def test_training_tells_its_progress_in_plain_lines_where_there_is_no_terminal(
    home: Path,
) -> None:
    told = last_object((home / "train.json").read_text())
    first, epoch = (home / "train.err").read_text().splitlines()
    assert first.startswith("training: ") and f"run {told['run_id'][:8]};" in first
    assert epoch.startswith("epoch 1/1 *")  # the best so far


def test_a_finished_training_is_in_mlflow_with_all_that_was_decided(home: Path) -> None:
    told = last_object((home / "train.json").read_text())
    (run,) = runs_in(home)
    assert (run.info.run_id, run.info.status) == (told["run_id"], "FINISHED")
    assert run.data.params["algorithm.steps"] == "1"
    assert run.data.metrics["valid/robust"] == told["metrics"]["valid/robust"]
    assert run.data.tags["signature"] == told["signature"]
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"run.yaml", "checkpoints"} <= files


def test_the_run_files_a_training_leaves_are_the_run_that_was_asked_for(home: Path) -> None:
    told = last_object((home / "train.json").read_text())
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    artifact = Path(client.download_artifacts(told["run_id"], "run.yaml", str(home)))
    asked = as_run(None, SMALL).signature()
    for file in (artifact, Path(told["checkpoints"]) / "run.yaml"):
        assert as_run(file).signature() == told["signature"] == asked, file


def test_evaluating_prints_one_json_object_last_and_records_it_on_the_run(
    home: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    run_id = last_object((home / "train.json").read_text())["run_id"]
    told = last_object(answer("evaluate", run_id, "attacks=pgd", "steps=1", "--json"))
    robust, clean = (told["accuracies"][name] for name in ("pgd1", "clean"))
    assert 0 <= robust["value"] <= clean["value"] <= 1
    assert (told["scope"], told["run_id"]) == ("test", run_id)
    flags = pq.read_table(Path(told["folder"]) / "flags.parquet")
    assert flags.column_names == ["index", "label", "predicted", "clean", "pgd1"]
    assert len(flags) == told["images"] > 300
    assert sum(flags["pgd1"].to_pylist()) == robust["count"]
    (run,) = runs_in(home)
    assert run.data.metrics["test/pgd1"] == robust["value"]
    assert run.info.status == "FINISHED"


def test_a_checkpoint_can_be_evaluated_where_its_run_is_unknown(home: Path, here: Path) -> None:
    checkpoints = last_object((home / "train.json").read_text())["checkpoints"]
    words = ["evaluate", checkpoints, "attacks=fgsm", "--json", "--which", "last"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert last_object(result.stdout)["checkpoint"].endswith("last.pt")
    # A store without this run is seen at once, not after a minute of trying to write to it.
    assert "could not be written" not in result.stderr


def test_a_run_that_this_store_does_not_know_is_not_resumed(home: Path, here: Path) -> None:
    told = last_object((home / "train.json").read_text())
    said = refusal("train", "--resume", told["checkpoints"], "epochs=5")
    assert told["run_id"] in said and "MLflow" in said
    assert runs_in(here) == []


def test_a_run_whose_checkpoints_are_not_here_is_fetched_from_mlflow_and_recorded_there(
    home: Path, here: Path
) -> None:
    run_id = last_object((home / "train.json").read_text())["run_id"]
    store = f"tracking_uri=sqlite:///{home / 'mlflow.db'}"
    told = last_object(answer("evaluate", run_id, "attacks=pgd", "steps=2", store, "--json"))
    assert told["run_id"] == run_id
    assert str(here) in told["checkpoint"]
    (run,) = runs_in(home)
    assert run.data.metrics["test/pgd2"] == told["accuracies"]["pgd2"]["value"]


def test_a_finished_training_is_not_resumed_but_may_be_lengthened(
    home: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    run_id = last_object((home / "train.json").read_text())["run_id"]
    assert refusal("train", "--resume", run_id).startswith("epochs: ")
    more = answer("train", "--resume", run_id, "epochs=2", "--json")
    assert last_object(more)["run_id"] == run_id
    (run,) = runs_in(home)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    rows = [p.step for p in client.get_metric_history(run_id, "train/loss")]
    assert (run.info.status, rows) == ("FINISHED", [1, 2])


@pytest.mark.parametrize("recorded", [True, False])
def test_a_moved_run_is_continued_from_its_checkpoint(recorded: bool, here: Path) -> None:
    run_id = last_object(answer("train", *SMALL, "--json"))["run_id"]
    Path("runs/raytrain", run_id).rename("mine")
    if not recorded:  # as by an earlier version
        Path("mine/run_id").unlink()
    result = CliRunner().invoke(app, ["train", "--resume", "mine", "epochs=2", "--json"])
    assert result.exit_code == 0, result.output
    told = last_object(result.stdout)
    assert (told["run_id"] == run_id) == recorded
    assert ("a new run goes on from its checkpoint" in result.stderr) != recorded
    assert told["checkpoints"] == str(here / "mine") and load(Path("mine/last.pt")).epoch == 2
    assert Path("mine/run_id").read_text() == told["run_id"]
    assert "epoch 1/2" not in result.stderr  # it was not trained again


def test_a_star_is_explained_once(home: Path) -> None:
    lines = (home / "train.err").read_text().splitlines()
    assert sum("* highest robust accuracy so far" in one for one in lines) == 1


def test_a_trial_of_a_sweep_is_not_continued_as_a_run(here: Path) -> None:
    (here / "runs/raytrain/s/trials/t0001").mkdir(parents=True)
    said = refusal("train", "--resume", "runs/raytrain/s/trials/t0001")
    assert "is a trial of a sweep, which raytrain tune --resume s continues" in said
    (here / "my runs/a/b/s/trials/t0001").mkdir(parents=True)
    said = refusal("train", "--resume", "my runs/a/b/s/trials/t0001", "storage=my runs")
    assert "raytrain tune --resume s experiment=a/b 'storage=my runs' continues" in said


def test_a_diverging_training_fails_with_its_epoch_and_is_recorded_as_failed(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", *QUICK, "epochs=2", "optimizer.lr=1e9"])
    assert (result.exit_code, result.stdout) == (1, "")
    begun, said = result.stderr.splitlines()
    assert begun.startswith("training: ") and said.startswith("raytrain: ")
    assert "diverged in epoch 1" in said and "optimizer.lr" in said
    (run,) = runs_in(here)
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_training_is_recorded_as_killed_and_can_be_resumed(
    number: signal.Signals, here: Path
) -> None:
    import raytrain

    def interrupt(run: RunConfig, report: EpochMetrics) -> None:
        del run, report
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        raytrain.train(None, (*QUICK, "epochs=3"), watch=interrupt)
    (run,) = runs_in(here)
    assert run.info.status == "KILLED"
    again = raytrain.train(resume=run.info.run_id)
    (run,) = runs_in(here)
    assert (run.info.run_id, run.info.status) == (again.run_id, "FINISHED")
    history = MlflowClient(again.tracking_uri).get_metric_history(again.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3]


@pytest.mark.slow
def test_a_training_that_was_interrupted_before_its_first_checkpoint_can_be_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raytrain
    from raytrain.commands import train as api

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "local_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            raytrain.train(None, (*SMALL, "seed=3"))
    (run,) = runs_in(here)
    again = raytrain.train(resume=run.info.run_id)
    assert again.signature == run.data.tags["signature"]
    assert [(r.info.run_id, r.info.status) for r in runs_in(here)] == [(again.run_id, "FINISHED")]


def test_progress_that_nobody_reads_any_more_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrain.cli.train import Epochs
    from raytrain.cli.tune import Trials
    from raytrain.tuning.budget import BudgetState
    from raytrain.tuning.space.settings import Budget

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

    row = EpochMetrics(1, 2.3, 1.0, 0.1, 0.1, 0.2, 0.1, 640, 128, 0.5, 0.2, 0.1, 0.1, 0.1, True)
    budget_state = BudgetState(Budget(trials=3), 1)
    budget_state.outcomes["complete"] += 1
    with Epochs() as epochs, Trials() as trials:
        monkeypatch.setattr(sys, "stderr", Gone())
        epochs(as_run(None), row)
        trials(budget_state.progress((), 0.0, 0.0))


def test_a_storage_that_cannot_be_written_is_named_and_leaves_no_run_running(here: Path) -> None:
    (here / "runs").write_text("a file where a folder is wanted")
    result = CliRunner().invoke(app, ["train", *SMALL])
    assert result.exit_code in (1, 2)
    said = result.stderr.splitlines()[-1]
    assert said.startswith("raytrain: storage: ") and "runs" in said
    assert {run.info.status for run in runs_in(here)} <= {"FAILED"}


def test_the_ui_of_a_server_is_its_own(home: Path, here: Path, monkeypatch: Any) -> None:
    from raytrain.cli import ui
    from raytrain.tracking import reader

    store = f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setattr(ui, "reader", lambda _: reader(store))
    words = ("ui", "--uri", "http://host:5000")
    page, *rest = answer(*words).splitlines()
    assert page.startswith("http://host:5000/#/experiments/1/runs?viewStateShareKey=raytrain&")
    run_id = json.loads((home / "train.json").read_text())["run_id"]
    assert f"http://host:5000/#/experiments/1/runs/{run_id}" in answer(*words, run_id)
    assert rest == [] and list(here.iterdir()) == []


def test_a_browser_is_opened_only_where_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrain.cli.ui import somebody_sits_here

    monkeypatch.setattr(sys, "platform", "linux")
    for terminal, display, wayland, seen in (
        (True, ":0", "", True),
        (True, "", "wayland-0", True),
        (True, "", "", False),
        (False, ":0", "wayland-0", False),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("DISPLAY", display)
        monkeypatch.setenv("WAYLAND_DISPLAY", wayland)
        assert somebody_sits_here() == seen


@pytest.mark.parametrize("words", [[], ["storage=my runs"]])
def test_an_interrupted_training_ends_with_the_command_that_continues_it(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytrain.cli.train import Epochs

    monkeypatch.setattr(Epochs, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = CliRunner().invoke(app, ["train", *QUICK, "epochs=3", *words])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.exit_code == 130, ended.output
    (run,) = runs_in(here)
    command = shlex.split(ended.stderr.splitlines()[-1])
    assert command == ["raytrain", "train", "--resume", run.info.run_id[:8], *words]
    assert run_of(command[3], here / "my runs", None) == run.info.run_id


def test_the_command_that_is_told_finds_a_run_in_places_that_are_not_the_default(
    here: Path,
) -> None:
    text = answer("train", *SMALL, "storage=my runs", "tracking_uri=sqlite:///my.db")
    (command,) = [one for one in text.splitlines() if one.startswith("test set")]
    words = shlex.split(command.removeprefix("test set"))
    answer(*words[1:], "attacks=fgsm", "images=8")
    assert len(list((here / "my runs").rglob("evaluation.json"))) == 1
    assert not (here / "runs").exists() and not (here / "mlflow.db").exists()


def test_the_result_is_told_to_a_reader_with_what_to_do_next(here: Path) -> None:
    text = answer("train", *SMALL, "run_name=mine")
    (run,) = runs_in(here)
    assert "mine" in text and f"raytrain evaluate {run.info.run_id[:8]}\n" in text
    assert f"raytrain ui {run.info.run_id[:8]}\n" in text


@pytest.mark.slow
def test_text_is_what_was_written_from_the_word_to_the_record_and_back(here: Path) -> None:
    folder = here / "a #1: {x} [y]"
    folder.mkdir()
    for name in ("train", "try #7"):
        images = pa.FixedSizeListArray.from_arrays(pa.array(range(192), pa.uint8()), 64)
        table = pa.table({"a: b": pa.concat_arrays([images] * 40), "#": [0, 1, 0] * 40})
        pq.write_table(table, folder / f"{name}.parquet")
    words = [*QUICK, f"data={folder / 'train.parquet'}", "data.image_column=a: b"]
    words += [f"data.test_path={folder / 'try #7.parquet'}", "data.label_column=#"]
    words += ["storage=no #2", "experiment=v: 1", "run_name='007' # x", "epochs=1"]
    words.remove("data.train_size=128")
    told = last_object(answer("train", *words, "--json"))
    assert Path(told["checkpoints"]).parent == here / "no #2" / "v: 1"
    (run,) = runs_in(here, "v: 1")
    assert run.info.run_name == told["name"] == "'007' # x"
    assert run.data.params["data.image_column"] == "a: b"
    again = as_run(Path(told["checkpoints"]) / "run.yaml")
    assert again == as_run(None, words) and again.signature() == told["signature"]
    found = last_object(
        answer("evaluate", run.info.run_id, "attacks=fgsm", "--storage", "no #2", "--json")
    )
    assert found["images"] == 120
    more = ["train", "--resume", run.info.run_id, "storage=no #2", "--json"]
    assert last_object(answer(*more, "epochs=2"))["name"] == "'007' # x"


def test_the_api_and_the_command_train_the_same(home: Path, here: Path) -> None:
    import raytrain

    reports = []
    result = raytrain.train({"algorithm": "pgd"}, SMALL, watch=lambda _, row: reports.append(row))
    told = last_object((home / "train.json").read_text())
    assert (result.signature, len(reports)) == (told["signature"], 1)
    same = {"train/loss", "valid/clean", "valid/robust", "train/fosc"}
    for name in same:
        # Another number of threads may add up in another order.
        assert result.metrics[name] == pytest.approx(told["metrics"][name], rel=1e-3)
    with pytest.raises(RequestError, match=r"^epoch: "):
        raytrain.train({"epoch": 3})


def test_a_mode_that_needs_a_gpu_is_refused_before_anything_is_recorded(here: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = CliRunner().invoke(app, ["train", "performance=graph"])
    assert result.exit_code == 2 and "performance.mode: graph needs a CUDA device" in result.stderr
    assert not (here / "mlflow.db").exists()
