"""The training loop of one run and its checkpoints. No Ray, MLflow or Optuna here."""
