"""Names that MLflow records and their meanings; the tables in this folder's README are made here.

python -m raytrain.tracking.vocabulary     # rewrite the tables in raytrain/tracking/README.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from raytrain.core.epoch_metrics import METRICS

README = Path(__file__).with_name("README.md")

TEST_METRICS = {
    "test/clean": "accuracy on the test set; `test_last/` for the last weights",
    "test/ATTACK": "accuracy under that attack: `test/pgd20`, `test/aa`, ...",
    "test/images": "test images",
    "test/fe": "forward-equivalents that the evaluation cost",
    "test/seconds": "seconds spent on attacks, over all processes",
}
"""Of `raytrain evaluate`."""

SWEEP_METRICS = {
    "sweep/best": "objective of the best trial, whose metrics the sweep's run has under their own names",
    "sweep/trials": "trials that ended",
    "sweep/OUTCOME": "trials that ended so: `sweep/complete`, `sweep/stopped`, ...",
    "sweep/fe_per_image": "forward-equivalents per training image, over all trials",
    "final/robust": "accuracy of the best configuration under the strongest attack, mean over new seeds",
    "final/robust_std": "standard deviation of it over the seeds",
    "final/clean": "its clean accuracy on the test set, mean",
    "final/seeds": "seeds",
}
"""Of a sweep's own run; `final/` after `--final`."""

STEP_METRICS = {
    "step/loss": "mean training loss of the epoch under way, nats; its step is the epochs done",
    "step/share": "share of training that is done",
}
"""Once a minute within an epoch: look at them over time, not steps."""

TAGS = {
    "kind": "`train`, `sweep`, `trial`, `final` (a sweep's best on a new seed), `imported` (a file)",
    "algorithm": "`algorithm.name`",
    "outer": "`outer.name`",
    "data": "`data.name`",
    "model": "the network by name: what `auto` stands for",
    "threat": "norm and radius",
    "seed": "`seed`",
    "workers": "processes that trained",
    "contract": "hash of the threat model: runs that share it may be compared",
    "contract_text": "the threat model in words",
    "signature": "hash of everything that decides what is computed",
    "storage": "`storage`, where it is not the default",
    "checks": "`passed`, or `FAILED:` and which; absent before `evaluate`",
    "execution": "how steps were executed, and why, see `performance`; what torch.compile did for it",
    "stopped_by": "the rule of the run that ended it early, and what it saw",
    "sweep": "name of the sweep; of the sweep's run, its trials and finals",
    "trial": "of a trial or a final: its handle, such as `t0007`",
    "folder": "of a trial: where its checkpoints are",
    "outcome": "of a trial: `complete`, `stopped` (early), `infeasible`, `diverged`, `failed`",
    "error": "of a trial that diverged or failed: the sentence",
    "searched": "of a sweep: the parameters that vary",
    "objective": "of a sweep: its metrics",
    "sampler": "of a sweep",
    "pruner": "of a sweep",
    "best_trial": "of a sweep: `t0007`",
    "hardware": "the accelerator, or else the processor",
    "python": "version of Python",
    "raytrain_version": "version of raytrain; `torch_version` and `ray_version` likewise",
    "git_commit": "commit of the working directory; outside a clone that of `$GIT_COMMIT`",
    "git_dirty": "`true` where tracked files differ from it",
}
"""Of runs. MLflow's own tags begin with `mlflow.`."""


def tables() -> dict[str, str]:
    """The tables of the README in Markdown, by the name of their place in it."""
    return {
        "metrics": _table(
            "metric", _without_histogram(METRICS) | STEP_METRICS | TEST_METRICS | SWEEP_METRICS
        ),
        "tags": _table("tag", TAGS),
    }


def with_tables(text: str) -> str:
    """A README with what is between `<!-- NAME -->` and `<!-- end -->` replaced by these tables.

    >>> with_tables("<!-- tags -->old<!-- end -->").splitlines()[1:3]
    ['| tag | meaning |', '|---|---|']
    """
    for name, table in tables().items():
        place = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, table=table: f"{found[1]}\n{table}{found[2]}", text)
    return text


def _without_histogram(metrics: Mapping[str, str]) -> dict[str, str]:
    """The shares of the histogram in one row."""
    single = {name: about for name, about in metrics.items() if "histogram" not in name}
    edges = [name.rpartition("_")[2] for name in metrics if name not in single]
    said = "share of training perturbations with FOSC at most E nats"
    return {**single, "fosc_histogram/below_E": f"{said}; E is {', '.join(edges)}"}


def _table(what: str, meanings: Mapping[str, str]) -> str:
    rows = "".join(f"| `{name}` | {about} |\n" for name, about in meanings.items())
    return f"| {what} | meaning |\n|---|---|\n{rows}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
