"""`raytrain compare` on real runs in a real store: what it finds, leaves and refuses."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from report_helpers import evaluated, flags_of, trained, write_evaluation
from typer.testing import CliRunner

import raytrain
from raytrain.cli.app import app
from raytrain.commands import train as api
from raytrain.commands.compare import Comparison, compare
from raytrain.core.errors import RequestError
from raytrain.report import page as pages
from raytrain.report.comparable import comparable_runs
from raytrain.report.configurations import settings_of
from raytrain.report.page import ReportContent, write_report
from raytrain.report.pairs import pairs_of

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

SMALL = {"data.train_size": 128, "epochs": 2, "evaluation.steps": 1, "batch_size": 64}
KINDS = ("natural", "fgsm_rs", "pgd")
COUNT = 60  # test images of the evaluations
SURVIVE = {"natural": 0.05, "fgsm_rs": 0.5, "pgd": 0.8}


class StoredRuns:
    """A folder with a store in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.ids: dict[tuple[str, int], str] = {}
        self.flags: dict[tuple[str, int], Any] = {}

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def compare(self, *words: str, to: str = "out") -> Comparison:
        return compare(words, to=self.folder / to, uri=self.uri)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredRuns]:
    """Three algorithms on the digits with two seeds each, evaluated; and one that was not."""
    made = StoredRuns(tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.setattr(api, "log_model", lambda *_: None)  # the slowest part of a short run
        for kind in KINDS:
            for seed in (0, 1):
                _train(made, kind, seed)
        _train(made, "pgd", 0, experiment="alone", **{"algorithm.steps": 1, "run_name": "lonely"})
        rng = np.random.default_rng(0)
        for (kind, seed), run_id in made.ids.items():
            if seed < 2:
                clean = rng.random(COUNT) < 0.95
                robust = clean & (rng.random(COUNT) < SURVIVE[kind])
                made.flags[kind, seed] = flags_of({"clean": clean, "pgd20": robust})
                write_evaluation(made.client, run_id, made.folder / "e", made.flags[kind, seed])
        yield made


def _train(stored: StoredRuns, kind: str, seed: int, **changes: Any) -> None:
    values = {**SMALL, "algorithm": kind, "seed": seed, "experiment": "study", **changes}
    result = raytrain.train(None, values)
    stored.ids[kind, seed if "run_name" not in changes else 9] = result.run_id


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds; most tests are about something else."""
    monkeypatch.setattr(pages, "draw_comparable", lambda *_: [])


@pytest.fixture(scope="module")
def study(stored: StoredRuns) -> Comparison:
    return stored.compare("experiment:study", to="study-report")


class Page(HTMLParser):
    """Elements, what they refer to, and whether all are closed."""

    VOID = ("meta", "br", "img", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.refers += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- what it finds and leaves -------------------------------------------------------------------


def test_three_configurations_with_means_over_their_seeds(
    stored: StoredRuns, study: Comparison
) -> None:
    (comparable,) = study.comparables
    assert study.runs == 6 and comparable.images == COUNT and comparable.attack == "pgd20"
    rows = {row.label.split()[0]: row for row in comparable.rows}
    assert rows.keys() == set(KINDS)
    for kind, row in rows.items():
        told = [
            stored.client.get_run(stored.ids[kind, seed]).data.metrics["test/pgd20"]
            for seed in (0, 1)
        ]
        cell = row.score("pgd20")
        assert cell is not None and cell.value == pytest.approx(statistics.fmean(told), abs=1e-12)
        assert cell.std == pytest.approx(statistics.stdev(told), abs=1e-12)
    assert comparable.leader is rows["pgd"]


def test_cost_is_what_the_runs_counted(study: Comparison) -> None:
    rows = {row.label.split()[0]: row for row in study.comparables[0].rows}
    costs = {kind: row.cost for kind, row in rows.items()}
    assert costs == {"natural": 2 * 3.0, "fgsm_rs": 2 * 5.0, "pgd": 2 * 23.0}
    assert all(row.setting.first.epochs == 2 for row in rows.values())


def test_the_report_needs_nothing_beside_it(study: Comparison) -> None:
    text = study.report.read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.seen and page.seen.count("svg") >= 7
    outside = [one for one in page.refers if not one.startswith(("#", "figures/", "data:"))]
    assert outside == [] and "@import" not in text
    assert all((study.folder / one).is_file() for one in page.refers if one[0] == "f")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert study.report.stat().st_size < 4e6


def test_the_report_shows_every_number_of_the_table(study: Comparison) -> None:
    text = Page(study.report.read_text()).text
    for row in study.comparables[0].rows:
        cell = row.score("pgd20")
        assert cell is not None and row.label in text
        mean, _, spread = cell.text.partition(" ")
        assert re.search(rf"{re.escape(mean)}\s+{re.escape(spread)}", text)
    assert "PGD-20" in text and "FE per training image" in text


def test_figures_are_there_as_pixels_and_lines(study: Comparison) -> None:
    names = {file.name for file in (study.folder / "figures").iterdir()}
    kinds = (
        "robust_vs_cost",
        "pairs",
        "overfitting",
        "learning_curves",
        "fosc_and_steps",
        "per_class",
        "examples",
    )
    assert names == {f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")}


def test_the_data_are_those_of_the_store(stored: StoredRuns, study: Comparison) -> None:
    data = study.folder / "data"
    runs = pq.read_table(data / "runs.parquet").to_pylist()
    assert {run["run_id"] for run in runs} == {stored.ids[k, s] for k in KINDS for s in (0, 1)}
    curves = pq.read_table(data / "curves.parquet").to_pylist()
    for point in curves[:20]:
        history = stored.client.get_metric_history(point["run_id"], point["metric"])
        assert {m.step: m.value for m in history}[point["epoch"]] == point["value"]
    for kind in KINDS:
        kept = pq.read_table(data / "flags" / f"{stored.ids[kind, 0]}-test.parquet")
        assert kept.equals(stored.flags[kind, 0])
    pairs = pq.read_table(data / "pairs.parquet").to_pylist()
    assert [one["pairs_of_seeds"] for one in pairs] == [2, 2]
    scores = pq.read_table(data / "scores.parquet").to_pylist()
    assert {one["attack"] for one in scores} == {"clean", "pgd20", "valid/clean", "valid/robust"}


def test_runs_of_no_sweep_are_written_nowhere_in_the_store(study: Comparison) -> None:
    assert study.parent is None and not (study.folder / ".mlflow").exists()


@pytest.mark.slow
def test_a_second_comparison_replaces_the_first_and_leaves_other_files(
    stored: StoredRuns,
) -> None:
    first = stored.compare("experiment:study", to="again")
    (first.folder / "notes.txt").write_text("mine")
    second = stored.compare("lonely", to="again")
    assert second.folder == first.folder and (first.folder / "notes.txt").read_text() == "mine"
    assert not (second.folder / "figures" / "pairs.png").exists()
    assert not (second.folder / "data" / "flags").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_not_evaluated_says_what_to_run(stored: StoredRuns) -> None:
    result = stored.compare("lonely")
    (comparable,) = result.comparables
    assert [row.rank for row in comparable.rows] == [1] and comparable.images == 0
    assert f"raytrain evaluate {stored.ids['pgd', 9][:8]}" in Page(result.report.read_text()).text


# --- marks --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_failed_checks_and_foreign_contracts_are_marked_everywhere(
    stored: StoredRuns, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(stored.folder)
        patch.setattr(api, "log_model", lambda *_: None)
        runs = {
            kind: raytrain.train(None, {**SMALL, "algorithm": kind, "experiment": "marks"}).run_id
            for kind in ("natural", "n_fgsm")
        }
    flags = flags_of({"clean": [True] * COUNT, "pgd20": [True] * COUNT})
    worse = flags_of({"clean": [True] * COUNT, "pgd20": [k % 2 == 0 for k in range(COUNT)]})
    client = stored.client
    write_evaluation(client, runs["natural"], tmp_path, flags, failed="zero_gradients")
    write_evaluation(client, runs["n_fgsm"], tmp_path, worse)
    write_evaluation(
        client,
        runs["n_fgsm"],
        tmp_path,
        worse,
        scope="test_linf-0.2",
        contract=("c2", "linf eps 0.2"),
        same=False,
    )
    result = stored.compare("experiment:marks", to="marks")
    home, away = result.comparables
    assert home.leader is not None and home.leader.label.startswith("n_fgsm")
    page = Page(result.report.read_text()).text
    assert re.search(r"100\.0\s+⚠\s*\[[^]]*\]", page)
    assert "zero_gradients: why" in page
    assert re.search(r"50\.0\s+†\s*\[[^]]*\]", page)
    told = CliRunner().invoke(app, ["compare", "experiment:marks", "--uri", stored.uri, "--to",
                                    str(tmp_path / "cli")])  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "⚠" in told.stdout and "†" in told.stdout and "failed a check" in told.stdout
    scores = pq.read_table(result.folder / "data" / "scores.parquet").to_pylist()
    assert {s["trusted"] for s in scores if s["configuration"].startswith("natural")} == {False}
    assert {s["home"] for s in scores if s["arena"] == away.title} == {False}


# --- sweeps -------------------------------------------------------------------------------------


def sweep(stored: StoredRuns, name: str) -> tuple[str, dict[str, str]]:
    """A sweep whose driver died: a finished trial, one under way, one that never had a row."""
    client = stored.client
    found = client.get_experiment_by_name("sweeps")
    where = found.experiment_id if found else client.create_experiment(
        "sweeps", (stored.folder / "mlruns").as_uri()
    )  # fmt: skip
    parent = client.create_run(where, run_name=name, tags={"sweep": name}).info.run_id
    trials = {}
    for trial, rows in (("t0000", 3), ("t0001", 2), ("t0002", 0)):
        tags = {"sweep": name, "trial": trial, "mlflow.parentRunId": parent}
        run_id = client.create_run(where, run_name=f"{trial} of {name}", tags=tags).info.run_id
        trials[trial] = run_id
        made = trained(
            params={"optimizer.lr": 0.1 * (1 + len(trials))}, robust=[0.1, 0.2, 0.3][:rows]
        )
        metrics = [
            Metric(metric, value, 0, epoch)
            for metric, curve in made.curves.items()
            for epoch, value in curve.items()
        ]
        params = [Param(key, value) for key, value in made.params.items()]
        client.log_batch(run_id, metrics=metrics, params=params, tags=[])
        if trial == "t0000":
            client.log_batch(run_id, tags=[RunTag("outcome", "complete")])
            client.set_terminated(run_id)
    return parent, trials


def test_a_dead_sweep_is_compared_and_the_report_lies_on_its_own_run(
    stored: StoredRuns,
) -> None:
    parent, trials = sweep(stored, "dead")
    result = stored.compare("dead", to="dead")
    (comparable,) = result.comparables
    assert result.parent == parent and len(comparable.rows) == 3
    states = {row.setting.first.id: row.setting.first.state for row in comparable.rows}
    assert states[trials["t0000"]] == "finished"
    assert states[trials["t0001"]] == states[trials["t0002"]] == "running, or its driver died"
    assert any("driver died" in note for note in result.notes)
    listed = {one.path for one in stored.client.list_artifacts(parent, "comparison")}
    assert listed == {f"comparison/{name}" for name in ("report.html", "figures", "data")}
    kept = Path(stored.client.download_artifacts(parent, "comparison/report.html"))
    assert kept.read_text() == result.report.read_text()
    assert stored.client.get_run(parent).info.status == "RUNNING"  # not ours to end
    # One trial is not the sweep: what it is compared with says nothing of the others.
    assert stored.compare(trials["t0000"], to="one").parent is None
    assert not (result.folder / ".mlflow").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_id_of_a_sweep_stands_for_its_trials_and_a_word_twice_counts_once(
    stored: StoredRuns,
) -> None:
    parent, trials = sweep(stored, "twice")
    result = stored.compare(parent, "sweep:twice", trials["t0000"], to="twice")
    assert result.runs == 3 and result.parent == parent


@pytest.mark.usefixtures("undrawn")
def test_runs_of_several_sweeps_have_no_parent_of_their_own(stored: StoredRuns) -> None:
    (_, one), (_, other) = sweep(stored, "one"), sweep(stored, "other")
    result = stored.compare(one["t0000"], other["t0000"], to="mixed")
    assert result.parent is None


@pytest.mark.slow
def test_two_hundred_configurations_make_a_report_that_can_be_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = []
    for k in range(200):
        params = {"optimizer.lr": float(10 ** rng.uniform(-3, 0)), "algorithm.steps": k % 10}
        done = k % 3 == 0
        values = np.sort(rng.random(9 if done else 3)) * 0.6
        flags = flags_of({"clean": [True] * 50, "pgd20": rng.random(50) < 0.5})
        runs.append(
            trained(
                params=params,
                robust=values.tolist(),
                cost=690.0 if done else 230.0,
                tags={"outcome": "complete" if done else "stopped"},
                evaluations=[evaluated(flags)] if k in (0, 3, 6) else [],
            )
        )
    settings = settings_of(runs)
    comparables = comparable_runs(settings)
    pairs = {comparable.title: pairs_of(comparable) for comparable in comparables}
    write_report(ReportContent("many", "sqlite:///x", settings, comparables, pairs, []), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == [] and page.seen.count("details") >= 2
    assert (tmp_path / "report.html").stat().st_size < 4e6
    assert (tmp_path / "figures" / "importances.svg").is_file()
    assert len(comparables) == 1 and len(comparables[0].rows) == 200


# --- words --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_found_by_its_id_and_by_its_name(stored: StoredRuns) -> None:
    run_id = stored.ids["pgd", 9]
    for word in (run_id, "lonely", "run:lonely", "alone"):
        (comparable,) = stored.compare(word).comparables
        assert [row.setting.first.id for row in comparable.rows] == [run_id]


@pytest.mark.usefixtures("undrawn")
def test_an_unknown_word_is_refused_with_the_nearest_names(stored: StoredRuns) -> None:
    with pytest.raises(RequestError, match="no experiment and no sweep and no run .* are lonely"):
        stored.compare("lonly")
    with pytest.raises(RequestError, match="MLflow has no experiment of this name$"):
        stored.compare("experiment:qqqq")
    with pytest.raises(RequestError, match="^" + "0" * 32):
        stored.compare("0" * 32)


@pytest.mark.usefixtures("undrawn")
def test_a_name_of_several_things_is_refused_with_what_to_say(stored: StoredRuns) -> None:
    client = stored.client
    alone = client.get_experiment_by_name("alone")
    assert alone is not None
    for name in ("study", "double", "double"):
        where = alone.experiment_id
        client.set_terminated(client.create_run(where, run_name=name).info.run_id)
    with pytest.raises(RequestError, match="expected experiment:study or run:study"):
        stored.compare("study")
    with pytest.raises(RequestError, match=r"double: 2 runs have this name .* or run:double"):
        stored.compare("double")
    assert stored.compare("run:double").runs == 2


@pytest.mark.usefixtures("undrawn")
def test_an_empty_experiment_is_refused(stored: StoredRuns) -> None:
    stored.client.create_experiment("empty")
    with pytest.raises(RequestError, match="empty: there is no run"):
        stored.compare("experiment:empty")


@pytest.mark.usefixtures("undrawn")
def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such MLflow database"):
        compare(uri=f"sqlite:///{tmp_path / 'none.db'}", to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_a_folder_with_something_else_is_refused_and_left_alone(
    stored: StoredRuns, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    (tmp_path / "report.html").write_text("<html>of another program</html>")
    with pytest.raises(RequestError, match="holds something else"):
        compare(["lonely"], uri=stored.uri, to=tmp_path)
    assert (tmp_path / "data" / "precious").read_text() == "x"
    with pytest.raises(RequestError, match="is a file"):
        compare(["lonely"], uri=stored.uri, to=tmp_path / "report.html")


@pytest.mark.usefixtures("undrawn")
def test_damaged_files_are_left_out_and_named(stored: StoredRuns, tmp_path: Path) -> None:
    client = stored.client
    where = client.create_experiment("damaged", (stored.folder / "mlruns").as_uri())
    run_id = client.create_run(where, run_name="broken").info.run_id
    client.log_metric(run_id, "test/pgd20", 0.5)
    client.log_metric(run_id, "test/images", 60.0)
    for name in ("flags.parquet", "evaluation.json"):
        (tmp_path / name).write_text("{")
        client.log_artifact(run_id, str(tmp_path / name), "evaluation/test")
    result = stored.compare("experiment:damaged")
    assert [note.split(":")[0] for note in result.notes[:2]] == ["broken", "broken"]
    cell = result.comparables[0].rows[0].score("pgd20")
    assert cell is not None and cell.value == 0.5  # MLflow's own number is there


# --- the command --------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_one_object_or_a_table(stored: StoredRuns, tmp_path: Path) -> None:
    words = ["compare", "experiment:study", "--uri", stored.uri, "--to", str(tmp_path / "x")]
    told = CliRunner().invoke(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    values = json.loads(told.stdout.splitlines()[-1])
    (comparable,) = values["arenas"]
    assert comparable["ranked_by"] == "pgd20" and comparable["leader"] == "A"
    assert {tuple(sorted(row["run_ids"])) for row in comparable["rows"]} == {
        tuple(sorted(stored.ids[kind, seed] for seed in (0, 1))) for kind in KINDS
    }
    table = CliRunner().invoke(app, words).stdout
    assert "PGD-20" in table and str(tmp_path / "x" / "report.html") in table
    wrong = CliRunner().invoke(app, ["compare", "nothing-of-this-name", "--uri", stored.uri])
    assert wrong.exit_code == 2 and len(wrong.stderr.splitlines()) == 1


@pytest.mark.usefixtures("undrawn")
def test_the_folder_is_named_after_the_words(
    stored: StoredRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = raytrain.compare(["lonely", stored.ids["natural", 0]], uri=stored.uri)
    assert result.folder == tmp_path / "comparisons" / f"lonely-{stored.ids['natural', 0]}"


@pytest.mark.usefixtures("undrawn")
def test_a_colon_in_a_name_is_part_of_it_and_of_the_folder(
    stored: StoredRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    client = stored.client
    where = client.create_experiment("colons", (stored.folder / "mlruns").as_uri())
    for name in ("lr:0.1", "lr:0.2"):
        client.set_terminated(client.create_run(where, run_name=name).info.run_id)
    folders = [compare([word], uri=stored.uri).folder for word in ("lr:0.1", "run:lr:0.2")]
    assert [folder.name for folder in folders] == ["lr-0.1", "lr-0.2"]


@pytest.mark.usefixtures("undrawn")
def test_the_answer_comes_first_and_the_command_that_it_speaks_of_last(
    stored: StoredRuns, tmp_path: Path
) -> None:
    words = ["compare", "lonely", "--uri", stored.uri, "--to", str(tmp_path / "x")]
    told = CliRunner().invoke(app, words).stdout.splitlines()
    command = f"raytrain evaluate {stored.ids['pgd', 9][:8]}"
    assert told[0].startswith(
        "leader      digits, linf eps 0.1, validation only: A, run lonely (pgd)"
    )
    assert [line for line in told if line.endswith(command)][0].startswith("next        ")
    values = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout.splitlines()[-1])
    (arena,) = values["arenas"]
    assert arena["next"] == command and arena["decided"] is True
    page = (tmp_path / "x" / "report.html").read_text()
    assert (
        page.index(arena["answer"].partition(" (")[0]) < page.index(command) < page.index("<h2>")
    )
