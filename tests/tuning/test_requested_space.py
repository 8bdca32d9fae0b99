"""The sweep that a command continues is the one of that very name, wherever it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain.core.errors import RequestError
from raytrain.tuning.requested_space import wanted_space
from raytrain.tuning.space.search_space import SearchSpace

NAMES = ["[v1]", "try #7", "x: y", "007", "*", "a=b", "no"]


def sweep(storage: Path, experiment: str, name: str) -> None:
    folder = storage / experiment / name
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(f"name: it\nbase: {{experiment: '{experiment}'}}\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_found_by_its_name_below_any_storage(name: str, tmp_path: Path) -> None:
    storage = tmp_path / "a #1: [x] {y}"
    for one in ("v1", "x", name):
        sweep(storage, "exp #1", one)
    words = [f"storage={storage}", "search.earlier=a: b: c", "study=x #1"]
    space = wanted_space(None, words, resume=name)
    assert (space.base_run.storage, space.base_run.experiment) == (storage, "exp #1")
    assert (space.search.earlier, space.study) == ("a: b: c", "x #1")


@pytest.mark.parametrize("pattern", ["*", "?", "[ab]", "a/../b"])
def test_a_name_is_no_pattern(pattern: str, tmp_path: Path) -> None:
    sweep(tmp_path, "e", "b")
    with pytest.raises(RequestError, match="^--resume: there is no sweep ") as caught:
        wanted_space(None, [f"storage={tmp_path}"], resume=pattern)
    assert str(caught.value).endswith(f"{pattern} below {tmp_path}")


def test_a_name_in_two_experiments_needs_the_experiment(tmp_path: Path) -> None:
    for experiment in ("e[1]", "e1"):
        sweep(tmp_path, experiment, "same")
    with pytest.raises(RequestError, match=r"^--resume: same .* e1 and e\[1\]; .*experiment="):
        wanted_space(None, [f"storage={tmp_path}"], resume="same")
    for experiment in ("e[1]", "e1"):
        words = [f"storage={tmp_path}", f"experiment={experiment}"]
        assert wanted_space(None, words, resume="same").base_run.experiment == experiment


@pytest.mark.parametrize(
    "changes", [["epochs=3", "budget.trials=7"], {"epochs": 3, "budget": {"trials": 7}}]
)
def test_words_and_fields_change_a_space_in_whatever_form_it_is_given(
    changes: list[str] | dict[str, Any], tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "base": {"data": "digits", "epochs": 1},
        "space": {"optimizer.lr": {"float": [0.01, 1], "log": True}},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(given))
    record = SearchSpace.model_validate({"name": "space", **given})
    spaces = [wanted_space(one, changes) for one in (given, record, tmp_path / "space.yaml")]
    assert spaces[0].base_run.epochs == 3 and spaces[0].budget.trials == 7
    assert len({space.hash() for space in spaces}) == 1
    assert {space.name for space in spaces} == {"space"}
    assert wanted_space(record, trials=4).base_run.epochs == 1


def test_storage_without_a_path_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"^storage: expected a path|^storage: .*path, found None"
    ):
        wanted_space(None, ["storage="], resume="x")
