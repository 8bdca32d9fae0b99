"""The table of `raytrain compare` fits the terminal, its titles and numbers whole."""

from __future__ import annotations

import io

import pytest
from report_helpers import evaluated, trained
from rich.console import Console

from raytrain.cli.compare import comparison_table
from raytrain.report.comparable import comparable_runs
from raytrain.report.configurations import settings_of


def drawn(width: int, seeds: int = 1, tested: bool = True) -> list[str]:
    """The lines of a table of three algorithms with long names."""
    shares = [evaluated(shares={"pgd20": (45, 100), "clean": (80, 100)})] if tested else []
    runs = [
        trained(f"{name}-digits-c_max0.3-epochs30", seed=seed, evaluations=shares)
        for name in ("pgd", "trades", "natural")
        for seed in range(seeds)
    ]
    (comparable,) = comparable_runs(settings_of(runs))
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(comparable, width))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 90, 100, 140])
@pytest.mark.parametrize("tested", [True, False])
def test_titles_and_numbers_are_not_broken(width: int, tested: bool) -> None:
    lines = drawn(width, tested=tested)
    assert max(map(len, lines)) <= width
    titles = [cell.strip() for cell in lines[1].strip("┃").split("┃")]
    assert titles[:3] == ["", "run", "configuration"] and "FE/image" in titles
    assert lines[2].startswith("┡")  # one line of titles
    if tested:
        assert "PGD-20" in titles and any("45.0 [35.6, 54.8]" in line for line in lines)


def test_what_there_is_no_room_for_is_named() -> None:
    narrow, wide = "\n".join(drawn(80)), "\n".join(drawn(140))
    assert "no room for valid, seeds" in narrow and "no room" not in wide
    assert "seeds" in wide.splitlines()[1]
