"""Which run a word means: in `evaluate`, `export`, `train --resume` and `compare` alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytrain.cli.completion import run_completions
from raytrain.core.errors import RequestError
from raytrain.report.selection import choose
from raytrain.tracking.pages import page_of
from raytrain.tracking.run_names import run_of
from raytrain.tracking.stores import reader
from raytrain.tracking.views import EVERY, TAG, link, run_link

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")


@dataclass(frozen=True)
class Store:
    """A store with runs by name; `trials` are those of the sweep `sweep`, of which `t0001` is the best."""

    uri: str
    ids: dict[str, str]
    folder: Path  # of checkpoints: that of `first` and of the sweep

    def meant(self, word: str) -> str:
        return run_of(word, self.folder, self.uri)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("names")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("raytrain", (folder / "mlruns").as_uri())
    ids: dict[str, str] = {}

    def run(name: str, tags: dict[str, Any] | None = None, key: str | None = None) -> str:
        begun = 1000 * (1 + len(ids))
        found = client.create_run(experiment, start_time=begun, tags=tags or {}, run_name=name)
        ids[key or name] = found.info.run_id
        return found.info.run_id

    run("first")
    run("twice", key="twice 1")
    run("twice", key="twice 2")
    parent = run("sweep", {"sweep": "sweep", "best_trial": "t0001"}, key="the sweep")
    for trial in ("t0000", "t0001"):
        run(trial, {"mlflow.parentRunId": parent, "sweep": "sweep", "trial": trial})
    run("unfinished", {"sweep": "unfinished"})
    for path in (f"raytrain/{ids['first']}", "raytrain/sweep/trials/t0001"):
        (folder / "runs" / path).mkdir(parents=True)
    return Store(uri, ids, folder / "runs")


def test_a_run_is_found_by_path_id_beginning_and_name(store: Store) -> None:
    run_id = store.ids["first"]
    path = str(store.folder / "raytrain" / run_id)
    assert [store.meant(word) for word in (path, run_id, run_id[:8], "first")] == [
        path,
        *[run_id] * 3,
    ]


def test_a_sweep_stands_for_its_best_trial(store: Store) -> None:
    for word in ("sweep", str(store.folder / "raytrain/sweep"), store.ids["the sweep"][:12]):
        assert store.meant(word) == store.ids["t0001"]


def test_last_is_what_was_begun_last_and_no_trial(store: Store) -> None:
    with pytest.raises(RequestError, match="last: this sweep has no best trial yet"):
        store.meant("last")  # the sweep `unfinished`
    assert choose(reader(store.uri), ["first"]).runs[0].info.run_id == store.ids["first"]


def test_a_word_of_several_runs_names_them(store: Store) -> None:
    with pytest.raises(RequestError, match="twice: 2 runs have this name") as error:
        store.meant("twice")
    for key in ("twice 1", "twice 2"):
        assert store.ids[key][:8] in str(error.value)


@pytest.mark.parametrize("word", ["frist", "0" * 8, "a'b\"c", "%", ""])
def test_a_word_of_no_run_is_refused_with_the_nearest(word: str, store: Store) -> None:
    with pytest.raises(RequestError, match="neither a checkpoint nor a run") as error:
        store.meant(word)
    assert ("nearest is first" in str(error.value)) == (word == "frist")


def test_compare_takes_the_same_words(store: Store) -> None:
    client, run_id = reader(store.uri), store.ids["first"]
    for word in (run_id[:8], str(store.folder / "raytrain" / run_id), "first"):
        assert [run.info.run_id for run in choose(client, [word]).runs] == [run_id]
    found = choose(client, [store.ids["the sweep"][:12]])
    assert {run.info.run_id for run in found.runs} == {store.ids["t0000"], store.ids["t0001"]}


def test_the_page_of_a_name_is_that_of_the_run_the_sweep_or_the_experiment(store: Store) -> None:
    client = reader(store.uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "raytrain")
    where, first, parent = experiment.experiment_id, store.ids["first"], store.ids["the sweep"]
    for word in (first, first[:8], "first"):
        assert page_of(client, word) == run_link(where, first)
    assert page_of(client, "last") == run_link(where, store.ids["unfinished"])
    assert page_of(client, "sweep") == run_link(where, parent)  # it has no view of its own
    assert page_of(client) == page_of(client, "raytrain") == f"#/experiments/{where}/runs"
    for name in ("sweep", EVERY):
        client.set_experiment_tag(where, TAG + name, "")
    assert page_of(client, "sweep") == link(where, "sweep")
    assert page_of(client) == page_of(client, "raytrain") == link(where, EVERY)
    with pytest.raises(RequestError, match="2 runs have this name"):
        page_of(client, "twice")
    with pytest.raises(RequestError, match="no such experiment, sweep or run.* raytrain"):
        page_of(client, "raytran")


def test_a_shell_completes_names_of_runs_and_sweeps(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    names = [name for name, _ in run_completions("")]
    assert names == ["last", "unfinished", "sweep", "twice", "first"]
    assert run_completions("fir") == [("first", f"{store.ids['first'][:8]} in raytrain")]
    for uri in (f"sqlite:///{tmp_path / 'none.db'}", "http://127.0.0.1:1"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert [name for name, _ in run_completions("")] == ["last"]
