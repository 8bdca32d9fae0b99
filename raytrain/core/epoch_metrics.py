"""The rows of metrics of training and of validation, and the names that they are logged under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FOSC_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Edges of the histogram of FOSC, in nats: each share is of the samples at or below the edge."""

IN_EPS = "_in_eps"
"""Suffix of the parameters that repeat a step size as a multiple of the radius."""


def _below(edge: float) -> str:
    return f"fosc_histogram/below_{edge:g}"


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Counts and costs are totals since the start of training, over all workers."""

    epoch: int  # epochs finished, from 1; the last may be a part of one
    loss: float  # mean training loss of the epoch, nats
    inner_steps: float  # mean steps an attack took
    fosc: float  # mean FOSC over the ball on the last batch, after its update, eval mode, nats
    fosc_box: float  # the same over the legal pixels of the ball
    fosc_p90: float  # 90th percentile of `fosc`
    lr: float  # of the last step
    fe: int  # forward-equivalents, validation and probes left out
    samples: int  # images trained on
    seconds: float  # spent training and compiling, validation left out
    progress: float = 0.0  # share of training that is done
    clean: float | None = None  # validation accuracy; None in epochs without evaluation
    robust: float | None = None  # validation accuracy under the evaluation attack
    best: float | None = None  # highest `robust` so far
    improved: bool = False  # whether `best` is of this epoch
    final: bool = False  # the last row of its run
    stopped_early: bool = False  # final before all epochs were done
    stopped_by: str | None = None  # why, in a sentence
    fosc_below: tuple[float, ...] = ()  # shares of samples with FOSC at most FOSC_EDGES
    own: Mapping[str, float] = field(default_factory=dict)  # what the algorithm measures itself
    sentinels: Mapping[str, float] = field(
        default_factory=dict
    )  # readings, where there was a validation
    compile_seconds: float = 0.0  # of `seconds`, by torch.compile
    images_per_second: float | None = None  # of this epoch without compiling, over all workers
    step_ms: float | None = None  # mean time of a step, milliseconds, without compiling
    bf16_peak_share: float | None = None  # of this epoch without compiling; None: peak not known
    execution: str = ""  # how steps are executed, and why

    def metrics(self) -> dict[str, float]:
        """Return the measured values by flat names for MLflow and Tune."""
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
            "valid/robust_drop": None
            if self.best is None or self.robust is None
            else robust_drop(self.best, self.robust),
            "cost/fe": float(self.fe),
            "cost/fe_per_sample": self.fe / max(1, self.samples),
            "cost/samples": float(self.samples),
            "cost/seconds": self.seconds,
            "cost/compile_seconds": self.compile_seconds,
            "cost/images_per_second": self.images_per_second,
            "cost/step_ms": self.step_ms,
            "cost/bf16_peak_share": self.bf16_peak_share,
        }
        measured = {name: value for name, value in named.items() if value is not None}
        shares = zip(FOSC_EDGES, self.fosc_below, strict=False)
        below = {_below(edge): share for edge, share in shares}
        sentinels = {f"sentinel/{name}": value for name, value in self.sentinels.items()}
        return {**measured, **below, **sentinels, **self.own}

    def tags(self) -> dict[str, str]:
        """Return the tags of the run after this epoch: how it is executed, why it ended early."""
        execution = {"execution": self.execution} if self.execution else {}
        return execution | ({} if self.stopped_by is None else {"stopped_by": self.stopped_by})


def robust_drop(best: float, robust: float) -> float:
    """The share of the best robustness that has been lost.

    >>> robust_drop(best=0.5, robust=0.375)
    0.25
    """
    return 0.0 if best == 0 else 1 - robust / best


TIMED = (
    "cost/seconds",
    "cost/compile_seconds",
    "cost/images_per_second",
    "cost/step_ms",
    "cost/bf16_peak_share",
)
"""Metrics in which equal runs differ."""

GPU_METRICS = {
    "cost/bf16_peak_share": "floating-point operations of the epoch's forward-equivalents per second, "
    "as a share of what the GPU reaches in dense bf16; absent where that is not known",
}
"""Metrics of runs on a GPU of a known kind."""

OWN_METRICS = {
    "engm/clipped": "share of samples whose weight is below one (outer engm)",
    "engm/gamma1": "slope of weight-gradient norms over input-gradient norms",
    "engm/gamma0": "intercept of that line",
    "engm/alpha": "threshold on an example's norm, where it follows a quantile",
    "ssds/lambda": "multiplier of the learning rate (ssds, budget full)",
    "ssds/t": "epigraph variable of the loss (ssds, budget full)",
    "l2l/attack_loss": "inner objective the learned attacker reaches, on the last batch",
    "l2l/pgd_loss": "the same for PGD from the same start",
}
"""Metrics that some algorithms have beside the others."""

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
    "valid/robust_drop": "share of it that has been lost since: overfitting, sudden or slow",
    "sentinel/fgsm": "accuracy of the probe under one FGSM step of eps",
    "sentinel/robust": "accuracy of the probe under the evaluation attack",
    "sentinel/fgsm_gap": "how far the first is above the second: catastrophic overfitting",
    "sentinel/zero_grad": "share of the probe's correct images without an input gradient",
    "sentinel/noise_gap": "share of the probe that the attack misses and random corners hit",
    "sentinel/fe": "forward-equivalents of looking at the probe, once",
    "cost/fe": "forward-equivalents spent on training",
    "cost/fe_per_sample": "forward-equivalents per image trained on",
    "cost/samples": "images trained on",
    "cost/seconds": "seconds spent training and compiling",
    "cost/compile_seconds": "of them by torch.compile, in the first worker",
    "cost/images_per_second": "images trained on per second of the epoch, over all workers, compiling "
    "left out",
    "cost/step_ms": "mean time of a step of the epoch, milliseconds, compiling left out",
    **GPU_METRICS,
    **{
        _below(edge): f"share of training perturbations with FOSC at most {edge:g} nats"
        for edge in FOSC_EDGES
    },
    **OWN_METRICS,
}
"""Every metric of a run and what it means; the objective of a sweep is one of them."""


@dataclass(frozen=True)
class EvalReport:
    """Result of an evaluation. Accuracies are shares of `images`."""

    clean: float
    robust: float
    images: int
    attack: str  # such as pgd20x1
    fe: int  # what the evaluation cost
