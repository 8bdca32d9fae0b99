"""Names are refused before work begins where MLflow or a file system would not take them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.utils.validation import _validate_model_name

from raytrain.commands.tune import tune
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.tracking.registered_model import model_name
from raytrain.training.run_folder import RUN_ID, folder_of
from raytrain.training.setup import preflight


def refusal(field: str, value: str) -> str:
    """What is said of a run with this value; always one printable line that begins with the field."""
    with pytest.raises(RequestError) as caught:
        preflight(as_run({field: value}))
    said = str(caught.value)
    assert said.startswith(f"{field}: ") and "expected" in said
    assert said.isprintable() and len(said) < 250
    return said


@pytest.mark.parametrize(
    "name",
    [
        *(
            "..",
            ".",
            "../../x",
            "a/..",
            "a/../b",
            "/tmp/x",
            "//x",
            "a/",
            "a//b",
            "/",
            " / ",
            "a/ /b",
        ),
        *("./a", "a/.mlflow"),
    ],
)
def test_an_experiment_whose_folder_would_be_elsewhere_is_refused(name: str) -> None:
    assert "is no name for a folder of its own" in refusal("experiment", name)


@pytest.mark.parametrize("name", [" ", "\t", "\n"])
def test_a_blank_name_is_refused(name: str) -> None:
    for field in ("experiment", "run_name"):
        assert "expected a name" in refusal(field, name)


@pytest.mark.parametrize("letter", ["\0", "\n", "\x1b", "\x7f", "\u2028", "\udcff", "\r"])
def test_what_is_not_one_line_of_text_is_refused(letter: str) -> None:
    for field in ("experiment", "run_name", "storage"):
        assert ascii(letter)[1:-1] in refusal(field, f"a{letter}b")


def test_a_name_that_is_too_long_is_refused_with_the_limit() -> None:
    assert "501 characters; expected at most 500" in refusal("experiment", "a/" * 250 + "b")
    assert "256 bytes; expected at most 255" in refusal("experiment", "é" * 128)
    assert "251 characters; expected at most 250" in refusal("run_name", "é" * 251)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "raytrain",
            "team/digits",
            "my experiment",
            "é" * 127,
            "a/" * 249 + "b",
            "...",
            "..a",
            "a..",
        ),
        *(".hidden", "#1?%20&;'\"", "~", "*", "[a]", "\U0001f468\u200d\U0001f469", "a\\b", "-x"),
    ],
)
def test_other_names_are_names(name: str) -> None:
    as_run({"experiment": name, "run_name": name[:250]}).check_names()


def test_without_a_name_a_run_has_one() -> None:
    as_run({"run_name": ""}).check_names()
    as_run(None).check_names()


@pytest.mark.parametrize("url", ["s3://bucket/runs?region=eu-west-1", "file:///tmp/runs"])
def test_storage_may_be_a_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path))
    run = as_run({"storage": url})
    run.check_names()
    assert run.storage == url and run.root.parent == tmp_path


@pytest.mark.parametrize("url", ["nosuch://bucket/runs", "s3:/bucket/runs"])
def test_storage_that_is_neither_a_folder_nor_a_url_of_a_file_system_is_refused(url: str) -> None:
    assert "; expected" in refusal("storage", url)


def test_a_run_of_an_earlier_version_is_read_whatever_its_names() -> None:
    assert as_run({"experiment": "mine/", "run_name": "x" * 300}).experiment == "mine/"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "", " ", ".", "a\nb", "x" * 251, ".mlflow"])
@pytest.mark.parametrize("option", ["name", "resume"])
def test_a_sweep_gets_no_folder_elsewhere(
    option: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("base: {data: digits}\nspace: {}\n")
    with pytest.raises(RequestError, match=rf"^--{option}: "):
        tune("space.yaml", **dict[str, Any]({option: name}))
    assert os.listdir(tmp_path) == ["space.yaml"]


def test_a_sweep_is_not_named_after_what_a_file_calls_it_if_that_is_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("name: ../x\nbase: {data: digits}\nspace: {}\n")
    with pytest.raises(RequestError, match=r"^name: '\.\./x' is no name for a folder"):
        tune("space.yaml")
    assert os.listdir(tmp_path) == ["space.yaml"]


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "..x", "a b'c", "module:function"])
def test_a_registered_model_has_a_name_that_every_store_takes(name: str, tmp_path: Path) -> None:
    images: np.ndarray = (np.arange(512) % 256).astype(np.uint8).reshape(8, 64)
    made = []
    for folder in (tmp_path / f"{name}.parquet", tmp_path / f"{name}y.parquet"):
        folder.mkdir()
        for split in ("train", "test"):
            columns = {"image": pa.array(list(images)), "label": [0, 1] * 4}
            pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        made.append(model_name(as_run({"data": str(folder), "threat": {"eps": 0.1}})))
    for one in made:
        _validate_model_name(one)
        assert len(one.encode()) <= 250 and "'" not in one
    assert made[0] != made[1]


def test_runs_of_an_experiment_with_slashes_are_found_by_their_ids(tmp_path: Path) -> None:
    train, trial, final = (letter * 32 for letter in "abc")
    for folder in (f"x/{train}", f"team/x/y/{train[:-1]}0"):
        (tmp_path / folder).mkdir(parents=True)
    for folder, run_id in (
        ("team/x/sweep/trials/t0001", trial),
        ("team/x/sweep/final-123456/trials/t0000", final),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / RUN_ID).write_text(run_id)
        assert folder_of(run_id, tmp_path) == tmp_path / folder
    assert folder_of(train, tmp_path) == tmp_path / "x" / train
    assert folder_of(f"{train[:-1]}0", tmp_path) == tmp_path / "team/x/y" / f"{train[:-1]}0"


@pytest.mark.parametrize("name", ["/no/such/folder", "*", "x" * 300, "[a]", "0" * 32])
def test_what_is_no_run_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "experiment" / "a").mkdir(parents=True)
    with pytest.raises(RequestError, match="neither a checkpoint nor the id of a run"):
        folder_of(name, tmp_path)
