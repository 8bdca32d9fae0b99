"""How a perturbation is moved at fixed weights: a start, a step, a projection and a rule to stop."""

from raytrain.attacks.ascent import Found, ProjectedAscent
from raytrain.attacks.init import Gaussian, Remembered, Start, Uniform, Zero
from raytrain.attacks.learned import AttackerSpec, LearnedAscent
from raytrain.attacks.step import Ascent, ascend
from raytrain.attacks.stopping import Gap, Never, Stop

__all__ = [
    "Ascent",
    "AttackerSpec",
    "Found",
    "Gap",
    "Gaussian",
    "LearnedAscent",
    "Never",
    "ProjectedAscent",
    "Remembered",
    "Start",
    "Stop",
    "Uniform",
    "Zero",
    "ascend",
]
