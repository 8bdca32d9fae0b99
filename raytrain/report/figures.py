"""All figures of an arena, written as PNG and SVG and put on the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.core.console import log_line
from raytrain.plotting.sheet import save
from raytrain.plotting.sweep_figures import importance_bars
from raytrain.report.comparable import ComparableRuns
from raytrain.report.cost_figures import cost_figure, gap_figure, pairs_figure
from raytrain.report.curve_figures import INSIDE, LEARNING, curves_figure
from raytrain.report.image_figures import class_figure, examples_figure
from raytrain.report.importance import importance_of
from raytrain.report.inline_svg import inline
from raytrain.report.pairs import Pair
from raytrain.report.sections import Drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXTS = {  # kind -> title, caption
    "robust_vs_cost": (
        "Robust accuracy against cost",
        "Up and to the left is better. Vertical lines are 95 % intervals; the black line joins what "
        "nothing cheaper beats. A hollow cross failed a check.",
    ),
    "pairs": (
        "The leader against the others, image by image",
        "Difference on the same test images with its 95 % interval (one seed each), p adjusted by "
        "Holm. Filled: told apart at 5 %. Networks are paired by seed.",
    ),
    "overfitting": (
        "Best and last epoch",
        "What was lost (to the left) by training on after the best epoch: robust overfitting. Of "
        "more than 16 configurations the best.",
    ),
    "learning_curves": (
        "Learning curves",
        "Validation during training: means over seeds, shaded from the lowest to the highest seed.",
    ),
    "fosc_and_steps": (
        "Inside the training attack",
        "How far the training perturbations are from a maximum (FOSC, smaller is closer), and how "
        "many steps were taken for them.",
    ),
    "per_class": (
        "Class by class",
        "Share of the test images of a class, mean over seeds; best configuration on top.",
    ),
    "examples": (
        "Perturbed images",
        "Above an image its class, below it what the network says after the attack (in colour where "
        "it is wrong). Grey in the perturbation is no change; the range is the whole ball.",
    ),
    "importances": (
        "What mattered",
        "PED-ANOVA over the configurations that were trained to their end: what it took to be among "
        "the best tenth in validation. Few configurations say little.",
    ),
}


def draw_comparable(
    comparable: ComparableRuns, pairs: list[Pair], folder: Path, prefix: str
) -> list[Drawn]:
    """The figures that show something; files go to `folder`, their names begin with `prefix`."""
    makers: dict[str, Callable[[], Figure | None]] = {
        "robust_vs_cost": lambda: cost_figure(comparable),
        "pairs": lambda: pairs_figure(pairs),
        "overfitting": lambda: gap_figure(comparable),
        "learning_curves": lambda: curves_figure(comparable, LEARNING),
        "fosc_and_steps": lambda: curves_figure(comparable, INSIDE),
        "per_class": lambda: class_figure(comparable),
        "examples": lambda: examples_figure(comparable),
        "importances": lambda: importance_bars(
            [(one.key, one.value, one.trials) for one in importance_of(comparable)]
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for kind, make in makers.items():
        name = f"{prefix}{kind}"
        try:
            figure = make()
            if figure is None:
                continue
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, not again for every file
            _, vectors = save(figure, folder / name)
            title, caption = _TEXTS[kind]
            drawn.append(Drawn(kind, name, title, caption, inline(vectors, name, title)))
        except Exception as error:  # a picture is not worth a report
            log_line(f"raytrain: {name} could not be drawn ({type(error).__name__}: {error})")
    return drawn
