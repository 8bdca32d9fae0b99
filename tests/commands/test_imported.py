"""`raytrain evaluate robustbench:FILE`: the network of a file as a run beside those that were trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import unchecked
from mlflow import MlflowClient

import raytrain
from raytrain.commands.evaluate import EvalResult, evaluate
from raytrain.commands.train import TrainResult
from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec, robustbench_state_dict
from raytrain.training.checkpoint import load
from raytrain.training.setup import network

pytestmark = [
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

DATA = {"name": "digits", "train_size": 256}
RUN: dict[str, Any] = {
    "data": DATA,
    "model": "wideresnet-10-1",
    "algorithm": "fgsm_rs",
    "epochs": 2,
    "evaluation": {"steps": 1, "images": 50},
    "device": "cpu",
}
QUICK = {"attacks": "pgd", "steps": 2, "images": 60, "checks": False, "device": "cpu"}


def exported(folder: Path, trained: TrainResult, name: str, normaliser: bool = True) -> str:
    """A file as RobustBench has it of a trained network, without its normaliser if asked for."""
    model = network(load(trained.checkpoints))
    assert isinstance(model, Classifier)
    state = {f"module.{key}": value for key, value in robustbench_state_dict(model).items()}
    if normaliser:
        state |= {"mu": model.normalise.mean[None], "sigma": model.normalise.std[None]}
    torch.save({"state_dict": state}, folder / name)
    return f"robustbench:{folder / name}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TrainResult]]:
    """A folder with a store in which one network has been trained and evaluated."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with unchecked():
            result = raytrain.train(RUN)
            evaluate(result, QUICK)
        yield folder, result


def test_the_network_of_a_file_is_attacked_like_the_one_it_was_made_of(
    home: tuple[Path, TrainResult],
) -> None:
    folder, trained = home
    own = evaluate(trained, QUICK)
    theirs = evaluate(exported(folder, trained, "same.pt"), {**QUICK, "data": DATA})
    flags = [pq.read_table(result.folder / "flags.parquet") for result in (own, theirs)]
    assert flags[0].equals(flags[1])
    assert theirs.contract == own.contract and theirs.same_contract
    assert (theirs.epoch, theirs.scope) == (0, own.scope)
    saved = load(theirs.file)
    assert saved.imported and not load(own.file).imported
    assert saved.run.model.name == "wideresnet-10-1" and saved.run.model.mean == (0.3058,)


def test_its_run_in_mlflow_says_nothing_of_a_training(home: tuple[Path, TrainResult]) -> None:
    folder, trained = home
    result = evaluate(exported(folder, trained, "Some2020.pt"), {**QUICK, "data": DATA})
    assert result.run_id is not None
    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert (run.info.run_name, run.info.status) == ("robustbench-Some2020", "FINISHED")
    assert run.data.tags["kind"] == "imported"
    assert {name.partition(".")[0] for name in run.data.params} == {"data", "model", "threat"}
    assert run.data.params["model.weights"] == str(folder / "Some2020.pt")
    assert not {"algorithm", "outer", "seed", "signature"} & run.data.tags.keys()
    assert {name.partition("/")[0] for name in run.data.metrics} == {result.scope}


def test_the_same_weights_are_the_same_run_and_others_another(
    home: tuple[Path, TrainResult],
) -> None:
    folder, trained = home
    once = evaluate(exported(folder, trained, "once.pt"), {**QUICK, "data": DATA})
    (folder / "elsewhere").mkdir()
    moved = evaluate(exported(folder / "elsewhere", trained, "once.pt"), {**QUICK, "data": DATA})
    assert (moved.run_id, moved.file) == (once.run_id, once.file)
    wider = evaluate(
        exported(folder, trained, "once.pt"), {**QUICK, "data": DATA, "threat.eps": 0.2}
    )
    bare = evaluate(
        exported(folder, trained, "once.pt", normaliser=False), {**QUICK, "data": DATA}
    )
    assert len({once.run_id, wider.run_id, bare.run_id}) == 3
    assert [one.contract and one.contract.eps for one in (once, wider)] == [0.1, 0.2]
    assert bare.contract is not None and "no normaliser" in bare.contract.text
    with_words = {"model.mean": [0.3058], "model.std": [0.3762]}
    given = evaluate(
        exported(folder, trained, "once.pt", normaliser=False),
        {**QUICK, "data": DATA, **with_words},
    )
    assert given.run_id == once.run_id


def test_its_run_and_its_folder_are_words_of_other_commands(
    home: tuple[Path, TrainResult],
) -> None:
    folder, trained = home
    result = evaluate(exported(folder, trained, "word.pt"), {**QUICK, "data": DATA})
    assert result.run_id is not None
    (folder / "word.pt").unlink()
    for word in (result.run_id, result.file.parent, result):
        again = evaluate(word, {**QUICK, "attacks": "fgsm"})
        assert isinstance(again, EvalResult) and again.run_id == result.run_id
    with pytest.raises(
        RequestError, match="is a network that was imported; expected a run of train"
    ):
        raytrain.train(resume=result.run_id)
    with pytest.raises(
        RequestError, match="a network that was imported, whose training is not known"
    ):
        raytrain.export(result.run_id)


def test_it_stands_in_a_comparison_beside_a_trained_one_without_a_cost(
    home: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    folder, trained = home
    bare = exported(folder, trained, "Bare2020.pt", normaliser=False)
    result = evaluate(bare, {**QUICK, "data": DATA})
    assert result.run_id is not None
    found = raytrain.compare([trained.run_id, result.run_id], to=tmp_path / "out")
    (arena,) = found.comparables
    rows = {row.label: row for row in arena.rows}
    assert rows.keys() == {"fgsm_rs", "robustbench-Bare2020"}
    assert rows["robustbench-Bare2020"].cost is None and not rows["robustbench-Bare2020"].front
    assert rows["fgsm_rs"].cost and rows["fgsm_rs"].front
    assert any(
        "1 of 2 configurations are networks that were not trained" in n for n in arena.notes
    )
    assert "normaliser" not in arena.threat
    assert "cost not recorded" in found.report.read_text(encoding="utf-8")


def test_a_file_that_does_not_fit_the_request_is_refused(home: tuple[Path, TrainResult]) -> None:
    folder, trained = home
    seven = ModelSpec(name="wideresnet-10-1").build(1, 8, 7, [0.0], [1.0])
    torch.save(robustbench_state_dict(seven), folder / "seven.pt")
    with pytest.raises(
        RequestError, match="^model.weights: .* for 7 classes .* expected .* 10 cl"
    ):
        evaluate(f"robustbench:{folder / 'seven.pt'}", {**QUICK, "data": DATA})
    with pytest.raises(RequestError, match="^model.name: no such file"):
        evaluate("robustbench:none.pt", QUICK)
    with pytest.raises(RequestError, match="^epochs: expected a field of the evaluation"):
        evaluate(exported(folder, trained, "grey.pt"), {**QUICK, "epochs": 3})
