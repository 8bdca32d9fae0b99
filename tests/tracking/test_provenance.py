"""The MLflow UI as workbench: what runs, sweeps, data sets and networks look like in a real store."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.data.schema import TensorDatasetSchema
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import FEATURE_DISABLED

from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import IN_EPS
from raytrain.data.loader import open_splits
from raytrain.data.spec import DataSpec
from raytrain.tracking import Entry, Tracker, provenance
from raytrain.tracking import tracker as trackers
from raytrain.tracking.data_sets import as_input, training_inputs
from raytrain.tracking.experiment import MADE, NOTE
from raytrain.tracking.network import tracking_at
from raytrain.tracking.registered_model import model_name
from raytrain.tracking.views import EVERY, ROOM, TAG, View, link, run_link
from raytrain.training.run_folder import resume_sweep
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.descriptions import (
    searched,
    sweep_note,
    sweep_tags,
    sweep_view,
)
from raytrain.tuning.initial_trials import _comparable, _run_of
from raytrain.tuning.mlflow_runs import PARENT, MlflowRuns
from raytrain.tuning.space.reading import read_space
from raytrain.tuning.space.search_space import SearchSpace

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

ROOT = Path(__file__).parents[2]
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of the file, since making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracker(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Tracker]:
    """An experiment of the test's own."""
    monkeypatch.setattr(trackers, "PATIENCE", 20.0)
    made = Tracker(store, request.node.name, tmp_path / "s.jsonl")
    yield made
    made.shut("FINISHED")


def begun(tracker: Tracker, handle: str = "run", **more: Any) -> str:
    tracker.open(handle, handle, more.pop("params", {}), more.pop("tags", {}), **more)
    return known(tracker, handle)


def known(tracker: Tracker, handle: str) -> str:
    run_id = tracker.run_id(handle)
    assert run_id is not None
    return run_id


def seen(tracker: Tracker, handle: str = "run") -> Any:
    """The run as the store has it, once all that is queued is there."""
    assert tracker.flush()
    return MlflowClient(tracker.uri).get_run(known(tracker, handle))


def found(tracker: Tracker, wanted: str) -> list[str]:
    """Names of the runs that a search in the UI gives."""
    assert tracker.flush()
    runs = MlflowClient(tracker.uri).search_runs([tracker.experiment_id], wanted)
    return sorted(str(run.info.run_name) for run in runs)


def unpacked(state: str) -> dict[str, Any]:
    """The state of a page as the UI reads it."""
    kind, _, packed = state.partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def space_of(file: Path) -> SearchSpace:
    return SearchSpace.model_validate({"name": file.stem, **yaml.safe_load(file.read_text())})


# --- descriptions -----------------------------------------------------------------------------


def test_an_experiment_that_is_made_here_says_how_to_read_it_and_another_keeps_its_own(
    store: str, tmp_path: Path
) -> None:
    client = MlflowClient(store)
    theirs = client.create_experiment("theirs", tags={NOTE: "mine"})
    for name in ("made", "theirs"):
        Tracker(store, name, tmp_path / f"{name}.jsonl").shut("FINISHED")
    made = client.get_experiment_by_name("made")
    assert made is not None and MADE.items() <= made.tags.items()
    views = re.findall(r"\(#/experiments/(\w+)/runs\?viewStateShareKey=(\w+)", made.tags[NOTE])
    assert views == [(made.experiment_id, EVERY)] * 2 and TAG + EVERY in made.tags
    assert client.get_experiment(theirs).tags == {NOTE: "mine"}
    client.set_experiment_tag(made.experiment_id, NOTE, "edited")
    client.set_experiment_tag(made.experiment_id, TAG + EVERY, "of an earlier version")
    Tracker(store, "made", tmp_path / "again.jsonl").shut("FINISHED")
    assert client.get_experiment(made.experiment_id).tags[NOTE] == "edited"
    assert client.get_experiment(made.experiment_id).tags[TAG + EVERY] == MADE[TAG + EVERY]
    assert client.get_experiment(theirs).tags == {NOTE: "mine"}


def test_the_searches_that_the_description_of_an_experiment_proposes_are_valid(
    tracker: Tracker,
) -> None:
    pgd, trial = {"algorithm.name": "pgd"}, {"kind": "trial", "outcome": "complete"}
    begun(tracker, "good", params=pgd, tags={"checks": "FAILED: randomised"})
    begun(tracker, "bad", params=pgd, tags=trial)
    tracker.log("good", {"valid/robust": 0.6})
    tracker.log("bad", {"valid/robust": 0.4})
    assert tracker.flush()
    experiment = MlflowClient(tracker.uri).get_experiment(tracker.experiment_id)
    searches = experiment.tags[NOTE].split("```")[1].strip().splitlines()
    assert [found(tracker, search) for search in searches] == [["good"], ["bad"], ["good"]]


def test_a_description_knows_the_id_of_its_run(tracker: Tracker) -> None:
    run_id = begun(tracker, note="raytrain evaluate {run_id}, {run_id}")
    assert seen(tracker).data.tags[NOTE] == f"raytrain evaluate {run_id}, {run_id}"


@pytest.mark.parametrize("edited", [False, True])
def test_a_description_is_rewritten_until_somebody_edits_it(
    tracker: Tracker, edited: bool
) -> None:
    run_id = begun(tracker, note="searching")
    assert tracker.flush()
    if edited:
        MlflowClient(tracker.uri).set_tag(run_id, NOTE, "what I think of it")
    tracker.note("run", "found")
    assert seen(tracker).data.tags[NOTE] == ("what I think of it" if edited else "found")
    tracker.note("run", "found more")
    assert seen(tracker).data.tags[NOTE] == ("what I think of it" if edited else "found more")


def test_the_description_of_a_training_names_what_it_is_and_its_contract() -> None:
    run = as_run(None, ["algorithm=trades", "outer=awp", "fe_per_image=60"])
    text = provenance.note(run)
    for word in ("trades", "awp", "small_cnn", "60 forward", provenance.contract_of(run).hash):
        assert word in text
    assert "raytrain evaluate {run_id}`" in text and "raytrain export {run_id}" in text


def test_commands_of_descriptions_say_where_the_run_is_unless_that_is_the_default() -> None:
    url = "s3://bucket/runs?endpoint_override=host:1&scheme=http"
    run = as_run(None, [f"storage={url}"])
    text = provenance.note(run)
    assert f"raytrain evaluate {{run_id}} --storage '{url}'`" in text
    assert f"--to my-model --storage '{url}'" in text
    assert provenance.tags(run)["storage"] == url and "storage" not in provenance.tags(
        as_run(None)
    )
    space = read_space(ROOT / "search_spaces" / "quickstart.yaml", [f"storage={url}"])
    best = TrialRow(3, "complete", (0.75,), {}, {}, 9, "t0003")
    assert f"`raytrain evaluate quick --storage '{url}'`" in sweep_note(
        space, "quick", "7", None, best
    )


def test_the_description_of_a_sweep_has_its_space_and_then_its_best() -> None:
    space = space_of(ROOT / "search_spaces" / "quickstart.yaml")
    before = sweep_note(space, "quick", "7")
    assert all(f"`{path}`" in before for path, _, _ in space.rows())
    assert "`raytrain tune --resume quick`" in before and "Best" not in before
    best = TrialRow(3, "complete", (0.75,), {"algorithm.steps": 4}, {}, 9, "t0003")
    progress = SweepProgress(
        2, space.budget, {"complete": 1, "stopped": 1}, 0, 230.0, 1.0, None, best, ()
    )
    after = sweep_note(space, "quick", "7", progress, best, {"t0003": "ab"})
    first, second, *_ = after.splitlines()[::2]
    assert first == f"**Best: [t0003]({run_link('7', 'ab')})**, valid/robust 0.75: `steps=4`."
    assert "`raytrain evaluate quick`" in second and f"[Trials]({link('7', 'quick')})" in second
    assert "1 complete, 1 stopped; 230 FE per image" in after


def test_the_command_that_continues_a_sweep_says_where_it_is_unless_that_is_the_default() -> None:
    run = as_run(None)
    assert resume_sweep("a b", run.experiment, run.storage) == "raytrain tune --resume 'a b'"
    words = "raytrain tune --resume s experiment=mine storage=here"
    assert resume_sweep("s", "mine", Path("here")) == words


# --- names, tags and parameters ---------------------------------------------------------------


def test_runs_are_found_by_what_they_are(tracker: Tracker, tmp_path: Path) -> None:
    run = as_run(None, ["algorithm=n_fgsm", "outer=clip"])
    tracker.open(PARENT, "s", {}, {**provenance.tags(run, "sweep"), "sweep": "s"})
    for study, folder, handle in (("s", "s", "t0"), ("s-final-ab", "final-ab", "final-ab-0")):
        mirror = MlflowRuns(tracker, study, tmp_path / folder)
        mirror.begin(handle, run, {"algorithm.steps": 2})
        mirror.row(handle, {"valid/robust": 0.5}, 1)
        mirror.end(handle, "complete")
    tracker.open("run", "alone", {}, provenance.tags(run))
    trial, final = "t0 steps=2", "final-ab-0 steps=2"
    for search, wanted in {
        "tags.kind = 'trial'": [trial],
        "tags.kind = 'final'": [final],
        "tags.kind = 'train'": ["alone"],
        "tags.sweep = 's' and tags.kind != 'sweep'": [final, trial],
        "tags.outcome = 'complete'": [final, trial],
        "tags.algorithm = 'n_fgsm' and tags.outer = 'clip'": ["alone", final, "s", trial],
        "tags.model = 'small_cnn' and tags.threat = 'linf 0.1' and tags.kind = 'trial'": [trial],
        "params.`algorithm.name` = 'n_fgsm' and metrics.`valid/robust` > 0.4": [final, trial],
        "dataset.name = 'digits' and dataset.context = 'training'": [final, trial],
    }.items():
        assert found(tracker, search) == wanted, search


@pytest.mark.parametrize(
    ("eps", "step_size", "ratio"),
    [(0.1, "eps/4", 0.25), (0.2, "0.02", 0.1), (0.03, "eps/3", 1 / 3)],
)
def test_step_sizes_are_there_in_pixels_and_as_multiples_of_the_radius(
    eps: float, step_size: str, ratio: float
) -> None:
    run = as_run(None, [f"threat.eps={eps}", f"algorithm.step_size={step_size}"])
    flat = provenance.parameters(run)
    assert flat["algorithm.step_size"] == pytest.approx(ratio * eps)
    assert flat["algorithm.step_size" + IN_EPS] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_a_run_is_recovered_from_its_parameters_although_some_are_said_twice(file: Path) -> None:
    run = space_of(file).base_run
    flat = {path: str(value) for path, value in provenance.parameters(run).items()}
    again = _run_of(flat)
    assert again is not None and _comparable(run, again)


def test_a_run_never_has_the_metrics_of_another_configuration_than_its_own(
    tracker: Tracker,
) -> None:
    begun(tracker, params={"base.lr": 0.1, "base.steps": 1})
    tracker.result("run", {"lr": 0.2, "steps": 2}, {"valid/robust": 0.5}, {"algorithm": "pgd"})
    first = seen(tracker).data
    assert first.params == {"base.lr": "0.1", "base.steps": "1", "lr": "0.2", "steps": "2"}
    assert (first.metrics, first.tags["algorithm"]) == ({"valid/robust": 0.5}, "pgd")
    tracker.result("run", {"lr": 0.2, "steps": 2}, {"valid/robust": 0.6}, {"algorithm": "pgd"})
    assert seen(tracker).data.metrics == {"valid/robust": 0.6}
    for other in ({"lr": 0.3, "steps": 2}, {"steps": 2}):
        tracker.result("run", other, {"valid/robust": 0.9}, {"algorithm": "mart"})
    later = seen(tracker).data
    assert (later.params, later.metrics) == (first.params, {"valid/robust": 0.6})
    assert later.tags["algorithm"] == "pgd"


# --- pages that are set up --------------------------------------------------------------------


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_the_axes_of_a_sweep_are_parameters_of_its_trials_and_its_tag_is_short(file: Path) -> None:
    space = space_of(file)
    axes = searched(space)
    assert len(axes) == len(set(axes)) > 0
    assert sweep_tags(space, "s")["searched"].split(", ") == axes
    page = unpacked(sweep_view(space, "s").state())
    *curves, chart = page["compareRunCharts"]
    sections = {one["uuid"]: one["display"] for one in page["compareRunSections"]}
    assert [one["metricKey"] for one in curves][0] == space.objective[0].metric
    assert "valid/robust" in {one["metricKey"] for one in curves}
    used = [one["metricSectionId"] for one in (*curves, chart)]
    assert list(dict.fromkeys(used)) == list(sections)[:2]
    assert [name for name, unfolded in sections.items() if not unfolded] == list(sections)[-3:]
    assert list(sections)[-2:] == ["cost", "fosc_histogram"]
    conditional = {path for path, _, condition in space.rows() if condition}
    always = [axis for axis in axes if axis.removesuffix(IN_EPS) not in conditional]
    assert chart["selectedParams"] == always
    assert chart["selectedMetrics"][-1] == space.objective[0].metric
    assert page["orderByKey"] == f"metrics.`{space.objective[0].metric}`"
    assert page["columnOrder"][1:] == page["selectedColumns"]
    assert page["columnOrder"] == list(page["columnWidths"])
    assert sum(page["columnWidths"].values()) <= ROOM


def test_a_view_is_a_tag_of_the_experiment_and_none_is_too_long_for_one(tracker: Tracker) -> None:
    begun(tracker)
    view = View(("metrics.a/b", "params.c.d"), ("c.d",), ("a/b",), "tags.kind = 'trial'")
    tracker.view("run", "mine", view)
    assert tracker.flush()
    experiment = MlflowClient(tracker.uri).get_experiment(tracker.experiment_id)
    page = unpacked(experiment.tags[TAG + "mine"])
    assert page["selectedColumns"] == ["metrics.`a/b`", "params.`c.d`"]
    assert (page["searchFilter"], "orderByKey" in page) == ("tags.kind = 'trial'", False)
    noise = np.random.default_rng(0).bytes(9000).hex()
    with pytest.raises(ValueError, match="MLflow keeps 5000"):
        View((), (noise,), ()).state()


# --- data sets --------------------------------------------------------------------------------


def test_a_run_has_its_data_sets_once_however_often_they_are_told(tracker: Tracker) -> None:
    begun(tracker)
    for _ in range(2):
        tracker.inputs("run", training_inputs(DataSpec()))
    inputs = seen(tracker).inputs.dataset_inputs
    told = {one.tags[0].value: json.loads(one.dataset.profile)["num_rows"] for one in inputs}
    assert len(inputs) == 2 and told == {"training": 1260, "validation": 140}
    assert {one.tags[0].key for one in inputs} == {"mlflow.data.context"}
    for one in inputs:  # MLflow reads its own
        schema = TensorDatasetSchema.from_dict(json.loads(one.dataset.schema))
        assert schema.features.input_names() == ["images"]
        source = get_dataset_source_from_json(one.dataset.source, one.dataset.source_type)
        assert isinstance(source, CodeDatasetSource)


def test_a_digest_changes_with_any_pixel_and_any_label_and_with_nothing_else() -> None:
    train = open_splits(DataSpec(), DistributedContext()).train

    def digest(pixels: torch.Tensor, labels: torch.Tensor, **spec: Any) -> str:
        return as_input(DataSpec(**spec), "training", pixels, labels)["digest"]

    own = digest(train.whole, train.labels)
    assert own == training_inputs(DataSpec())[0]["digest"]
    assert own == digest(train.whole.clone(), train.labels.clone(), validation=0.2)
    pixels, labels = train.whole.clone(), train.labels.clone()
    pixels[-1, 0, 7, 7] ^= 1
    labels[0] = (labels[0] + 1) % 10
    others = [digest(pixels, train.labels), digest(train.whole, labels)]
    others.append(digest(train.whole[:-1], train.labels[:-1]))
    assert len({own, *others}) == 4
    assert training_inputs(DataSpec(split_seed=1))[0]["digest"] != own


# --- networks ---------------------------------------------------------------------------------


def entry(robust: float | None, weights: str, judge: str = "j", model: str = "m") -> Entry:
    return Entry(model, "of it", "this one", judge, weights, robust, {"contract": "c"})


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))


EXAMPLE = np.zeros((2, 1, 2, 2), np.float32)


def test_the_alias_follows_the_most_robust_of_those_that_were_judged_alike(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "log_network", lambda *_: "m-" + "0" * 32)
    client = tracker._store.client
    monkeypatch.setattr(client, "create_model_version", sourced(client))
    bests = []
    begun(tracker)
    for number, (robust, judge) in enumerate(
        [(None, "j"), (0.3, "j"), (0.2, "j"), (0.9, "other"), (0.3, "j"), (0.4, "j")]
    ):
        tracker.model("run", None, EXAMPLE, entry(robust, str(number), judge, "follows"))
        aliases = client.get_registered_model("follows").aliases
        bests.append(aliases.get("best"))
    assert [None if best is None else int(best) for best in bests] == [None, 2, 2, 2, 2, 6]
    client.delete_model_version("follows", "6")
    tracker.model("run", None, EXAMPLE, entry(0.1, "last", "j", "follows"))
    assert int(client.get_registered_model("follows").aliases["best"]) == 7


def sourced(client: MlflowClient) -> Any:
    """`create_model_version` for models that nobody has logged."""
    create = client.create_model_version

    def made(name: str, source: str, run_id: str, **more: Any) -> Any:
        run = client.get_run(run_id)
        return create(name, f"{run.info.artifact_uri}/model", run_id, **{**more, "model_id": None})

    return made


def test_a_network_is_registered_once_with_signature_example_tags_and_words(
    tracker: Tracker, network: torch.nn.Module
) -> None:
    from mlflow.models import get_model_info

    run_id = begun(tracker)
    for _ in range(2):  # a sweep that is continued leaves its best again
        tracker.model("run", network, EXAMPLE, entry(0.5, "w", model="once"))
    client = MlflowClient(tracker.uri)
    (version,) = client.search_model_versions("name = 'once'")
    assert (version.run_id, version.description) == (run_id, "this one")
    tags = {"contract": "c", "valid/robust": "0.5", "judge": "j", "weights": "w"}
    assert version.tags == tags and client.get_registered_model("once").description == "of it"
    with tracking_at(tracker.uri):
        info = get_model_info(str(version.source))
    assert info.signature is not None and info.saved_input_example_info is not None
    shapes = [
        spec.shape for spec in (info.signature.inputs.inputs + info.signature.outputs.inputs)
    ]
    assert shapes == [(-1, 1, 2, 2), (-1, 3)]
    logged = client.search_logged_models([tracker.experiment_id])
    assert [model.source_run_id for model in logged] == [run_id]


def test_a_store_without_a_registry_keeps_the_network_and_costs_one_line(
    tracker: Tracker,
    network: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise MlflowException("Model Registry features are not supported here", FEATURE_DISABLED)

    run_id = begun(tracker)
    with monkeypatch.context() as patch:
        for name in ("search_model_versions", "create_registered_model"):
            patch.setattr(MlflowClient, name, refused)
        tracker.model("run", network, EXAMPLE, entry(0.5, "w", model="nowhere"))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "was not registered (Model Registry features" in said[0]
    client = MlflowClient(tracker.uri)
    logged = client.search_logged_models([tracker.experiment_id])
    assert [model.source_run_id for model in logged] == [run_id]
    assert client.search_model_versions("name = 'nowhere'") == []


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "digits-small_cnn-linf-0.1"),
        (["data=cifar10", "threat.norm=l2", "threat.eps=0.5"], "cifar10-resnet18-l2-0.5"),
        (
            ["data=cifar10", "model=torchvision:resnet50"],
            "cifar10-torchvision-resnet50-linf-0.03137",
        ),
    ],
)
def test_networks_of_one_task_are_versions_of_one_model(words: list[str], name: str) -> None:
    assert model_name(as_run(None, words)) == name
    assert model_name(as_run(None, [*words, "algorithm=trades", "seed=3"])) == name


def test_where_networks_are_registered_changes_nothing_of_what_is_computed() -> None:
    runs = [as_run(None, [f"registry={word}"]) for word in ("true", "false")]
    assert runs[0].registry and not runs[1].registry
    assert runs[0].signature() == runs[1].signature()


@pytest.mark.parametrize("said", [None, "sqlite:///theirs.db"])
def test_the_store_of_a_logged_network_is_nobody_elses(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if said is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", said)
    with tracking_at(f"sqlite:///{tmp_path}/mlflow.db"):
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ.get("MLFLOW_TRACKING_URI") == said
