"""Search: Ray Tune executes, Optuna proposes and remembers, MLflow shows."""

from raytrain import session as session  # sets what Ray reads when it is imported
