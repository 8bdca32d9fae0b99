"""The table at the end of a sweep, at any width."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raytrain.cli.trials_table import trials_table
from raytrain.tuning.budget import TrialRow


def trial(number: int, value: float | None, state: str = "complete", **params: Any) -> TrialRow:
    metrics = {"valid/clean": 0.9, "cost/fe_per_sample": 11.0, "cost/seconds": 12345.6}
    measured = {} if value is None else {"valid/robust": value, **metrics}
    params = {path.replace("__", "."): one for path, one in params.items()}
    values = () if value is None else (value,)
    return TrialRow(number, state, values, params, measured, 4, f"t{number:04d}")


def varied(name: str, schedule: str) -> dict[str, Any]:
    return {"optimizer__lr": 0.123456, "algorithm__name": name, "optimizer__schedule": schedule}


LONG = "a-schedule-whose-name-is-very-much-longer-than-others"
TRIALS = [
    trial(0, 0.25, **varied("pgd", "cosine")),
    trial(1, 0.75, **varied("trades", "a-schedule-of-28-characters.")),
    trial(2, 0.9, "stopped", **varied("pgd", LONG)),
    trial(3, None, "failed", **varied("pgd", "cosine")),
    trial(4, 0.5, **varied("mart", "cosine")),
]


def sweep(trials: list[TrialRow] = TRIALS, **more: Any) -> Any:
    shown = {"best": trials[1], "front": [], "objectives": ["valid/robust"], "directions": [1]}
    return SimpleNamespace(name="s", trials=trials, **(shown | more))


def printed(result: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(trials_table(result, width))
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def cells(lines: list[str]) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("│┃").replace("┃", "│").split("│")]
        for line in lines
        if line[0] in "│┃"
    ]


def test_a_wide_table_has_all_that_was_searched_and_the_best_first() -> None:
    head, *rows = cells(printed(sweep(), 200))
    assert head[:6] == ["trial", "robust", "clean", "algorithm", "lr", "schedule"]
    assert head[6:] == ["state", "epochs", "FE/sample", "seconds"]
    assert [row[0] for row in rows] == ["t0001 *", "t0004", "t0000", "t0002", "t0003"]
    assert rows[0][1:6] == ["0.75", "0.9", "trades", "0.1235", "a-schedule-of-28-characters."]
    assert rows[3][5].endswith("…") and rows[4][1:3] == ["-", "-"]
    smallest = sweep(directions=[-1], best=TRIALS[0])
    assert [row[0] for row in cells(printed(smallest, 200))[1:4]] == ["t0000 *", "t0004", "t0001"]


@pytest.mark.parametrize("width", range(22, 130, 3))
def test_a_narrow_table_has_fewer_columns_and_the_best_row_whole(width: int) -> None:
    lines = printed(sweep(), width)
    assert max(map(len, lines)) <= width
    whole_head, whole_best, *_ = cells(printed(sweep(), 200))
    head, best, *_ = cells(lines)
    whole = dict(zip(whole_head, whole_best, strict=True))
    assert dict(zip(head, best, strict=True)) == {name: whole[name] for name in head}
    assert head[:2] == ["trial", "robust"]
    assert ("no room for" in " ".join(lines)) == (len(head) < len(whole_head))


def test_the_front_of_several_objectives_is_at_the_top() -> None:
    front = [TRIALS[0], TRIALS[4]]
    result = sweep(front=front, objectives=["valid/robust", "valid/clean"], directions=[1, 1])
    rows = cells(printed(result, 200))[1:]
    assert [row[0] for row in rows[:3]] == ["t0004 *", "t0000 *", "t0001"]
