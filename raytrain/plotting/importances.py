"""Importances of parameters as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrain.plotting.sheet import COLOURS, SMALL, legend, paper, short
from raytrain.tuning.importance import EqualCost, Importance, most_telling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS = 20  # parameters
_PALE = COLOURS[5]


def importance_bars(
    finished: list[Importance], equal: EqualCost | None, metric: str
) -> Figure | None:
    """A bar for each parameter, and its number of trials: at the end of finished trials, and of all at
    equal cost. Beyond Optuna's, the stopped trials and the numbers.
    """
    from matplotlib.patches import Patch

    order = [one.key for one in most_telling(finished, equal)]
    kinds: list[tuple[dict[str, Importance], str, str]] = []
    if equal is not None and equal.importances:
        words = f"finished and stopped trials, at {equal.cost:,.0f} FE per training image"
        kinds.append(({one.key: one for one in equal.importances}, COLOURS[0], words))
    if finished:
        kinds.append(({one.key: one for one in finished}, _PALE, "finished trials, at their end"))
    rest = [key for known, _, _ in kinds for key in known if key not in order]
    keys = [*order, *dict.fromkeys(rest)][:_BARS]
    if not keys:
        return None
    figure, axes = paper(7.6, 1.2 + 0.17 * (len(kinds) + 0.6) * len(keys))
    width = 0.8 / len(kinds)
    largest = 0.0
    for place, (known, colour, _) in enumerate(kinds):
        for row, key in enumerate(keys):
            if key not in known:
                continue
            value, count = 100 * known[key].value, known[key].trials
            largest = max(largest, value)
            at = row + (place - (len(kinds) - 1) / 2) * width
            axes.barh(at, value, color=colour, height=0.9 * width)
            beside: Any = {"textcoords": "offset points", "va": "center", "size": SMALL}
            axes.annotate(f"{value:.0f} % (n = {count})", (value, at), (4, 0), **beside)
    axes.set_yticks(range(len(keys)), [short(key, 44) for key in keys])
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * largest)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, 1.25 * largest)])
    axes.set_xlabel("importance, % of that of all parameters; n: trials that have the parameter")
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=colour, label=words) for _, colour, words in kinds]
    legend(figure, handles, f"Importance for {metric.partition(',')[0]}", columns=2)
    return figure
