"""Search: Ray Tune runs trials, Optuna proposes and stores them, MLflow displays them."""

from raytrain.distributed import ray_session as ray_session  # sets what Ray reads at its import
