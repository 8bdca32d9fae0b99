"""Registry of all algorithms that a configuration can select by name."""

from raytrain.algorithms.atta import Atta
from raytrain.algorithms.base import RECIPES, AbstractAlgorithm, AbstractRecipe, Recipe
from raytrain.algorithms.dynamic import Dynamic
from raytrain.algorithms.fat import Fat
from raytrain.algorithms.fgsm_rs import FgsmRs
from raytrain.algorithms.free import Free
from raytrain.algorithms.gradalign import GradAlign
from raytrain.algorithms.l2l import L2l
from raytrain.algorithms.mart import MartRecipe
from raytrain.algorithms.n_fgsm import NFgsm
from raytrain.algorithms.natural import Natural
from raytrain.algorithms.nested import Nested, NestedRecipe
from raytrain.algorithms.pgd import Pgd
from raytrain.algorithms.si_hg import SiHg
from raytrain.algorithms.ssds import Ssds
from raytrain.algorithms.trades import TradesRecipe
from raytrain.algorithms.yopo import Yopo

RECIPES.register(
    Natural,
    FgsmRs,
    NFgsm,
    Free,
    Pgd,
    Yopo,
    TradesRecipe,
    MartRecipe,
    GradAlign,
    Dynamic,
    Fat,
    Atta,
    SiHg,
    Ssds,
    L2l,
    NestedRecipe,
)

__all__ = [
    "RECIPES",
    "AbstractAlgorithm",
    "AbstractRecipe",
    "Atta",
    "Dynamic",
    "Fat",
    "FgsmRs",
    "Free",
    "GradAlign",
    "L2l",
    "MartRecipe",
    "NFgsm",
    "Natural",
    "Nested",
    "NestedRecipe",
    "Pgd",
    "Recipe",
    "SiHg",
    "Ssds",
    "TradesRecipe",
    "Yopo",
]
