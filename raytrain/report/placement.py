"""Labels beside points of a figure, none on another one and as few as may be on what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raytrain.plotting.sheet import GREY, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float, str]
"""A point in the units of the axes, and its label."""

_NEAR, _STEP, _RINGS = 9.0, 6.0, 40  # points of 1/72 inch: the first ring, the next ones; how many
_DIRECTIONS = 16
_GOOD = 6  # rings that are tried for a free place, after the first without another label
_APART = 1.5  # pixels between two labels


def settle(axes: Axes) -> None:
    """Lay out the figure: places are found in pixels, which must not move afterwards."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def place_labels(axes: Axes, places: Sequence[Place], lines: Sequence[np.ndarray] = ()) -> None:
    """A bold label for each place, with a thin line to its point where it is not beside it.

    `lines` are what else is drawn, (points, 2) each in the units of the axes. Call `settle` before.
    """
    pixels = _pixels(axes, [(x, y) for x, y, _ in places])
    drawn = [_pixels(axes, line) for line in lines if len(line)]
    others = np.concatenate([_dense(line) for line in drawn]) if drawn else np.empty((0, 2))
    taken: list[np.ndarray] = []
    for number in sorted(range(len(places)), key=lambda k: (-pixels[k, 1], pixels[k, 0])):
        x, y, text = places[number]
        note = axes.annotate(
            text,
            (x, y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=SMALL,
            weight="bold",
            zorder=5,
            annotation_clip=False,
        )
        size = _size(axes, note)
        offset, box = _free(axes, pixels[number], size, taken, pixels, others)
        note.set_position((float(offset[0]), float(offset[1])))
        taken.append(box)
        if np.hypot(*offset) > _NEAR + 2 * _STEP:
            tie: Any = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5}
            axes.annotate(
                "",
                (x, y),
                (float(offset[0]), float(offset[1])),
                textcoords="offset points",
                arrowprops={**tie, "shrinkA": 4, "shrinkB": 3},
                annotation_clip=False,
            )


def _free(
    axes: Axes,
    point: np.ndarray,
    size: np.ndarray,
    taken: list[np.ndarray],
    points: np.ndarray,
    others: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """An offset from the point, in points, and the box of the label there, in pixels (2, 2).

    Of the places on no other label, from the nearest ring on, that which covers least.
    """
    scale = _scale(axes)
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    first = _RINGS
    for ring in range(_RINGS):
        if ring > first + _GOOD:
            break
        for direction in range(_DIRECTIONS):
            angle = 2 * math.pi * direction / _DIRECTIONS
            way = np.array([math.cos(angle), math.sin(angle)])
            # Wide labels go further to the side than up.
            offset = way * (_NEAR + _STEP * ring + np.array([size[0] / scale / 2 - 3, 0]))
            middle = point + scale * offset
            box = np.array([middle - size / 2, middle + size / 2])
            if any(_meet(box, other) for other in taken):
                continue
            first = min(first, ring)
            covered = 4 * _inside(points, box, 4 * scale) + _inside(others, box, scale)
            away = 0.6 * ring + 0.05 * (direction % _DIRECTIONS != 0) + 3 * _outside(axes, box)
            found.append((float(covered + away), offset, box))
    if not found:  # a figure that is full of labels
        return np.array([_NEAR, 0.0]), np.array([point, point])
    _, offset, box = min(found, key=lambda one: one[0])
    return offset, box


def _pixels(axes: Axes, points: Any) -> np.ndarray:
    return axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))


def _scale(axes: Axes) -> float:
    """Pixels of a point."""
    figure: Any = axes.figure
    return figure.dpi / 72


def _size(axes: Axes, text: Any) -> np.ndarray:
    """Width and height of a text, in pixels."""
    figure: Any = axes.figure
    box = text.get_window_extent(figure.canvas.get_renderer())
    return np.array([box.width, box.height]) + _APART


def _dense(line: np.ndarray) -> np.ndarray:
    """Points of a line not more than 4 pixels apart."""
    parts = [line[:1]]
    for start, end in zip(line[:-1], line[1:], strict=True):
        count = max(1, min(1000, math.ceil(float(np.hypot(*(end - start))) / 4)))
        parts.append(start + (end - start) * np.linspace(0, 1, count + 1)[1:, None])
    return np.concatenate(parts)


def _meet(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[0] < other[1]).all() and (other[0] < one[1]).all())


def _inside(points: np.ndarray, box: np.ndarray, margin: float) -> int:
    within = (points > box[0] - margin) & (points < box[1] + margin)
    return int(within.all(axis=1).sum())


def _outside(axes: Axes, box: np.ndarray) -> int:
    """Whether a box is beyond the axes."""
    frame = axes.get_window_extent()
    low, high = np.array([frame.x0, frame.y0]), np.array([frame.x1, frame.y1])
    return int((box[0] < low).any() or (box[1] > high).any())
