"""What a sweep over several algorithms says at its end."""

from __future__ import annotations

from typing import Any

import pytest
from sweep_helpers import space_of

from raytrain.commands.sweep_results import few_finished
from raytrain.tuning.budget import TrialRow

LR = {"optimizer.lr": {"float": [0.01, 0.3], "log": True}}
BRANCH = {"algorithm.name": {"branch": {"pgd": {}, "trades": {}}}, **LR}
CHOICE = {"algorithm": {"choice": ["pgd", "trades"]}, **LR}


def rows(path: str, **counts: int) -> list[TrialRow]:
    """So many finished trials of each algorithm, and a stopped one."""
    names = [name for name, count in counts.items() for _ in range(count)]
    states = [("complete", name) for name in names] + [("stopped", name) for name in counts]
    return [
        TrialRow(number, state, (0.5,), {path: name}, {}, 1, f"t{number:04d}")
        for number, (state, name) in enumerate(states)
    ]


@pytest.mark.parametrize(("path", "space"), [("algorithm.name", BRANCH), ("algorithm", CHOICE)])
def test_an_algorithm_with_fewer_than_three_finished_trials_is_named(
    path: str, space: dict[str, Any]
) -> None:
    made = space_of(space=space)
    assert few_finished(made, rows(path, pgd=3, trades=3)) is None
    said = few_finished(made, rows(path, pgd=7, trades=2))
    assert said is not None and "trades (2)" in said and "pgd" not in said and "\n" not in said
    said = few_finished(made, [])
    assert said is not None and "pgd (0), trades (0)" in said


def test_a_sweep_with_one_algorithm_says_nothing() -> None:
    assert few_finished(space_of(), []) is None
    one = {"algorithm.name": {"choice": ["pgd"]}, **LR}
    assert few_finished(space_of(space=one), []) is None
