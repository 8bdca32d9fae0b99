"""Labels of a figure lie on no other label, and beside their points."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from raytrain.plotting.sheet import paper, style
from raytrain.report.placement import place_labels, settle


def placed(
    points: list[tuple[float, float]], size: tuple[float, float] = (7.6, 4)
) -> tuple[Any, list[Any]]:
    """A figure with a letter at each point, and the boxes of the letters in pixels."""
    figure: Any
    figure, axes = paper(*size)
    style(axes)
    for x, y in points:
        axes.scatter([x], [y])
    settle(axes)
    texts = [chr(ord("A") + k % 26) + "⚠" * (k % 3 == 0) for k in range(len(points))]
    place_labels(axes, [(x, y, t) for (x, y), t in zip(points, texts, strict=True)])
    found = [one for one in axes.texts if one.get_text()]
    assert sorted(one.get_text() for one in found) == sorted(texts)
    return axes, [one.get_window_extent(figure.canvas.get_renderer()) for one in found]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_no_label_lies_on_another(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    points = [
        (230.0 + spread * 100 * rng.random(), 50 + spread * 30 * rng.random()) for _ in range(30)
    ]
    _, boxes = placed([*points, (0.0, 0.0), (300.0, 100.0)])
    for one, other in itertools.combinations(boxes, 2):
        across = one.x0 < other.x1 and other.x0 < one.x1
        assert not (across and one.y0 < other.y1 and other.y0 < one.y1)


def test_a_lone_label_is_beside_its_point_and_not_on_it() -> None:
    axes, (box, _) = placed([(1.0, 1.0), (9.0, 9.0)])
    x, y = sorted(axes.transData.transform([(1.0, 1.0), (9.0, 9.0)]).tolist(), key=lambda p: p[1])[
        1
    ]
    assert box.x0 > x and box.y0 < y < box.y1 and box.x0 - x < 20


def test_labels_stay_where_they_were_found_when_the_figure_is_drawn() -> None:
    axes, boxes = placed([(1.0, 1.0), (1.0, 1.0), (5.0, 5.0)])
    axes.figure.draw_without_rendering()
    texts = [one for one in axes.texts if one.get_text()]
    again = [one.get_window_extent(axes.figure.canvas.get_renderer()) for one in texts]
    corners = [np.array([box.bounds for box in some]) for some in (again, boxes)]
    assert corners[0] == pytest.approx(corners[1])
