"""The catalogue: every algorithm a configuration can name."""

from typing import Annotated

from pydantic import Field

from raytrain.algorithms.base import (
    AbstractAlgorithm,
    AbstractRecipe,
    Card,
    Outcome,
    TrainState,
)
from raytrain.algorithms.dynamic import Dynamic
from raytrain.algorithms.fgsm_rs import FgsmRs
from raytrain.algorithms.n_fgsm import NFgsm
from raytrain.algorithms.natural import Natural
from raytrain.algorithms.nested import Nested, NestedRecipe
from raytrain.algorithms.pgd import Pgd
from raytrain.types import named

Recipe = Annotated[
    Natural | FgsmRs | NFgsm | Pgd | Dynamic | NestedRecipe,
    Field(discriminator="name"),
    named("name"),
]

CATALOGUE: dict[str, type[AbstractRecipe]] = {
    recipe.model_fields["name"].default: recipe
    for recipe in (Natural, FgsmRs, NFgsm, Pgd, Dynamic, NestedRecipe)
}

__all__ = [
    "CATALOGUE",
    "AbstractAlgorithm",
    "AbstractRecipe",
    "Card",
    "Dynamic",
    "FgsmRs",
    "NFgsm",
    "Natural",
    "Nested",
    "NestedRecipe",
    "Outcome",
    "Pgd",
    "Recipe",
    "TrainState",
]
