"""Tags of a new experiment: a description, and a page of the UI."""

from __future__ import annotations

from raytrain.tracking.views import EVERY, TAG, View, link

NOTE = "mlflow.note.content"
"""The tag that the UI shows as a description, in Markdown."""

_VIEW = View(
    columns=(
        "metrics.valid/robust",
        "metrics.valid/clean",
        "metrics.cost/fe_per_sample",
        "tags.algorithm",
        "tags.outer",
        "tags.kind",
        "tags.outcome",
        "tags.checks",
    ),
    params=("algorithm.name", "outer.name", "optimizer.lr", "threat.eps"),
    metrics=("cost/fe", "train/fosc", "valid/clean", "valid/robust"),
    curves=("valid/robust", "valid/clean", "train/loss"),
    search="tags.kind != 'sweep'",
    order="metrics.valid/robust",
)

MADE = {
    "mlflow.experimentKind": "custom_model_development",  # the page that the UI opens
    "mlflow.experiment.primaryMetric.name": "valid/robust",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    TAG + EVERY: _VIEW.state(),
}
"""Tags of a new experiment."""

_NOTE = """\
**raytrain**: [runs by robustness]({table}), [their curves and parallel coordinates]({charts}).

One run is one training; a sweep is a parent run, its trials are the runs below it.

- Metrics: `train/` every epoch; `valid/` what choices are made by; `test/` once, by `raytrain evaluate`;
  `cost/` of training; `sentinel/` signs of false robustness; `fosc_histogram/` how far attacks converged;
  `sweep/` and `final/` on a sweep's own run.
- Tags: `kind` (`train`, `sweep`, `trial`, `final`, `imported`), `sweep`, `algorithm`, `outer`, `data`,
  `model`, `threat`, `contract` (runs that share it may be compared), `outcome` of a trial,
  `stopped_by`, `checks`.

```
params.`algorithm.name` = 'pgd' and metrics.`valid/robust` > 0.5
tags.kind = 'trial' and tags.outcome = 'complete'
tags.checks LIKE 'FAILED%'
```
"""


def note(experiment_id: str) -> str:
    """The description of an experiment."""
    table, charts = (link(experiment_id, EVERY, charts) for charts in (False, True))
    return _NOTE.format(table=table, charts=charts)
