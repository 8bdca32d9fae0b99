"""Search: Ray Tune executes, Optuna proposes and remembers, MLflow shows."""

from raytrain.distributed import ray_session as ray_session  # sets what Ray reads at its import
