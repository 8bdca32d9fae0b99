"""Accuracy class by class, and images with what was done to them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.data.catalogue import SOURCES
from raytrain.evaluation.names import attack_title
from raytrain.plotting.sheet import SMALL, TEXT, sheet, short
from raytrain.report.comparable import ComparableRuns
from raytrain.report.rows import VALID, Row
from raytrain.report.styles import best_first, title_of

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS, _CLASSES = 16, 20
_SETTINGS, _EXAMPLES = 3, 8
_CELL, _TEXT = 1.12, 0.25  # from one picture to the next; room for a word, in pictures
_DARK, _LIGHT = "#111111", "#fdfdfd"  # on a coloured cell, whatever the page's own ink is


def class_names(data: str) -> tuple[str, ...]:
    """Names of the classes of a known data set; else none."""
    return SOURCES[data].classes if data in SOURCES else ()


def by_class(row: Row, attack: str) -> dict[int, float]:
    """Share of each class's images that survive, mean over seeds."""
    shares: dict[int, list[float]] = {}
    for one in row.best:
        if one.flags is None or attack not in one.flags.column_names:
            continue
        labels = one.flags["label"].to_numpy()
        held = np.asarray(one.flags[attack].to_numpy(zero_copy_only=False), dtype=bool)
        for label in np.unique(labels):
            shares.setdefault(int(label), []).append(float(held[labels == label].mean()))
    return {label: float(np.mean(values)) for label, values in sorted(shares.items())}


def class_figure(comparable: ComparableRuns) -> Figure | None:
    """A cell for each configuration and class: clean on the left, attacked on the right."""
    if comparable.attack == VALID:
        return None
    rows = [row for row in best_first(comparable) if by_class(row, comparable.attack)][:_ROWS]
    if not rows:
        return None
    labels = sorted({label for row in rows for label in by_class(row, comparable.attack)})
    labels = _hardest(rows, comparable.attack, labels)
    names = class_names(comparable.data)
    words = [short(names[k], 11) if k < len(names) else str(k) for k in labels]
    figure = sheet(7.6, 1.2 + 0.34 * len(rows) * 2)
    panels: list[Any] = list(figure.subplots(2, 1, squeeze=False).flat)
    for axes, attack in zip(panels, ("clean", comparable.attack), strict=True):
        table = np.array([[by_class(r, attack).get(k, np.nan) for k in labels] for r in rows])
        grid = np.arange(len(labels) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
        axes.pcolormesh(*grid, 100 * table, cmap="cividis", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(100 * table):
            if np.isfinite(value):
                ink = _DARK if value > 55 else _LIGHT
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", size=SMALL, color=ink)
        axes.invert_yaxis()
        axes.set_yticks(range(len(rows)), [title_of(row, 30) for row in rows], size=SMALL)
        axes.set_xticks(range(len(labels)), words, size=SMALL)
        if max(map(len, words)) > 5:
            axes.tick_params(axis="x", rotation=30)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{attack_title(attack)} accuracy by class, %", size=TEXT, loc="left")
    return figure


def _hardest(rows: list[Row], attack: str, labels: list[int]) -> list[int]:
    """All classes, or those that fare worst where there are too many."""
    if len(labels) <= _CLASSES:
        return labels
    shares = [by_class(row, attack) for row in rows]
    mean = {k: float(np.mean([one[k] for one in shares if k in one])) for k in labels}
    return sorted(sorted(labels, key=lambda k: mean[k])[:_CLASSES])


def examples_figure(comparable: ComparableRuns) -> Figure | None:
    """Images, the perturbation that was found, and the two together."""
    rows = [
        (row, table) for row in best_first(comparable) if (table := _examples(row)) is not None
    ]
    rows = rows[:_SETTINGS]
    if not rows:
        return None
    columns = max(min(_EXAMPLES, len(table)) for _, table in rows)
    figure = sheet(7.6, len(rows) * (0.5 + 3 * 7.6 / max(columns, 6) * 0.85))
    names = class_names(comparable.data)
    panels: Any = figure.subplots(len(rows), 1, squeeze=False)
    for axes, (row, table) in zip(panels.flat, rows, strict=True):
        title = f"{title_of(row)}: {attack_title(table['attack'][0].as_py())}"
        axes.set_title(title, size=TEXT, loc="left", pad=6)
        for place in range(min(columns, len(table))):
            _example(axes, table, place, names)
        axes.set_xlim(0, max(columns, 6) * _CELL)
        axes.set_ylim(3 * _CELL + _TEXT, -_TEXT)
        axes.set_aspect("equal")
        axes.set_xticks([])
        lines = [k * _CELL + 0.5 for k in range(3)]
        axes.set_yticks(lines, ["image", "perturbation", "attacked"], size=SMALL)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _examples(row: Row) -> pa.Table | None:
    return next((one.examples for one in row.best if one.examples), None)


def _example(axes: Axes, table: pa.Table, place: int, names: tuple[str, ...]) -> None:
    """A column of three pictures, each one unit wide, with the classes above and below."""
    one = {name: table[name][place].as_py() for name in table.column_names}
    left = place * _CELL
    for line, kind in enumerate(("image", "perturbation", "adversarial")):
        pixels, top = _decoded(one[kind]), line * _CELL
        colours: Any = {} if pixels.ndim == 3 else {"cmap": "gray", "vmin": 0, "vmax": 255}
        extent = (left, left + 1, top + 1, top)
        axes.imshow(pixels, interpolation="nearest", extent=extent, **colours)
    middle: Any = {"ha": "center", "size": SMALL}
    axes.text(left + 0.5, -0.06, _name(one["label"], names), va="bottom", **middle)
    fooled = one["attacked"] != one["label"]
    look: Any = {"color": "#d55e00", "weight": "bold"} if fooled else {}
    below = 2 * _CELL + 1.06
    axes.text(left + 0.5, below, _name(one["attacked"], names), va="top", **middle, **look)


def _decoded(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def _name(label: int, names: tuple[str, ...]) -> str:
    return short(names[label], 10) if 0 <= label < len(names) else str(label)
