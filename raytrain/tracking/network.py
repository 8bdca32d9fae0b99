"""A trained network in MLflow's own format."""

from __future__ import annotations

import logging
from typing import Any


def log_network(uri: str, run_id: str, model: Any, example: Any) -> None:
    """The network in MLflow's PyTorch flavour, exported as a graph that loads without pickles.

    `example` is a numpy batch of at least two images; other batch sizes work too.
    """
    import mlflow
    from mlflow import pytorch
    from mlflow.models import infer_signature

    noisy = [logging.getLogger(name) for name in ("mlflow", "torch.export", "torch._dynamo")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id, nested=True):
            pytorch.log_model(
                model.cpu().eval(),
                name="model",
                input_example=example,
                signature=infer_signature(example, example[:, 0, 0, :1]),
                pip_requirements=["torch", "numpy"],
            )
    finally:
        mlflow.set_tracking_uri(before)
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
