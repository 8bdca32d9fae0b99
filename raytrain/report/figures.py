"""All figures of an arena, written as PNG and SVG and put on the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain.core.console import log_line
from raytrain.plotting.importances import importance_bars
from raytrain.plotting.sheet import save
from raytrain.report.comparable import ComparableRuns
from raytrain.report.cost_figures import cost_figure, gap_figure, pairs_figure
from raytrain.report.curve_figures import INSIDE, LEARNING, curves_figure
from raytrain.report.image_figures import class_figure, examples_figure
from raytrain.report.importance import equal_cost_of, importance_of
from raytrain.report.inline_svg import inline
from raytrain.report.pairs import Pair
from raytrain.report.sections import Drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXTS = {  # kind -> title, caption
    "robust_vs_cost": (
        "Robust accuracy against cost",
        "Up and to the left is better. Vertical lines are 95 % intervals; the black line joins what "
        "nothing cheaper beats. Hollow marks were stopped early; a hollow cross failed a check.",
    ),
    "pairs": (
        "The leader against the others, image by image",
        "Difference on the same test images with its 95 % interval, p adjusted by "
        "Holm. Filled: different at 5 %. Networks are paired by seed.",
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
        "Above an image its class, below it the prediction after the attack (in colour where "
        "it is wrong). Grey in the perturbation is no change; the range is the whole ball.",
    ),
    "importances": (
        "What mattered",
        "PED-ANOVA: what it took to be among the best quarter (of many the best tenth) in validation, at "
        "equal cost and of those that were trained to their end. Few configurations say little.",
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
            importance_of(comparable), equal_cost_of(comparable), "valid/robust"
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
            if figure.get_layout_engine() is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # laid out once, not again for every file
            _, vectors = save(figure, folder / name)
            title, caption = _TEXTS[kind]
            drawn.append(Drawn(kind, name, title, caption, inline(vectors, name, title)))
        except Exception as error:  # a picture is not worth a report
            log_line(f"raytrain: {name} could not be drawn ({type(error).__name__}: {error})")
    return drawn
