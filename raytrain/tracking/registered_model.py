"""What a trained network is in MLflow's model registry: one registered model per task, runs as versions.

A task is a data set, a network and a threat model, since robustness is only compared within these.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from raytrain.config.run import RunConfig
from raytrain.tracking import Entry, provenance
from raytrain.tracking.data_sets import data_name, training_inputs
from raytrain.training.checkpoint import Saved

ROBUST = "valid/robust_best"
"""The metric of a run that its best checkpoint has."""


_LONGEST = 250  # bytes of a name: some stores make a folder of it


def registered(saved: Saved, metrics: Mapping[str, float]) -> Entry:
    """The version that a checkpoint becomes; `metrics` are those of its run's last epoch."""
    run, robust = saved.run, metrics.get(ROBUST)
    name, contract = model_name(run), provenance.contract_of(run)
    data = data_name(run.data)
    score = "" if robust is None else f"{robust:.1%} robust on the validation images, "
    return Entry(
        model=name,
        about=(
            f"{provenance.model_of(run)} on {data}, trained by raytrain for robustness to "
            f"{run.threat.norm} perturbations of at most {run.threat.eps:.5g}. Every training is a "
            "version; the alias `best` is the one with the highest `valid/robust`, which the best "
            f"checkpoint of its run had. Images in [0, 1] to logits: `mlflow.pytorch.load_model("
            f'"models:/{name}@best")`.'
        ),
        note=(
            f"{run.algorithm.name} with {run.outer.name}, {score}epoch {saved.epoch}. "
            f"Threat model `{contract.hash}`: {contract.text}."
        ),
        judge=_judge(run),
        weights=saved.fingerprint,
        robust=robust,
        tags={
            "algorithm": run.algorithm.name,
            "outer": run.outer.name,
            "contract": contract.hash,
            "epoch": str(saved.epoch),
            "seed": str(run.seed),
        },
    )


def model_name(run: RunConfig) -> str:
    """The registered model that a run's network is a version of, such as digits-small_cnn-linf-0.1."""
    words = (data_name(run.data), provenance.model_of(run), run.threat.norm)
    # MLflow's names hold no slash and no colon, and do not begin with `..`; a quote would end the
    # name in a search.
    name = re.sub(r"[^\w.-]", "-", "-".join((*words, f"{run.threat.eps:.4g}"))).lstrip(".")
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST - 9].decode(errors='ignore')}-{digest}"


def _judge(run: RunConfig) -> str:
    """How `valid/robust` was measured: runs that share it had the same images, attack and threat model."""
    _, valid, *_ = training_inputs(run.data)
    attack = run.evaluation.model_dump_json(exclude={"batch_size", "every"})
    text = "\n".join((provenance.contract_of(run).hash, valid["digest"], attack))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
