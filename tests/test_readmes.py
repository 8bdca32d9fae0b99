"""What READMEs promise: links lead somewhere, commands and run files are valid, the catalogue is whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from raytrain.algorithms import RECIPES
from raytrain.cli.app import app, split
from raytrain.cli.config import fields
from raytrain.commands.evaluate import _requested as requested
from raytrain.config.request import as_run
from raytrain.models import ModelSpec, robustbench_state_dict
from raytrain.outer import OUTERS
from raytrain.tuning.space.reading import read_space

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "search_spaces" / "quickstart.yaml"
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / ".github" / name for name in ("CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "raytrain").rglob("README.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "cluster", "search_spaces")),
    ]
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, ...]]:
    """Every `raytrain ...` of a shell block, as the shell takes it apart."""
    found: dict[tuple[str, ...], None] = {}
    for page in PAGES:
        text = "\n".join(blocks(page, "sh")).replace("$name", "pgd")
        text = re.sub(r"^sbatch .*slurm\.sh ", "raytrain ", text, flags=re.MULTILINE)
        for line in re.findall(
            r"^(?:\s*|.* (?:do|--) )(raytrain .*?)(?:; done)?$", text, re.MULTILINE
        ):
            found[tuple(shlex.split(line.partition(" > ")[0], comments=True))] = None
    return list(found)


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_commands_are_found() -> None:
    assert {words[1] for words in commands()} >= {"train", "tune", "evaluate", "compare", "ui"}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is a folder with the file of RobustBench that pages name."""
    with torch.device("meta"):
        model = ModelSpec(name="wideresnet-10-1-silu").build(3, 32, 10, [0.0] * 3, [1.0] * 3)
    state = {k: torch.zeros(v.shape) for k, v in robustbench_state_dict(model).items()}
    torch.save(state, tmp_path / "Gowal2020Uncovering_28_10.pt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_have_the_options_and_fields_that_they_are_given(words: tuple[str, ...]) -> None:
    _, name, *rest = words
    group: Any = typer.main.get_command(app)
    context = group.make_context("raytrain", [name, *rest])
    command = group.get_command(context, name)
    parameters = command.make_context(name, list(rest), parent=context).params
    file, overrides = split(parameters.get("words"))
    if name == "train":
        as_run(None, overrides)
    if name == "tune":
        named = ROOT / (file or "SPACE.yaml")
        read_space(named if named.exists() else QUICKSTART, overrides)
    if name == "config" and parameters["as_yaml"]:
        as_run(None, overrides)
    elif name == "config" and parameters["schema"] is None:
        fields(parameters["words"] or ())
    if name == "evaluate":
        requested(parameters["overrides"] or ())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_run_files_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if not {"space", "feasible"} & values.keys():
            as_run(values)


def test_the_front_page_has_every_algorithm_and_outer_update() -> None:
    section = (ROOT / "README.md").read_text().partition("## Algorithms")[2].partition("\n## ")[0]
    algorithms, outers = section.split("`outer=NAME`")
    assert re.findall(r"^\| `(\w+)` ", algorithms, re.MULTILINE) == list(RECIPES)
    assert re.findall(r"^\| `(\w+)` ", outers, re.MULTILINE) == list(OUTERS)


def test_every_folder_of_the_package_is_in_its_table() -> None:
    text = (ROOT / "raytrain" / "README.md").read_text()
    table = text.partition("## One batch")[0]
    folders = {init.parent.name for init in (ROOT / "raytrain").glob("*/__init__.py")}
    assert {folder for folder in folders if f"{folder}/" in table} == folders
