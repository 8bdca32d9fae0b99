"""Rows that leave the loop. Metric names are made here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """One epoch. Counts and costs are totals since the start of training, over all workers."""

    epoch: int  # epochs finished, from 1
    loss: float  # mean training loss of the epoch, nats
    inner_steps: float  # mean steps an attack took
    fosc: float  # mean FOSC over the ball on the last batch, after its update, eval mode, nats
    fosc_box: float  # the same over the legal pixels of the ball
    fosc_p90: float  # 90th percentile of `fosc`
    lr: float  # of the last step
    fe: int  # forward-equivalents, validation and probes left out
    samples: int  # images trained on
    seconds: float  # spent training, validation left out
    clean: float | None = None  # validation accuracy; None in epochs without evaluation
    robust: float | None = None  # validation accuracy under the evaluation attack
    best: float | None = None  # highest `robust` so far
    improved: bool = False  # whether `best` is of this epoch

    def metrics(self) -> dict[str, float]:
        """Flat names for MLflow and Tune; what was not measured is left out."""
        named = {
            "train/loss": self.loss,
            "train/inner_steps": self.inner_steps,
            "train/fosc": self.fosc,
            "train/fosc_box": self.fosc_box,
            "train/fosc_p90": self.fosc_p90,
            "train/lr": self.lr,
            "valid/clean": self.clean,
            "valid/robust": self.robust,
            "valid/robust_best": self.best,
            "cost/fe": float(self.fe),
            "cost/fe_per_sample": self.fe / max(1, self.samples),
            "cost/samples": float(self.samples),
            "cost/seconds": self.seconds,
        }
        return {name: value for name, value in named.items() if value is not None}


METRICS = {
    "train/loss": "mean training loss of the epoch, nats",
    "train/inner_steps": "mean steps an attack took",
    "train/fosc": "mean FOSC of the training perturbations over the ball, nats",
    "train/fosc_box": "the same over the ball's legal pixels, nats",
    "train/fosc_p90": "90th percentile of FOSC over the ball, nats",
    "train/lr": "learning rate of the last step",
    "valid/clean": "validation accuracy",
    "valid/robust": "validation accuracy under the evaluation attack",
    "valid/robust_best": "highest valid/robust so far",
    "cost/fe": "forward-equivalents spent on training",
    "cost/fe_per_sample": "forward-equivalents per image trained on",
    "cost/samples": "images trained on",
    "cost/seconds": "seconds spent training",
}
"""Every metric of a run and what it means; the objective of a sweep is one of them."""


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found. Accuracies are shares of `images`."""

    clean: float
    robust: float
    images: int
    attack: str  # such as pgd20x1
    fe: int  # what the evaluation cost
