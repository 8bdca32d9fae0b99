"""Search: Ray Tune executes, Optuna proposes and remembers, MLflow shows."""

from raytrain import session  # first: it sets what Ray reads when it is imported
from raytrain.sweep.engine import TuneResult, tune
from raytrain.sweep.ledger import SweepProgress, TrialRow
from raytrain.sweep.space import SearchSpace, read_space

__all__ = [
    "SearchSpace",
    "SweepProgress",
    "TrialRow",
    "TuneResult",
    "read_space",
    "session",
    "tune",
]
