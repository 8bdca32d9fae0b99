"""Results as they are shown, and what other commands take of them; keyword arguments of commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import raytrain
from raytrain.commands.evaluate import EvalResult
from raytrain.commands.export import ExportResult
from raytrain.commands.results import word_of
from raytrain.commands.train import TrainResult
from raytrain.commands.tune import TuneResult
from raytrain.core.errors import RequestError
from raytrain.evaluation.confidence import wilson
from raytrain.exporting.check import Checked
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.space.settings import Budget

FOLDER = Path("/x & <y>")
TRIALS = [
    TrialRow(0, "complete", (0.25,), {"optimizer.lr": 0.1}, {"cost/fe": 7.0}, 3, "t0000"),
    TrialRow(2, "failed", (), {"algorithm.steps": 4}, {}, 0, "t0002", "no"),
]


def trained() -> TrainResult:
    metrics = {"train/loss": 2.0, "valid/clean": 0.5, "valid/robust": 0.25}
    store = "sqlite:///x.db"
    return TrainResult("id", "pgd-digits", "abc", metrics, FOLDER, store, "#/page", "runs")


def swept(best: TrialRow | None = TRIALS[0], trials: list[TrialRow] = TRIALS) -> TuneResult:
    outcomes = {"complete": 1, "failed": 1}
    progress = SweepProgress(2, Budget(), outcomes, 0, 1234.5, 1.0, None, best, ())
    return TuneResult(
        name="s",
        run_id=None,
        run_ids={"t0000": "of the first"},
        objectives=["valid/robust"],
        directions=[1],
        best=best,
        front=[],
        trials=trials,
        progress=progress,
        importances=[],
        importances_at_equal_cost=None,
        warning=None,
        finals=[],
        best_file=None,
        table=FOLDER / "trials.parquet",
        folder=FOLDER,
        space_file=FOLDER / "space.yaml",
        tracking_uri="sqlite:///x.db",
        page="#/page",
        storage="runs",
        again="raytrain tune --resume s",
        extensible=True,
    )


def evaluated(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "scope": "test_4",
        "accuracies": {"clean": wilson(3, 4), "aa": wilson(1, 4)},
        "images": 4,
        "file": FOLDER / "best.pt",
        "folder": FOLDER,
        "run_id": None,
    }
    return EvalResult(**{**values, **changes})


def test_a_result_is_shown_by_its_name_and_its_main_numbers() -> None:
    assert repr(trained()).splitlines() == [
        "TrainResult pgd-digits",
        "  valid/clean   0.5",
        "  valid/robust  0.25",
        "  run           id",
        "  checkpoints   /x & <y>",
    ]
    assert repr(swept()).splitlines() == [
        "TuneResult s",
        "  trials  2 (1 complete, 1 failed)",
        "  best    t0000: valid/robust 0.25",
        "  with    lr=0.1",
        "  cost    1,234 forward-equivalents per image",
        "  folder  /x & <y>",
    ]
    assert str(evaluated(trusted=False)).splitlines() == [
        "EvalResult test_4",
        "  clean       75.00% [30.06%, 95.44%]",
        "  aa          25.00% [4.56%, 69.94%]",
        "  images      4",
        "  checks      FAILED: trusted",
        "  checkpoint  /x & <y>/best.pt",
    ]
    exported = ExportResult(FOLDER, "n", FOLDER, 3, {"onnx": Checked(0, 0)}, {}, True, ())
    assert "  formats     onnx\n" in repr(exported)


def test_a_notebook_shows_the_same_in_a_table_without_markup_of_others() -> None:
    assert trained()._repr_html_() == (
        "<table><caption>TrainResult pgd-digits</caption>"
        "<tr><th>valid/clean</th><td>0.5</td></tr><tr><th>valid/robust</th><td>0.25</td></tr>"
        "<tr><th>run</th><td>id</td></tr>"
        "<tr><th>checkpoints</th><td>/x &amp; &lt;y&gt;</td></tr></table>"
    )


def test_a_sweep_is_a_frame_with_a_row_per_trial() -> None:
    frame = swept().frame()
    assert frame.index.tolist() == [0, 2]
    first, second = frame.astype(object).where(frame.notna(), None).to_dict("records")
    assert first == {
        "state": "complete",
        "valid/robust": 0.25,
        "optimizer.lr": 0.1,
        "algorithm.steps": None,
        "cost/fe": 7.0,
        "cost/fe_per_sample": None,
        "epochs": 3,
        "run_id": "of the first",
    }
    assert (second["state"], second["algorithm.steps"]) == ("failed", 4)
    assert second["valid/robust"] is None and second["run_id"] is None
    assert len(swept(None, []).frame()) == 0


def test_a_result_stands_for_its_checkpoints_and_its_run() -> None:
    assert word_of(trained()) == "/x & <y>" and trained().recorded == "id"
    assert word_of(swept()) == "/x & <y>/trials/t0000" and swept().recorded == "s"
    assert word_of(evaluated()) == "/x & <y>/best.pt"
    assert dataclasses.replace(swept(), run_id="parent").recorded == "parent"
    assert word_of("last") == "last" and word_of(FOLDER) == "/x & <y>"
    with pytest.raises(RequestError, match=r"^s: this sweep has no best trial; expected "):
        raytrain.evaluate(swept(None))


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("epoch=3", {"epoch": 3}),
        ("optimizer.lrr=3", {"optimizer": {"lrr": 3}}),
        ("epochs=0", {"epochs": 0}),
        ("algorithm=pgdd", {"algorithm": "pgdd"}),
        ("threat.eps=8", {"threat": {"eps": 8}}),
    ],
)
def test_a_wrong_field_is_the_same_sentence_as_a_word(
    words: str, fields: dict[str, Any], here: Path
) -> None:
    said = []
    forms: list[dict[str, Any]] = [{"overrides": words}, fields]
    for given in forms:
        with pytest.raises(RequestError) as caught:
            raytrain.train(**given)
        said.append(str(caught.value))
    assert said[0] == said[1]
    (here / "space.yaml").write_text("base: {data: digits}\n")
    for space in ("space.yaml", {"base": {"data": "digits"}}):
        with pytest.raises(RequestError) as caught:
            raytrain.tune(space, trials=2, **fields)
        assert str(caught.value) == said[0].replace(
            words.partition("=")[0], f"base.{words.partition('=')[0]}", 1
        )


def test_an_unknown_field_of_an_evaluation_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        RequestError, match=r"^attack: expected a field of the evaluation \(steps, "
    ):
        raytrain.evaluate("last", attack="pgd")
    with pytest.raises(RequestError, match=r"^attacks\.0: expected 'fgsm', 'pgd', .*'nothing'$"):
        raytrain.evaluate("last", attacks=["nothing"])


def test_a_field_given_twice_has_one_value() -> None:
    with pytest.raises(RequestError, match=r"^epochs: given as 3 and as 4; expected one value$"):
        raytrain.train(None, ["epochs=3"], epochs=4)
    with pytest.raises(RequestError, match=r"^optimizer\.lr: .*; expected one value$"):
        raytrain.train(None, {"optimizer.lr": 1}, optimizer={"lr": 2})
    with pytest.raises(RequestError, match=r"^images: given as 3 and as 4; expected one value$"):
        raytrain.evaluate("last", ["images=3"], images=4)
