"""`raytrain evaluate` from request to record: contracts, interruptions, workers, doubts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import unchecked
from mlflow import MlflowClient
from torch import Tensor, nn
from typer.testing import CliRunner

import raytrain
from raytrain.attacks.autoattack import CHEAP, Standard, survivors
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.cli.app import app
from raytrain.commands import evaluate as command_module
from raytrain.commands.evaluate import EvalResult, evaluate
from raytrain.commands.train import TrainResult
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.data.loader import open_splits
from raytrain.distributed import evaluator_pool as pool
from raytrain.evaluation.evaluator import Evaluator
from raytrain.evaluation.runner import StageProgress
from raytrain.evaluation.work_item import WorkItem, WorkResult
from raytrain.training.checkpoint import load, save
from raytrain.training.setup import start
from raytrain.training.trainer import fit

pytestmark = [
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

RUN: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 400},
    "threat": {"norm": "linf", "eps": 0.1},
    "algorithm": {"name": "fgsm_rs"},
    "batch_size": 32,
    "epochs": 3,
    "evaluation": {"steps": 1, "images": 50},
    "optimizer": {"lr": 0.1},
    "device": "cpu",
}
QUICK = {"attacks": "fgsm,apgd", "images": 60, "batch_size": 20, "checks": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TrainResult]]:
    """A folder with a store in which one network has been trained."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with unchecked():
            result = raytrain.train(RUN)
        yield folder, result


@pytest.fixture
def alone(home: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """A copy of the checkpoint that belongs to no run."""
    return Path(shutil.copy(home[1].checkpoints / "best.pt", tmp_path / "best.pt"))


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Standard.of
    monkeypatch.setattr(
        Standard,
        "of",
        staticmethod(lambda norm, classes: replace(of(norm, classes), steps=5, queries=30)),
    )


def flags_of(result: EvalResult) -> dict[str, list[Any]]:
    return pq.read_table(result.folder / "flags.parquet").to_pydict()


def record_of(result: EvalResult) -> dict[str, Any]:
    return json.loads((result.folder / "evaluation.json").read_text())


def command(*words: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == status, result.output
    return result


# --- what it leaves ---------------------------------------------------------------------------


def test_an_evaluation_is_on_its_run_and_in_its_files(home: tuple[Path, TrainResult]) -> None:
    folder, trained = home
    result = evaluate(trained.run_id, {"attacks": "fgsm,pgd,aa", "images": 100})
    flags, record = flags_of(result), record_of(result)
    assert result.run_id == trained.run_id and result.scope.startswith("test")
    run = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(trained.run_id)
    assert list(result.accuracies) == ["clean", "fgsm", "pgd20", "aa"]
    for name, share in result.accuracies.items():
        assert share.count == sum(flags[name]) and share.images == len(flags[name]) == 100
        assert run.data.metrics[f"{result.scope}/{name}"] == share.value == share.count / 100
        assert record["accuracies"][name]["value"] == share.value
    assert result.strongest == "aa"
    assert run.data.tags["checks"] == "passed" and result.trusted and record["trusted"]
    assert run.data.metrics[f"{result.scope}/fe"] == result.fe == record["fe"] > 0
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    there = {f.path for f in client.list_artifacts(run.info.run_id, f"evaluation/{result.scope}")}
    names = ("flags.parquet", "evaluation.json", "examples.parquet")
    assert there == {f"evaluation/{result.scope}/{name}" for name in names}
    assert str(folder) not in json.dumps(record)


def test_all_images_are_the_test_set_and_some_are_named(alone: Path) -> None:
    some = evaluate(alone, {**QUICK, "attacks": "fgsm", "images": 30})
    every = evaluate(alone, {**QUICK, "attacks": "fgsm", "images": 100000})
    assert (some.scope, every.scope) == ("test_30", "test")
    assert flags_of(some)["fgsm"] == flags_of(every)["fgsm"][:30]
    assert every.images == len(flags_of(every)["index"]) > 300


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("attacks=bim",), "attacks"),
        (("steps=0",), "steps"),
        (("images=none at all",), "images"),
        (("optimizer.lr=1",), "optimizer.lr: expected a field of the evaluation"),
        (("model=resnet18",), "model: "),
        (("--which", "worst"), "--which"),
    ],
)
def test_a_wrong_request_is_one_sentence(words: tuple[str, ...], part: str, alone: Path) -> None:
    result = command(str(alone), *words, status=2)
    (line,) = result.stderr.splitlines()
    assert part in line and result.stdout == ""
    assert not (alone.parent / "evaluation").exists()


# --- contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("threat.eps=0.2",), ("threat.norm=l2", "threat.eps=0.5")])
def test_another_threat_is_refused_unless_it_is_asked_for_and_then_labelled(
    words: tuple[str, ...], alone: Path
) -> None:
    quick = ("attacks=fgsm", "images=60", "checks=false")
    refused = command(str(alone), *quick, *words, status=2)
    (line,) = refused.stderr.splitlines()
    assert "linf eps 0.1 " in line and "--another-contract" in line
    assert not (alone.parent / "evaluation").exists()
    told = command(str(alone), *quick, *words, "--another-contract")
    label = "_linf-0.2" if len(words) == 1 else "_l2-0.5"
    assert "another contract than the training's" in told.stdout
    assert label[1:].replace("-", " eps ") in told.stdout
    (folder,) = (alone.parent / "evaluation").iterdir()
    assert folder.name.startswith("test") and folder.name.endswith(label)
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["scope"] == folder.name and record["same_contract"] is False
    assert (record["contract"]["norm"], record["contract"]["eps"]) == (
        (label[1:].split("-")[0], float(label.split("-")[1]))
    )


def test_the_same_threat_written_in_another_way_is_the_same_contract(alone: Path) -> None:
    result = evaluate(alone, {**QUICK, "threat.eps": "1/10", "attacks": "fgsm"})
    assert result.same_contract and "linf" not in result.scope
    assert record_of(result)["same_contract"] is True


def test_the_last_checkpoint_has_a_scope_of_its_own(home: tuple[Path, TrainResult]) -> None:
    result = evaluate(home[1].run_id, {**QUICK, "attacks": "fgsm"}, which="last")
    assert result.scope.startswith("test_last") and result.file.name == "last.pt"
    run = MlflowClient(home[1].tracking_uri).get_run(home[1].run_id)
    assert run.data.metrics[f"{result.scope}/fgsm"] == result.accuracies["fgsm"].value


# --- interruptions ----------------------------------------------------------------------------


class Interrupted(Exception):
    """Whatever ends a process."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[WorkItem]:
    """The work items that were worked on."""
    work_items: list[WorkItem] = []
    run_one = Evaluator.run

    def counted(self: Evaluator, unit: WorkItem) -> WorkResult:
        work_items.append(unit)
        return run_one(self, unit)

    monkeypatch.setattr(Evaluator, "run", counted)
    return work_items


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_and_another_question_begins_anew(
    alone: Path, done: list[WorkItem], tmp_path: Path
) -> None:
    whole = evaluate(shutil.copy(alone, tmp_path / "whole.pt"), QUICK)
    flags, work_items = flags_of(whole), list(done)
    shutil.rmtree(whole.folder)
    for stop_after in (1, 4, len(work_items) - 1):
        seen: list[StageProgress] = []

        def watch(
            now: StageProgress, seen: list[StageProgress] = seen, last: int = stop_after
        ) -> None:
            seen.append(now)
            if len(seen) == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            evaluate(alone, QUICK, watch=watch)
        done.clear()
        again = evaluate(alone, QUICK)
        assert done == work_items[stop_after:]
        assert flags_of(again) == flags and again.fe == whole.fe
        shutil.rmtree(again.folder)
    evaluate(alone, QUICK)
    done.clear()
    assert flags_of(evaluate(alone, QUICK)) == flags and done == []
    evaluate(alone, {**QUICK, "seed": 1})
    assert len(done) >= len(work_items) - 1  # all anew: another seed, other starts


def test_other_weights_begin_anew(
    home: tuple[Path, TrainResult], alone: Path, done: list[WorkItem]
) -> None:
    evaluate(alone, QUICK)
    known = len(done)
    saved = load(alone)
    with torch.no_grad():
        saved.content["model"]["backbone.linear.bias"][0] += 1.0
    torch.save(saved.content, alone)
    evaluate(alone, QUICK)
    assert len(done) > known and {unit.stage for unit in done[known:]} >= {"clean", "fgsm"}


# --- precision --------------------------------------------------------------------------------


def checkpoint_in(folder: Path, precision: str) -> Path:
    """The same fresh network with BatchNorm, as if trained in a precision."""
    run = RunConfig.model_validate({**RUN, "precision": precision})
    dtype = torch.float64 if precision == "fp64" else torch.float32
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        state = start(
            run, open_splits(run.data, DistributedContext(), dtype), DistributedContext()
        )
    save(state, run, folder / "best.pt", DistributedContext())
    return folder / "best.pt"


def test_results_are_those_of_float32_whatever_the_training_was_in(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    asked = {**QUICK, "attacks": "pgd,apgd", "steps": 3}
    found = [
        flags_of(evaluate(checkpoint_in(tmp_path / precision, precision), asked))
        for precision in ("fp32", "bf16")
    ]
    assert found[0] == found[1] and 0 < sum(found[0]["clean"]) < len(found[0]["clean"])
    wide = evaluate(checkpoint_in(tmp_path / "fp64", "fp64"), asked)
    assert flags_of(wide)["aa.apgd-t"].count(True) == flags_of(wide)["apgd"].count(True)
    assert torch.equal(torch.get_rng_state(), state)


# --- doubts -----------------------------------------------------------------------------------


class Masked(nn.Module):
    """The same classes; no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model((8 * x).round() / 8)


class Noisy(Masked):
    """Other logits at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


class Softmax(Masked):
    """Probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(1)


@pytest.mark.parametrize(
    ("defence", "check"),
    [(Masked, "zero_gradients"), (Noisy, "randomised"), (Softmax, "probabilities")],
)
def test_a_defence_that_deceives_is_marked_wherever_its_numbers_are(
    home: tuple[Path, TrainResult],
    defence: Callable[[nn.Module], nn.Module],
    check: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, results = pool.network, []
    monkeypatch.setattr(pool, "network", lambda *given: defence(network(*given)).eval())
    monkeypatch.setattr(
        command_module, "evaluate", lambda *a, **k: results.append(evaluate(*a, **k)) or results[0]
    )
    count = {Masked: 41, Noisy: 42, Softmax: 43}[defence]  # a folder of its own
    told = command(home[1].run_id, "attacks=pgd", f"images={count}", "steps=3")
    (result,) = results
    failed = {finding.check for finding in result.findings if not finding.passed}
    assert check in failed and not result.trusted
    assert record_of(result)["trusted"] is False
    lines = told.stdout.splitlines()
    (robust,) = [line for line in lines if "PGD-3 " in line]
    (clean,) = [line for line in lines if "clean images" in line]
    assert "(!)" in robust and "(!)" not in clean
    assert any("CHECK FAILED" in line and check in line for line in lines)
    tags = MlflowClient(home[1].tracking_uri).get_run(home[1].run_id).data.tags
    assert tags["checks"].startswith("FAILED: ") and check in tags["checks"]


# --- in training ------------------------------------------------------------------------------


def test_validation_by_apgd_counts_what_two_stages_leave_of_the_first_images() -> None:
    judged = {"attack": "apgd", "images": 40, "batch_size": 15, "every": 2}
    run = RunConfig.model_validate({**RUN, "epochs": 2, "evaluation": judged})
    with unchecked():
        *_, (report, state) = fit(run, DistributedContext())
        answers = CountedModel(state.model, Meter())
    part = open_splits(run.data, DistributedContext()).valid
    images, labels = part.whole[:40].float() / 255, part.labels[:40]
    flags = answers.classes(images) == labels
    assert report.clean == pytest.approx(int(flags.sum()) / 40)
    for stage in CHEAP:
        for rows in flags.nonzero().flatten().split(15):
            left = survivors(stage, answers, images[rows], labels[rows], run.threat, 0)
            flags[rows] = left
    assert report.robust == pytest.approx(int(flags.sum()) / 40)
    assert report.robust and report.clean and report.robust < report.clean


# --- processes --------------------------------------------------------------------------------


@pytest.fixture
def own_ray(ray_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray as this process starts it: its own folder, one thread."""
    monkeypatch.setenv("RAY_TMPDIR", ray_folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def processes(title: str) -> list[int]:
    """Descendants of this process that are called so."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if title in words and descends(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended
    return found


def descends(pid: int) -> bool:
    while pid not in (0, 1, os.getpid()):
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return pid == os.getpid()


@pytest.mark.ray
@pytest.mark.usefixtures("own_ray")
def test_two_workers_of_which_one_is_killed_find_what_one_finds(
    alone: Path, tmp_path: Path
) -> None:
    asked = {"attacks": "fgsm,pgd", "images": 60, "batch_size": 10}
    one = evaluate(shutil.copy(alone, tmp_path / "one.pt"), asked)
    flags, findings = flags_of(one), one.findings
    shutil.rmtree(one.folder)
    killed: list[int] = []

    def kill(now: StageProgress) -> None:
        if now.stage == "pgd20" and not killed:
            killed.extend(processes("RemoteEvaluator")[:1])
            os.kill(killed[0], signal.SIGKILL)

    two = evaluate(alone, {**asked, "workers": 2, "max_failures": 2}, watch=kill)
    assert len(killed) == 1
    assert (flags_of(two), two.fe, two.findings) == (flags, one.fe, findings)


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither a checkpoint nor"):
        evaluate("nothing", storage=tmp_path)
