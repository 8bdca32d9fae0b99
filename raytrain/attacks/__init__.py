"""Attacks at fixed weights: an initial perturbation, a step, a projection and a stopping rule."""

from raytrain.attacks.ascent import AttackResult, ProjectedAscent
from raytrain.attacks.init import INITS, AbstractInit, Gaussian, Init, Remembered, Uniform, Zero
from raytrain.attacks.learned import AttackerSpec, LearnedAscent
from raytrain.attacks.step import Ascent, ascend
from raytrain.attacks.stopping import (
    NEVER,
    STOPPINGS,
    AbstractStopping,
    Gap,
    Never,
    Probe,
    Stopping,
    StoppingState,
)

__all__ = [
    "INITS",
    "NEVER",
    "STOPPINGS",
    "AbstractInit",
    "AbstractStopping",
    "Ascent",
    "AttackerSpec",
    "AttackResult",
    "Gap",
    "Gaussian",
    "Init",
    "LearnedAscent",
    "Never",
    "Probe",
    "ProjectedAscent",
    "Remembered",
    "Stopping",
    "StoppingState",
    "Uniform",
    "Zero",
    "ascend",
]
