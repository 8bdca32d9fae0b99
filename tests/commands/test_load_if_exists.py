"""`raytrain tune --load-if-exists`: one command for the first start of a sweep and for every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytrain.commands import tune as commands
from raytrain.commands.tune import tune
from raytrain.core.errors import RequestError

SPACE = {
    "name": "s",
    "space": {"optimizer.lr": {"float": [0.1, 1]}},
    "objective": {"metric": "valid/robust", "mode": "max"},
}


@pytest.fixture
def resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the sweeps that were asked for were continuations, in their order."""
    asked: list[bool] = []

    def begin(space: Any, splits: Any, name: str, resume: bool, *rest: Any) -> None:
        del splits, rest
        asked.append(resume)
        folder = space.base_run.storage / space.base_run.experiment / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "space.yaml").touch()

    monkeypatch.setattr(commands, "_tune", begin)
    return asked


def test_a_sweep_is_begun_once_and_then_continued(resumed: list[bool]) -> None:
    for _ in range(2):
        tune(SPACE, name="n", load_if_exists=True)
    tune(SPACE, name="another", load_if_exists=True)
    tune(SPACE, name="n", load_if_exists=True, experiment="another")
    assert resumed == [False, True, False, False]


def test_without_it_a_sweep_is_begun(resumed: list[bool]) -> None:
    for _ in range(2):
        tune(SPACE, name="n")
    assert resumed == [False, False]  # refused by what follows


@pytest.mark.parametrize("words", [{}, {"resume": "n"}, {"name": "n", "resume": "n"}])
def test_it_needs_a_name(resumed: list[bool], words: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^--load-if-exists: expected --name NAME, and no"):
        tune(SPACE, load_if_exists=True, **words)
    assert not resumed
