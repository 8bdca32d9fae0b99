"""How a perturbation is moved at fixed weights: a start, a step, a projection and a rule to stop."""

from raytrain.attacks.ascent import Found, ProjectedAscent
from raytrain.attacks.starts import Remembered, Start, Uniform, Zero
from raytrain.attacks.stops import Gap, Never, Stop

__all__ = [
    "Found",
    "Gap",
    "Never",
    "ProjectedAscent",
    "Remembered",
    "Start",
    "Stop",
    "Uniform",
    "Zero",
]
