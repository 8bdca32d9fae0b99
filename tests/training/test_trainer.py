"""Whole runs: what they report, how they resume, how they fail."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyNet, assert_near, tensors, unchecked
from torch import Tensor, nn

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import (
    FOSC_EDGES,
    GPU_METRICS,
    METRICS,
    OWN_METRICS,
    TIMED,
    EpochMetrics,
)
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.train_state import TrainState
from raytrain.data.loader import open_splits
from raytrain.training import part_epoch
from raytrain.training.checkpoint import BEST, LAST, Saved, find, load, save
from raytrain.training.part_epoch import WithinEpoch
from raytrain.training.progress import StepProgress
from raytrain.training.setup import check_kinds, check_resumable, log_changes, preflight
from raytrain.training.trainer import _CHECK_EVERY, fit, fit_and_checkpoint

EVERYWHERE = METRICS.keys() - OWN_METRICS.keys() - GPU_METRICS.keys()
"""The metrics of every run."""


def dropout_net(num_classes: int) -> nn.Module:
    """A network that draws random numbers in training mode."""
    return TinyNet(classes=num_classes, dropout=0.3)


def pocket_net(num_classes: int) -> nn.Module:
    """Few enough weights for a table of every image's gradient."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))


def run_of(**changes: Any) -> RunConfig:
    """A run of a second or less on 128 digits, four epochs of two steps."""
    values = {
        "data": {"name": "digits", "train_size": 128, "validation": 60},
        "model": "small_cnn_nobn",
        "algorithm": {"name": "pgd", "steps": 2},
        "batch_size": 64,
        "epochs": 4,
        "evaluation": {"steps": 2},
        "optimizer": {"lr": 0.05},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


def to_the_end(
    run: RunConfig, resume: Saved | None = None
) -> tuple[list[EpochMetrics], TrainState]:
    rows = list(fit(run, DistributedContext(), resume))
    return [report for report, _ in rows], rows[-1][1]


def numbers(report: EpochMetrics) -> dict[str, float]:
    """The metrics that the clock does not enter."""
    return {name: v for name, v in report.metrics().items() if name not in TIMED}


def content(state: TrainState) -> dict[str, Tensor]:
    """All that a checkpoint must bring back."""
    parts = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "parts": {name: part.state_dict() for name, part in state.parts.items()},
        "cost": vars(state.meter),
        "counters": [state.epoch, state.step, state.best, state.patience_count],
        "random": torch.get_rng_state(),
    }
    return {path: tensor.clone() for path, tensor in tensors(parts)}


def halfway(run: RunConfig, path: Path, epochs: int = 2) -> list[EpochMetrics]:
    """The first epochs of `run`, then a checkpoint at `path`."""
    reports = []
    for report, state in fit(run, DistributedContext()):
        reports.append(report)
        if len(reports) == epochs:
            save(state, run, path, DistributedContext())
            break
    return reports


# --- resuming ---------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic": {"algorithm": {"name": "dynamic", "steps": 4, "c_max": 0.01}},
    "batch_norm": {
        "model": "small_cnn",
        "algorithm": "fgsm_rs",
        "evaluation": {"steps": 1, "every": 3},
    },
    "averaged": {"model": "small_cnn", "ema": 0.9, "algorithm": "n_fgsm"},
    "remembered": {"algorithm": {"name": "pgd", "steps": 1, "start": "remembered"}},
    "dropout": {"model": f"{__name__}:dropout_net", "algorithm": "fgsm_rs"},
    "fp64": {
        "precision": "fp64",
        "threat": {"norm": "l2", "eps": 0.5},
        "optimizer": {"lr": 0.05, "nesterov": True, "schedule": "cosine"},
        "evaluation": {"steps": 1},
    },
    "by_the_step": {"algorithm": {"name": "dynamic", "steps": 3, "c_max": 0.02, "per": "step"}},
    "official": {"algorithm": {"name": "dynamic", "preset": "official", "steps": 2}},
    "free": {"algorithm": {"name": "free", "m": 2}, "model": "small_cnn"},
    "yopo": {"algorithm": {"name": "yopo", "m": 2}, "model": "small_cnn"},
    "trades": {"algorithm": {"name": "trades", "steps": 2}, "model": "small_cnn"},
    "mart": {"algorithm": {"name": "mart", "steps": 2}},
    "gradalign": {"algorithm": "gradalign", "model": "small_cnn"},
    "si_hg": {"algorithm": "si_hg", "model": "small_cnn"},
    "si_hg_b": {"algorithm": {"name": "si_hg", "mode": "B", "bank_dtype": "int8"}},
    "si_hg_slots": {"algorithm": {"name": "si_hg", "mode": "J", "store": "batch_slot"}},
    "si_hg_table": {
        "algorithm": {"name": "si_hg", "mode": "T"},
        "model": f"{__name__}:pocket_net",
        "precision": "fp64",
    },
    "ssds": {"algorithm": {"name": "ssds", "budget": "multiplier"}, "model": "small_cnn"},
    "released": {"algorithm": {"name": "ssds", "preset": "released"}},
    "l2l": {"algorithm": {"name": "l2l", "steps": 3, "phi_every": 3, "warm": 1}},
    "engm": {"algorithm": {"name": "pgd", "steps": 1}, "outer": {"name": "engm", "tau": 3}},
    "engm_quantile": {
        "algorithm": "fgsm_rs",
        "outer": {"name": "engm", "estimator": "loss", "quantile": 0.6, "tau": 3},
    },
    "awp": {
        "algorithm": {"name": "trades", "steps": 1},
        "outer": {"name": "awp", "warmup": 1},
        "model": "small_cnn",
    },
    "smoothed": {"algorithm": {"name": "pgd", "steps": 1, "label_smoothing": 0.2}},
    "by_cost": {
        "algorithm": {"name": "dynamic", "steps": 4, "c_max": 0.01, "per": "step"},
        "fe_per_image": 30,
        "optimizer": {"lr": 0.05, "schedule": "onecycle"},
    },
    "curriculum": {
        "algorithm": {"name": "pgd", "steps": 3},
        "curriculum": {
            "eps": {"start": 0, "until": 0.6},
            "steps": {"start": 1},
            "step_size": {"start": "eps", "end": "eps/4", "shape": "geometric"},
        },
    },
}


QUICK = ("plain", "remembered", "si_hg", "awp", "averaged")
"""Nothing beside the weights, a value of each image, si_hg, AWP, averaged weights; the others are slow."""


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in QUICK)]
)
def test_resumed_run_is_bit_identical(kind: str, tmp_path: Path) -> None:
    run = run_of(**KINDS[kind])
    whole, state = to_the_end(run)
    wanted = content(state)
    with unchecked():  # the whole run was checked
        first = halfway(run, tmp_path / LAST)
        torch.manual_seed(12345)  # as in a new process
        saved = load(tmp_path / LAST)
        assert saved.run == run and saved.epoch == 2
        rest, state = to_the_end(saved.run, saved)
    assert [numbers(r) for r in first + rest] == [numbers(r) for r in whole]
    found = content(state)
    assert found.keys() == wanted.keys()
    assert [path for path in wanted if not torch.equal(found[path], wanted[path])] == []


class Ended(Exception):
    """A process that died."""


def ended_within(run: RunConfig, path: Path, step: int) -> list[EpochMetrics]:
    """The epochs of `run` before a step within which it dies, its checkpoints within epochs at `path`."""
    context, reports = DistributedContext(), list[EpochMetrics]()

    def on_step(done: StepProgress) -> None:
        if done.step == step:
            raise Ended

    within = WithinEpoch(1e-9, lambda state: save(state, run, path, context))
    with pytest.raises(Ended):
        for report, _ in fit(run, context, on_step=on_step, within=within):
            reports.append(report)
    return reports


WITHIN = ("plain", "averaged", "by_cost", "curriculum", "remembered", "dropout")


@pytest.mark.parametrize("kind", WITHIN)
def test_run_that_ended_within_an_epoch_goes_on_bit_by_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_CHECK_EVERY, "cpu", 1)
    run = run_of(**KINDS[kind])
    with unchecked():
        whole, state = to_the_end(run)
        wanted = content(state)
        first = ended_within(run, tmp_path / LAST, step=4)  # the second of the second epoch
        torch.manual_seed(12345)
        saved = load(tmp_path / LAST)
        assert saved.epoch == 1 and saved.content["part_epoch"]["done"] == 1
        rest, state = to_the_end(saved.run, saved)
    assert [numbers(r) for r in first + rest] == [numbers(r) for r in whole]
    found = content(state)
    assert [path for path in wanted if not torch.equal(found[path], wanted[path])] == []


def test_checkpoints_within_epochs_come_by_the_clock_of_the_leading_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((0.0, 119.0, 120.0, 120.0, 121.0, 239.0, 240.0, 240.0))
    monkeypatch.setattr(part_epoch.time, "monotonic", lambda: next(times))
    within = WithinEpoch(2.0)
    due = [within.is_due(DistributedContext()) for _ in range(5)]
    assert due == [False, True, False, False, True]
    monkeypatch.setattr(part_epoch.time, "monotonic", lambda: 1e9)
    assert not WithinEpoch(None).is_due(DistributedContext())


def halted(run: RunConfig) -> list[EpochMetrics]:
    return [report for report, _ in fit(run, DistributedContext())]


def test_a_run_without_gains_ends_early_and_says_so(tmp_path: Path) -> None:
    # At a vanishing learning rate no validation is better than the first.
    still = {"optimizer": {"lr": 1e-12}, "epochs": 9}
    reports = list(
        fit_and_checkpoint(run_of(early_stop=3, **still), DistributedContext(), tmp_path)
    )
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert [report.final for report in reports] == [False, False, False, True]
    assert reports[-1].stopped_early
    assert load(tmp_path / LAST).epoch == 4
    assert len(halted(run_of(**still))) == 9


def test_patience_counts_validations_and_starts_anew_with_every_gain() -> None:
    run = run_of(early_stop={"patience": 2}, epochs=12, evaluation={"steps": 1, "every": 2})
    reports = halted(run)
    waited = 0
    best = float("-inf")
    for report in reports:
        if report.robust is not None:
            waited = 0 if report.robust > best else waited + 1
            best = max(best, report.robust)
        assert report.stopped_early == (waited >= 2)
    assert reports[-1].final


def test_a_gain_below_the_least_one_is_none() -> None:
    reports = halted(run_of(early_stop={"patience": 1, "min_gain": 1.0}))
    assert [report.epoch for report in reports] == [1, 2]


def test_patience_survives_a_checkpoint_and_may_be_changed(tmp_path: Path) -> None:
    still = {"optimizer": {"lr": 1e-12}, "epochs": 6}
    run = run_of(early_stop=3, **still)
    halfway(run, tmp_path / LAST)
    rest, _ = to_the_end(run, load(tmp_path / LAST))
    assert [report.epoch for report in rest] == [3, 4]
    list(fit_and_checkpoint(run, DistributedContext(), tmp_path))
    assert list(fit(run, DistributedContext(), load(tmp_path / LAST))) == []
    rest, _ = to_the_end(run_of(**still), load(tmp_path / LAST))
    assert [report.epoch for report in rest] == [5, 6]


def test_the_histogram_of_fosc_is_a_distribution_function() -> None:
    for report in halted(run_of(epochs=2)):
        shares = report.fosc_below
        assert len(shares) == len(FOSC_EDGES) and list(shares) == sorted(shares)
        assert shares[0] >= 0 and shares[-1] <= 1
        assert report.metrics()["fosc_histogram/below_0.01"] == shares[FOSC_EDGES.index(0.01)]


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    run = run_of(epochs=1)
    halfway(run, tmp_path / LAST, epochs=1)
    assert list(fit(run, DistributedContext(), load(tmp_path / LAST))) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "si_hg"}},
        {"outer": "engm", "algorithm": "trades", "model": "resnet18"},
        {"ema": 0.9},
        {"model": "small_cnn"},
    ],
    ids=["algorithm", "model", "ema", "norm"],
)
def test_a_checkpoint_of_another_kind_is_refused_in_one_sentence(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of()
    halfway(run, tmp_path / LAST)
    other = run_of(**changes)
    saved = load(tmp_path / LAST)
    said = "--resume: the checkpoint does not fit this run|the run to continue was trained with"
    with pytest.raises(RequestError, match=said):
        check_resumable(other, saved, preflight(other))
    check_resumable(run, saved, preflight(run))


def test_a_run_at_its_end_is_not_resumable(tmp_path: Path) -> None:
    for changes, field in (
        ({"epochs": 2}, "epochs: 2"),
        ({"fe_per_image": 14}, "fe_per_image: 14"),
    ):
        run = run_of(**changes)
        list(fit_and_checkpoint(run, DistributedContext(), tmp_path))
        with pytest.raises(RequestError, match=field):
            check_resumable(run, load(tmp_path / LAST), preflight(run))


@pytest.mark.parametrize("last", [False, True])
def test_momenta_lie_in_memory_as_the_weights_do(last: bool, tmp_path: Path) -> None:
    run = run_of(model="small_cnn", algorithm="natural", performance={"channels_last": not last})
    halfway(run, tmp_path / LAST)
    again = run_of(model="small_cnn", algorithm="natural", performance={"channels_last": last})
    rows = fit(again, DistributedContext(), load(tmp_path / LAST))
    _, state = next(rows)
    for weight, values in state.optimizer.state.items():
        assert values["momentum_buffer"].stride() == weight.stride()


def test_an_attacker_of_an_older_version_goes_on_as_it_is_trained_now(tmp_path: Path) -> None:
    run = run_of(algorithm={"name": "l2l", "steps": 1, "hidden": 2})
    halfway(run, tmp_path / LAST)
    saved = load(tmp_path / LAST)
    optimizer = saved.content["parts"]["attacker_optimizer"]
    for group in optimizer["param_groups"]:
        group |= {"fused": None, "capturable": False}
    found, state = to_the_end(run, saved)
    part = state.part("attacker_optimizer", torch.optim.Adam)
    assert all(group["fused"] and group["capturable"] for group in part.param_groups)
    wanted, _ = to_the_end(run, load(tmp_path / LAST))
    assert [numbers(report) for report in found] == [numbers(report) for report in wanted]


def test_a_resumed_run_goes_on_counting_its_seconds(tmp_path: Path) -> None:
    run = run_of(epochs=3)
    first = halfway(run, tmp_path / LAST)
    rest, _ = to_the_end(run, load(tmp_path / LAST))
    assert 0 < first[0].seconds < first[1].seconds < rest[0].seconds


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    run = run_of(epochs=2, model=f"{__name__}:dropout_net")
    plain, _ = to_the_end(run)
    saved = list(fit_and_checkpoint(run, DistributedContext(), tmp_path))
    assert [numbers(r) for r in saved] == [numbers(r) for r in plain]


@pytest.mark.parametrize("kind", ["plain", "averaged"])
def test_weights_of_a_checkpoint_are_those_that_were_judged(kind: str, tmp_path: Path) -> None:
    run = run_of(**KINDS[kind], epochs=1)
    _, state = to_the_end(run)
    save(state, run, tmp_path / LAST, DistributedContext())
    weights, judged = load(tmp_path / LAST).weights, state.eval_model.state_dict()
    assert weights.keys() == judged.keys()
    assert all(torch.equal(weights[name], judged[name]) for name in judged)
    assert (state.eval_model is state.model) == (kind == "plain")


def test_averaged_weights_follow_their_closed_form() -> None:
    run = run_of(ema=0.75, epochs=1, batch_size=128, algorithm="natural")
    rows = fit(run, DistributedContext())
    _, state = next(rows)
    assert state.step == 1
    # The first update copies; averaging begins with the second.
    assert state.ema is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.model.parameters(), state.ema.module.parameters(), strict=True)
    )
    run = run_of(ema=0.75, epochs=2, batch_size=128, algorithm="natural")
    rows = fit(run, DistributedContext())
    before = [p.detach().clone() for p in next(rows)[1].model.parameters()]
    _, state = next(rows)
    assert state.ema is not None
    for old, new, mean in zip(
        before, state.model.parameters(), state.ema.module.parameters(), strict=True
    ):
        assert_near(mean.detach(), (0.75 * old + 0.25 * new).detach(), 1e-6)  # float32


# --- what a run leaves ------------------------------------------------------------------------


def test_every_epoch_is_reported_with_all_metrics() -> None:
    reports, state = to_the_end(run_of())
    assert [report.epoch for report in reports] == [1, 2, 3, 4] and state.epoch == 4
    for report in reports:
        metrics = report.metrics()
        assert metrics.keys() == EVERYWHERE
        assert all(isinstance(v, float) and math.isfinite(v) for v in metrics.values())
        assert 0 <= metrics["valid/robust"] <= metrics["valid/clean"] <= 1
        assert 0 <= metrics["train/fosc_box"] <= metrics["train/fosc"] <= metrics["train/fosc_p90"]
    robust = [report.robust or 0.0 for report in reports]
    assert [report.best for report in reports] == [max(robust[: k + 1]) for k in range(4)]
    assert [r.improved for r in reports] == [
        value > max(robust[:k], default=-1) for k, value in enumerate(robust)
    ]
    assert [report.samples for report in reports] == [128, 256, 384, 512]
    seconds = [report.seconds for report in reports]
    assert seconds == sorted(seconds)


def test_a_run_in_bfloat16_keeps_its_weights_in_float32_and_learns_nearly_the_same() -> None:
    rough, exact = (
        to_the_end(run_of(precision=precision, algorithm="natural", epochs=1))
        for precision in ("bf16", "fp32")
    )
    assert all(value.dtype == torch.float32 for value in rough[1].model.state_dict().values())
    # bfloat16 keeps 8 bits: 0.4% per operation.
    assert rough[0][0].loss != exact[0][0].loss
    assert rough[0][0].loss == pytest.approx(exact[0][0].loss, rel=0.01)


def test_validation_is_left_out_between_its_epochs_and_never_at_the_last() -> None:
    reports, _ = to_the_end(run_of(evaluation={"steps": 1, "every": 3}))
    assert [report.robust is not None for report in reports] == [False, False, True, True]
    absent = EVERYWHERE - reports[0].metrics().keys()
    assert absent == {name for name in METRICS if name.startswith(("valid/", "sentinel/"))}


@pytest.mark.parametrize(
    ("algorithm", "low", "high"),
    [
        ("natural", 3, 3),
        ("fgsm_rs", 5, 5),
        ("n_fgsm", 5, 5),
        ({"name": "pgd", "steps": 0, "start": "zero"}, 3, 3),
        ({"name": "pgd", "steps": 3}, 9, 9),
        ("pgd", 23, 23),
        ({"name": "dynamic", "c_max": -1}, 23, 23),
        ({"name": "dynamic", "c_max": 1e9, "decay": "constant"}, 7, 7),
        ({"name": "dynamic", "c_max": 0.01}, 7.01, 22.99),
        (
            {"name": "nested", "attack": {"steps": 2, "step_size": "eps/2", "bn": "batch_nostat"}},
            7,
            7,
        ),
    ],
    ids=str,
)
def test_a_run_costs_per_sample_what_its_algorithm_declares(
    algorithm: Any, low: float, high: float
) -> None:
    # Validation and probes are not part of it.
    reports, state = to_the_end(run_of(algorithm=algorithm, epochs=2))
    fe = samples = 0
    for report in reports:
        per_sample = (report.fe - fe) / (report.samples - samples)
        fe, samples = report.fe, report.samples
        assert low <= per_sample <= high
        # A sample that stops early pays for one gradient that moves nothing.
        assert 2 * report.inner_steps + 3 <= per_sample <= 2 * report.inner_steps + 5
        assert report.metrics()["cost/fe_per_sample"] == fe / samples
    assert state.meter.fe == fe and state.meter.samples == samples == 256


def test_the_learning_rate_is_that_of_the_middle_of_the_last_step() -> None:
    reports, _ = to_the_end(run_of(optimizer={"lr": 0.2, "schedule": "power"}))
    assert [r.lr for r in reports] == pytest.approx(
        [0.2 * (1 - (epoch + 1.5 / 2) / 4) for epoch in range(4)], rel=1e-12
    )


@pytest.mark.slow
def test_training_learns_and_robust_training_learns_robustness() -> None:
    changes = {"epochs": 6, "batch_size": 16, "model": "small_cnn", "threat": {"eps": 0.15}}
    changes["evaluation"] = {"steps": 10, "every": 6}
    last = {
        name: to_the_end(run_of(algorithm=algorithm, **changes))[0][-1]
        for name, algorithm in {"natural": "natural", "pgd": {"name": "pgd", "steps": 3}}.items()
    }
    # Guessing is right once in ten; of 60 images, four standard errors are 0.16.
    assert all((report.clean or 0) > 0.26 for report in last.values())
    assert (last["pgd"].robust or 0) > (last["natural"].robust or 0)


def test_seeds_change_weights_and_order_but_not_the_split() -> None:
    one, other = (run_of(seed=seed, epochs=1) for seed in (0, 1))
    assert to_the_end(one)[0][0].loss != to_the_end(other)[0][0].loss
    splits = [open_splits(run.data, DistributedContext()) for run in (one, other)]
    assert torch.equal(splits[0].valid.whole, splits[1].valid.whole)
    assert numbers(to_the_end(one)[0][0]) == numbers(to_the_end(one)[0][0])


# --- checkpoints ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState, RunConfig]:
    """A folder with a checkpoint of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    run = run_of(epochs=1, algorithm="natural")
    _, state = to_the_end(run)
    save(state, run, folder / LAST, DistributedContext())
    return folder, state, run


def test_kept_run_leaves_its_last_and_its_best_epoch(tmp_path: Path) -> None:
    run, best = run_of(epochs=3), 0
    for report in fit_and_checkpoint(run, DistributedContext(), tmp_path / "new" / "folder"):
        if report.improved:
            best = report.epoch
        # Written before the epoch is reported.
        assert load(tmp_path / "new" / "folder" / LAST).epoch == report.epoch
        assert load(tmp_path / "new" / "folder" / BEST).epoch == best
    assert report.epoch == 3  # pyright: ignore[reportPossiblyUnboundVariable]
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {
        LAST,
        BEST,
    }


def test_checkpoints_come_every_few_epochs_and_at_the_last(tmp_path: Path) -> None:
    run, written = run_of(epochs=5, checkpoint_every=2, algorithm="natural"), []
    for _ in fit_and_checkpoint(run, DistributedContext(), tmp_path):
        written.append(load(tmp_path / LAST).epoch if (tmp_path / LAST).exists() else 0)
    assert written == [0, 2, 2, 4, 5]


def test_a_folder_means_its_best_checkpoint_and_else_its_last(tmp_path: Path) -> None:
    (tmp_path / LAST).write_bytes(b"last")
    assert find(tmp_path) == tmp_path / LAST
    (tmp_path / BEST).write_bytes(b"best")
    assert find(tmp_path) == tmp_path / BEST
    assert find(tmp_path / LAST) == tmp_path / LAST


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_in_one_sentence(
    share: float, finished: tuple[Path, TrainState, RunConfig], tmp_path: Path
) -> None:
    whole = (finished[0] / LAST).read_bytes()
    file = tmp_path / LAST
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RequestError, match=r"last\.pt: not a checkpoint .* truncated") as caught:
        load(file)
    assert "\n" not in str(caught.value)


class Spy:
    """Leaves a file behind if it is ever unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("spied"),))


@pytest.mark.parametrize(
    "foreign",
    [{"state_dict": {}}, [1, 2], torch.zeros(3), {"format": 2}, Spy(), "text"],
    ids=lambda value: type(value).__name__,
)
def test_a_foreign_file_is_refused_without_running_it(
    foreign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "foreign.pt"
    if isinstance(foreign, str):
        file.write_text("epoch,loss\n1,2.3\n")
    else:
        torch.save(foreign, file)
    with pytest.raises(RequestError, match=r"foreign\.pt: not a checkpoint of raytrain"):
        load(file)
    assert not Path("spied").exists()


def test_a_checkpoint_of_another_format_or_configuration_is_refused_by_name(
    finished: tuple[Path, TrainState, RunConfig], tmp_path: Path
) -> None:
    content = torch.load(finished[0] / LAST, weights_only=True)
    torch.save({**content, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(RequestError, match=r"new\.pt: a checkpoint of format 99"):
        load(tmp_path / "new.pt")
    torch.save({**content, "run": '{"epochs": -1}'}, tmp_path / "odd.pt")
    with pytest.raises(RequestError, match=r"odd\.pt: its configuration is not valid"):
        load(tmp_path / "odd.pt")


@pytest.mark.parametrize("name", ["nowhere.pt", "."])
def test_a_missing_checkpoint_is_refused_with_its_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a checkpoint file, or a folder with best"):
        load(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    finished: tuple[Path, TrainState, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state, run = finished
    save(state, run, tmp_path / LAST, DistributedContext())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingFailed, match=r"storage: .*last\.pt .*No space left on device"):
        save(state, run, tmp_path / LAST, DistributedContext())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_that_torch_cannot_write_is_a_failed_write(
    finished: tuple[Path, TrainState, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0\nand a trace")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(TrainingFailed, match=r"storage: .*unexpected pos 64 vs 0"):
        save(finished[1], finished[2], tmp_path / LAST, DistributedContext())
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_folder_is_a_file_fails_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(TrainingFailed, match="storage: .*taken"):
        list(
            fit_and_checkpoint(
                run_of(epochs=1, algorithm="natural"), DistributedContext(), tmp_path / "taken"
            )
        )


# --- divergence and refusals ------------------------------------------------------------------


def test_divergence_is_told_with_its_epoch_and_a_remedy() -> None:
    run = run_of(optimizer={"lr": 1e9, "schedule": "constant"}, algorithm="natural")
    with pytest.raises(TrainingFailed, match=r"diverged in epoch 1: .*optimizer\.lr"):
        to_the_end(run)


def test_divergence_in_a_later_epoch_is_told_with_that_epoch() -> None:
    # Nothing moves in the first half; then the rate is huge.
    rates = {"kind": "onecycle", "peak": 0.999}
    run = run_of(
        optimizer={"lr": 1e30, "schedule": rates, "momentum": 0},
        algorithm="natural",
        batch_size=128,
        epochs=4,
    )
    reports = []
    with pytest.raises(TrainingFailed, match=r"diverged in epoch 2"):
        for report, _ in fit(run, DistributedContext()):
            reports.append(report.epoch)
    assert reports == [1]


@pytest.mark.parametrize("threat", [{"eps": 8}, {"norm": "linf", "eps": "8"}])
def test_a_radius_in_levels_is_refused_with_what_was_probably_meant(threat: Any) -> None:
    with pytest.raises(ValueError, match=r"threat\.eps: 8 .*8/255"):
        run_of(threat=threat)


@pytest.mark.parametrize(
    ("threat", "accepted"),
    [
        ({"norm": "l2", "eps": 7.9}, True),
        ({"norm": "l2", "eps": 8}, False),  # the diagonal of [0, 1]^64
        ({"norm": "l1", "eps": 63}, True),
        ({"norm": "l1", "eps": 64}, False),
        ({"norm": "linf", "eps": 0.99}, True),
        ({"norm": "linf", "eps": 1}, False),
    ],
)
def test_a_radius_as_wide_as_all_images_is_refused(threat: Any, accepted: bool) -> None:
    run = run_of(threat=threat)
    if accepted:
        preflight(run)
        return
    for start in (preflight, to_the_end):
        with pytest.raises(RequestError, match=r"threat\.eps: .* as wide as"):
            start(run)


def test_a_run_that_does_not_fit_its_data_is_refused() -> None:
    for start in (preflight, to_the_end):
        with pytest.raises(RequestError, match="batch_size: 129 is more than the 128"):
            start(run_of(batch_size=129))
        with pytest.raises(RequestError, match=r"model\.name"):
            start(run_of(model="resnet1000"))


# --- the signature ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 0.06}},
        {"seed": 1},
        {"epochs": 5},
        {"batch_size": 32},
        {"threat": {"eps": 0.11}},
        {"threat": {"norm": "l2", "eps": 0.1}},
        {"algorithm": {"name": "pgd", "steps": 3}},
        {"algorithm": {"name": "pgd", "steps": 2, "attack_bn": "train"}},
        {"data": {"name": "digits", "train_size": 128, "validation": 60, "split_seed": 1}},
        {"model": "small_cnn"},
        {"ema": 0.99},
        {"precision": "fp64"},
        {"evaluation": {"steps": 3}},
    ],
    ids=str,
)
def test_signature_changes_with_what_decides_the_result(change: dict[str, Any]) -> None:
    assert run_of(**change).signature() != run_of().signature()


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 2},
        {"storage": "/elsewhere"},
        {"device": "auto"},
        {"experiment": "other"},
        {"run_name": "mine"},
        {"tracking_uri": "http://127.0.0.1:5000"},
        {"checkpoint_every": 7},
        {"max_failures": 0},
        {"cpus_per_worker": 4},
        {"gpus_per_worker": 0.5},
        {"threat": {"norm": "linf", "eps": 0.1}},  # the customary radius of digits, spelt out
        {"model": {"name": "small_cnn_nobn"}},
        {"algorithm": {"name": "pgd", "steps": 2, "start": {"kind": "uniform"}}},
    ],
    ids=str,
)
def test_signature_does_not_change_with_where_a_run_happens_or_how_it_is_written(
    change: dict[str, Any],
) -> None:
    assert run_of(**change).signature() == run_of().signature()


def test_signature_is_twelve_hexadecimal_digits_and_survives_a_checkpoint(
    finished: tuple[Path, TrainState, RunConfig],
) -> None:
    signature = finished[2].signature()
    assert len(signature) == 12 and int(signature, 16) >= 0
    assert load(finished[0] / LAST).run.signature() == signature


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"algorithm": "trades"},
            "algorithm: the run to continue was trained with pgd, found trades",
        ),
        ({"outer": "awp"}, "outer: the run to continue was trained with sgd, found awp"),
        ({"model": "mlp"}, "model: the run to continue was trained with small_cnn, found mlp"),
    ],
)
def test_another_method_does_not_continue_a_run(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_kinds(as_run({"model": "small_cnn", **change}), as_run({"model": "small_cnn"}))


def test_other_numbers_continue_a_run_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log_changes(as_run({"optimizer": {"lr": 0.01}}), as_run({}), 3)
    assert "raytrain: --resume: optimizer changed" in capsys.readouterr().err
    log_changes(as_run({"workers": 2, "evaluation": {"steps": 3}}), as_run({}), 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 5}, "epochs=15 changed to epochs=5; after epoch 3 the learning rate"),
        ({"epochs": 60}, "epochs=15 changed to epochs=60; after epoch 3 the learning rate"),
        ({"fe_per_image": 40}, "epochs=15 changed to fe_per_image=40; after epoch 3 the"),
    ],
)
def test_another_length_continues_a_run_with_a_line_about_its_schedules(
    change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log_changes(as_run(change), as_run({}), 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"raytrain: --resume: {said}")
