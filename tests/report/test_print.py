"""The report on paper: what is folded on the screen is open, and nothing is cut off."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.lines import Line2D

from raytrain import report
from raytrain.plotting.sheet import sheet
from raytrain.report.styles import letter_legend, title_of

CSS = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
SCREEN, PRINT = CSS.split("@media print {")


def declared(css: str) -> dict[str, str]:
    """Declarations by selector; of several for one selector all of them."""
    found: dict[str, str] = {}
    for selectors, body in re.findall(r"([^{};]+)\{([^{}]*)\}", css):
        for selector in selectors.split(","):
            found[selector.strip()] = found.get(selector.strip(), "") + body
    return found


def test_what_is_folded_on_the_screen_is_open_in_print() -> None:
    printed = declared(PRINT)
    hidden = [name for name, body in declared(SCREEN).items() if "display: none" in body]
    assert hidden == ["tr.folded"]
    assert "display: table-row" in printed["tr.folded"]
    assert "content-visibility: visible" in printed["details::details-content"]


def test_a_page_ends_neither_in_a_figure_nor_after_a_heading() -> None:
    printed = declared(PRINT)
    for name in ("figure", "tr", ".short", ".warn"):
        assert "break-inside: avoid" in printed[name], name
    for name in ("h2", "h3", "tr.band", "tr.fold"):
        assert "break-after: avoid" in printed[name], name


def test_paper_is_white_whatever_the_screen_is() -> None:
    assert CSS.index("prefers-color-scheme: dark") < CSS.index("@media print")
    dark = re.findall(r"--\w+", SCREEN.split("prefers-color-scheme: dark")[1].split("}")[0])
    light = declared(PRINT)[":root"]
    assert "--paper: #fff" in light and [name for name in dark if f"{name}:" not in light] == []


@pytest.mark.parametrize("marks", ["", "⚠"])
def test_two_titles_fit_side_by_side_below_a_figure(marks: str) -> None:
    label = "dynamic steps=10 step_size=0.0376 c_max=0.447 decay=power end=0.545 exponent=0.524"
    setting = SimpleNamespace(names="sweep/t0010")
    row: Any = SimpleNamespace(letter="M", marks=marks, setting=setting, label=label)
    figure = sheet(7.6, 2)
    letter_legend(figure, [Line2D([], [], marker="o", label=title_of(row)) for _ in range(4)])
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    assert drawn.get_window_extent().x1 <= figure.bbox.x1
