"""A trained network in MLflow's own format."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VARIABLE = "MLFLOW_TRACKING_URI"


def log_network(uri: str, run_id: str, model: Any, example: Any) -> str:
    """The network in MLflow's PyTorch flavour, exported as a graph that loads without pickles.

    `example` is a numpy batch of at least two images (n, c, h, w) in [0, 1]; other batch sizes work
    too. The signature is from images to logits (n, classes). Returns the id of the logged model.
    """
    import mlflow
    import torch
    from mlflow import pytorch
    from mlflow.models import infer_signature

    model = model.cpu().eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(example)).numpy()
    with _quietly(), tracking_at(uri), mlflow.start_run(run_id, nested=True):
        logged = pytorch.log_model(
            model,
            name="model",
            input_example=example,
            signature=infer_signature(example, logits),
            pip_requirements=["torch", "numpy"],
        )
    return str(logged.model_id)


@contextmanager
def _quietly() -> Iterator[None]:
    noisy = [logging.getLogger(name) for name in ("mlflow", "torch.export", "torch._dynamo")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def tracking_at(uri: str) -> Iterator[None]:
    """MLflow's global store, which also decides where the name of a logged model is looked up.

    MLflow sets its environment variable with it; afterwards that is what it was.
    """
    import mlflow

    before, said = mlflow.get_tracking_uri(), os.environ.get(_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if said is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = said
