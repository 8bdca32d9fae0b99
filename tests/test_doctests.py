"""The examples in docstrings run and print what is written there."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "raytrain"
PROMPT = ">>> "
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if PROMPT in file.read_text("utf-8")]


def module_of(file: Path) -> ModuleType:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return import_module(".".join(part for part in parts if part != "__init__"))


def examples(file: Path) -> Iterator[doctest.DocTest]:
    """Read from the source, since the checks of shapes wrap functions and hide them from doctest."""
    parser, names = doctest.DocTestParser(), vars(module_of(file))
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            name = getattr(node, "name", file.stem)
            yield parser.get_doctest(text, dict(names), name, str(file), 0)


# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_examples_print_what_is_written(file: Path) -> None:
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for one in examples(file):
        runner.run(one, out=said.append)
    tried = runner.summarize(verbose=False)
    assert not tried.failed, "".join(said)
    assert tried.attempted == file.read_text("utf-8").count(PROMPT)
