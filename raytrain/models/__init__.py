"""Networks from images in [0, 1] to logits, selected by name, with RobustBench's parameter names."""

from raytrain.models.checks import check_network, check_single_images
from raytrain.models.classifier import Classifier
from raytrain.models.robustbench import load_robustbench, robustbench_state_dict
from raytrain.models.spec import MODELS, ROBUSTBENCH, ModelSpec

__all__ = [
    "MODELS",
    "ROBUSTBENCH",
    "Classifier",
    "ModelSpec",
    "load_robustbench",
    "robustbench_state_dict",
    "check_single_images",
    "check_network",
]
