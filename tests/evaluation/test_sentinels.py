"""Sentinels: closed forms, real catastrophic overfitting, and runs that end by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Affine, batch_of, grey, rng_of, row, tiny_net, unchecked
from rank_helpers import one_of_two, run_both
from torch import Tensor, nn

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import METRICS, TIMED, EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.core.threat_models import AbstractThreatModel, Linf
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch
from raytrain.data.loader import iter_eval, open_splits
from raytrain.evaluation.sentinels import Sentinels, probe, readings
from raytrain.evaluation.validation import Evaluation, SampleFlags, validate
from raytrain.training.checkpoint import LAST, load, save
from raytrain.training.setup import check_resumable, preflight
from raytrain.training.trainer import fit, fit_and_checkpoint

GAP, DROP = "sentinel/fgsm_gap", "valid/robust_drop"


def seen_by(
    model: nn.Module, batch: Batch, ball: AbstractThreatModel, corners: int = 2, restarts: int = 1
) -> dict[str, float]:
    """The readings on a batch that PGD-10 has judged."""
    report, flags = validate(
        model, [batch], ball, Evaluation(restarts=restarts), DistributedContext(), "fp64"
    )
    seen = readings(model, [(batch, flags)], ball, corners, DistributedContext(), "fp64")
    assert seen["robust"] == report.robust
    return seen


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
def test_on_a_linear_model_one_step_is_as_good_as_many_and_better_than_noise(eps: float) -> None:
    slope = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ball, batch = Linf(eps=eps), batch_of(64, classes=2)
    score = (batch.images * slope).flatten(1).sum(1)
    model = Affine(slope)
    away = torch.where(batch.labels == 0, 1.0, -1.0).double().view(-1, 1, 1, 1) * slope
    worst = (ball.box_vertex(away, batch.images) * slope).flatten(1).sum(1) + score
    robust = ((worst > 0).long() == batch.labels).double().mean()
    seen = seen_by(model, batch, ball)
    assert seen["fgsm"] == seen["robust"] == pytest.approx(float(robust))
    assert seen["fgsm_gap"] == seen["noise_gap"] == seen["zero_grad"] == 0.0


class Step(nn.Module):
    """Logits (m, 1 - m), m = 1 where some pixel is within a hundredth of a corner, seen by no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        moved = ((x - 0.5).abs() > 0.099).flatten(1).any(1).to(x.dtype)
        return torch.stack([1 - moved, moved], 1) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_a_model_without_gradients_is_told_by_zero_grad_and_by_random_corners() -> None:
    # Of 30 images of one pixel, a uniform start comes that near to a corner with probability 1%.
    batch = grey([0] * 30)
    seen = seen_by(Step(), batch, Linf(eps=0.1))
    assert (seen["zero_grad"], seen["fgsm"]) == (1.0, 1.0)
    assert seen["noise_gap"] == seen["robust"] >= 0.9
    # All fall at the first corner, and are not tried at the second.
    assert seen["fe"] == 3 * 30 + 30 * seen["robust"]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_saturated_logits_have_no_gradient(scale: float) -> None:
    model = tiny_net()
    with torch.no_grad():
        model.linear.weight.mul_(scale)
        model.linear.bias.mul_(scale)
    batch = batch_of(32)
    with torch.no_grad():
        named = model(batch.images).argmax(1)
    right = Batch(batch.images, named, batch.index, batch.rng)
    seen = seen_by(model, right, Linf(eps=0.03))
    assert seen["zero_grad"] == (1.0 if scale > 1 else 0.0)


def test_what_it_costs_is_counted_exactly() -> None:
    class Counted(nn.Module):
        forwards = backwards = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += len(x)
            if x.requires_grad:
                x.register_hook(self._walked)
            return self.inner(x)

        def _walked(self, grad: Tensor) -> None:
            self.backwards += len(grad)

    batch, ball = batch_of(32), Linf(eps=0.01)
    _, flags = validate(tiny_net(), [batch], ball, Evaluation(), DistributedContext(), "fp64")
    model = Counted(tiny_net())
    seen = readings(model, [(batch, flags)], ball, 3, DistributedContext(), "fp64")
    assert seen["fe"] == model.forwards + model.backwards
    clean, robust = int(flags.clean.sum()), int(flags.robust.sum())
    assert model.backwards == clean > robust > 0
    # An honest model: whoever survives PGD survives corners.
    assert seen["noise_gap"] == 0 and seen["fe"] == 3 * clean + 3 * robust


def test_where_nothing_is_classified_correctly_nothing_is_said_about_gradients() -> None:
    batch = Batch(grey([0]).images, torch.tensor([1]), torch.tensor([0]), rng_of(1))
    seen = seen_by(Affine(row(0.0)), batch, Linf(eps=0.1))
    assert seen == {"fgsm": 0, "robust": 0, "fgsm_gap": 0, "noise_gap": 0, "fe": 0}


# --- the probe ------------------------------------------------------------------------------------


def mlp(num_classes: int) -> nn.Module:
    """Wide enough to learn single steps by heart."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 256):
        layers += [nn.Linear(inputs, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))


def run_of(**changes: Any) -> RunConfig:
    """A run of a second on 320 digits, whose gap rises and falls."""
    values = {
        "data": {"name": "digits", "train_size": 320, "validation": 61},
        "model": f"{__name__}:mlp",
        "threat": {"norm": "linf", "eps": 0.2},
        "algorithm": {"name": "fgsm_rs", "attack_bn": "eval"},
        "batch_size": 32,
        "epochs": 5,
        "precision": "fp64",
        "evaluation": {"steps": 5, "batch_size": 40},
        "optimizer": {"lr": 0.2, "schedule": "constant"},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


def rows_of(
    run: RunConfig, context: DistributedContext | None = None
) -> tuple[list[EpochMetrics], TrainState]:
    rows = list(fit(run, context or DistributedContext()))
    return [report for report, _ in rows], rows[-1][1]


def numbers(report: EpochMetrics) -> dict[str, float]:
    return {name: v for name, v in report.metrics().items() if name not in TIMED}


@pytest.mark.parametrize("images", [7, 50, 61, 1000])
def test_the_probe_is_the_first_images_whatever_the_batches_and_the_workers(images: int) -> None:
    run, model = run_of(), tiny_net()
    wide = nn.Sequential(model, nn.ZeroPad1d((0, 6)))
    found = []
    for batch_size in (10, 500):
        part = open_splits(run.data, DistributedContext(), torch.float64).valid
        batches = list(iter_eval(part, batch_size, 0))
        ball = Linf(eps=0.05)
        _, flags = validate(wide, batches, ball, Evaluation(), DistributedContext(), "fp64")
        probed = list(probe(part, flags, images, batch_size, seed=0))
        index = torch.cat([batch.index for batch, _ in probed])
        assert index.tolist() == list(range(min(images, 61)))
        for batch, told_of in probed:
            assert torch.equal(told_of.clean, flags.clean[batch.index])
        shares = [
            [(part_of(batch, rank), flags_of(f, rank)) for batch, f in probed] for rank in (0, 1)
        ]
        whole = readings(wide, probed, ball, 2, DistributedContext(), "fp64")
        halves = [
            readings(wide, share, ball, 2, DistributedContext(), "fp64")
            for share in shares
            if share
        ]
        # The noise of an image is its own: each half sees what the whole saw of it.
        weights = [
            sum(len(batch) for batch, _ in share) / min(images, 61) for share in shares if share
        ]
        for name in ("fgsm", "robust", "noise_gap"):
            mean = [w * half[name] for w, half in zip(weights, halves, strict=True)]
            assert torch.tensor(mean).sum().item() == pytest.approx(whole[name], abs=1e-6)
        found.append(whole)
    assert found[0]["fgsm"] == found[1]["fgsm"]


def part_of(batch: Batch, rank: int) -> Batch:
    rows = (batch.index % 2 == rank).nonzero().flatten()
    one = batch[rows]
    slots = batch.rng.slots
    assert isinstance(slots, Tensor)
    rng = type(batch.rng)(batch.rng.seed, batch.rng.width, slots[rows], batch.rng.device)
    return Batch(one.images, one.labels, one.index, rng)


def flags_of(flags: SampleFlags, rank: int) -> SampleFlags:
    rows = (flags.index % 2 == rank).nonzero().flatten()
    return SampleFlags(flags.index[rows], flags.clean[rows], flags.robust[rows])


def test_looking_changes_nothing_and_is_not_part_of_the_cost() -> None:
    (blind, without), (watched, state) = rows_of(run_of(sentinels=None)), rows_of(run_of())
    assert not any(name.startswith("sentinel/") for name in blind[-1].metrics())
    for one, other in zip(blind, watched, strict=True):
        ours = {k: v for k, v in numbers(other).items() if not k.startswith("sentinel/")}
        assert ours == numbers(one)
    ours, theirs = state.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_is_claimed_before_the_first_validation() -> None:
    reports, _ = rows_of(run_of(evaluation={"steps": 1, "every": 3}))
    seen = [{n for n in r.metrics() if n.startswith("sentinel/")} for r in reports]
    named = {name for name in METRICS if name.startswith("sentinel/")}
    assert seen == [set(), set(), named, set(), named]


# --- catastrophic overfitting, really -------------------------------------------------------------


def overfitting(algorithm: dict[str, Any], **changes: Any) -> list[EpochMetrics]:
    """36 epochs at an l-inf radius of 0.4, which grows over the first 14 of them."""
    values = {
        "data": {"name": "digits", "train_size": 600, "validation": 128, "pad": 0},
        "model": f"{__name__}:mlp",
        "threat": {"norm": "linf", "eps": 0.4},
        "algorithm": algorithm,
        "curriculum": {"eps": {"start": 0, "until": 0.4}},
        "batch_size": 50,
        "epochs": 36,
        "precision": "fp32",
        "evaluation": {"steps": 10, "every": 12},
        "optimizer": {"lr": 0.1, "schedule": "constant"},
    }
    run = run_of(**{**values, **changes})
    with unchecked():  # the loop is the same as in all other tests, many times over
        return [report for report, _ in fit(run, DistributedContext())]


SINGLE = {"name": "fgsm_rs", "start": "zero", "step_size": "eps", "attack_bn": "eval"}
STOP = {"stop": {"fgsm_gap": 0.2}}


@pytest.mark.slow
def test_training_on_single_steps_overfits_to_them_and_training_on_many_does_not() -> None:
    fgsm, pgd = overfitting(SINGLE), overfitting({"name": "pgd", "steps": 5, "step_size": "eps/2"})
    one, many = fgsm[-1].sentinels, pgd[-1].sentinels
    # One step finds next to nothing against it, ten steps everything.
    assert one["fgsm"] > 0.3 and one["robust"] < 0.05
    assert one["fgsm_gap"] > 0.3 > 0.15 > many["fgsm_gap"] >= 0
    assert many["robust"] > one["robust"]
    assert one["noise_gap"] < 0.03 and many["noise_gap"] < 0.03


def test_a_level_between_the_two_ends_the_one_run_in_time() -> None:
    reports = overfitting(SINGLE, sentinels=STOP)
    assert [r.epoch for r in reports if r.sentinels] == [12, 24]
    last = reports[-1]
    assert last.final and last.stopped_early and last.epoch == 24
    gap = last.metrics()[GAP]
    why = f"sentinels.stop.fgsm_gap: {GAP} is {gap:.4g}, above 0.2"
    assert gap > 0.2 and last.stopped_by == why


# --- stopping -------------------------------------------------------------------------------------


Ending = tuple[list[EpochMetrics], dict[str, Any]]


def ended() -> Ending:
    """A run up to its last reading that is above all before, and the rule that ends it there."""
    reports, _ = rows_of(run_of(sentinels={"images": 40}))
    gaps = [report.sentinels["fgsm_gap"] for report in reports]
    last = max(k for k in range(1, 4) if gaps[k] > max(gaps[:k]))
    level = max(gaps[:last])
    assert level >= 0
    return reports[: last + 1], {"images": 40, "stop": {"fgsm_gap": level}}


@pytest.fixture(scope="module")
def ending() -> Ending:
    return ended()


def test_a_run_ends_at_the_first_reading_above_its_level(ending: Ending) -> None:
    wanted, rule = ending
    reports, _ = rows_of(run_of(sentinels=rule))
    assert [numbers(r) for r in reports] == [numbers(r) for r in wanted]
    assert [r.final for r in reports] == [False] * (len(reports) - 1) + [True]
    assert [r.stopped_by is None for r in reports] == [True] * (len(reports) - 1) + [False]
    # An epoch before it was at its very level: above is more. The last epoch is not stopped early.
    over, _ = rows_of(run_of(sentinels=rule, epochs=len(wanted)))
    assert over[-1].final and not over[-1].stopped_early and over[-1].stopped_by is None


def test_a_resumed_run_stops_where_it_would_have_and_says_so_when_it_has(
    ending: Ending, tmp_path: Path
) -> None:
    wanted, rule = ending
    run = run_of(sentinels=rule)
    report, state = next(fit(run, DistributedContext()))
    save(state, run, tmp_path / "first" / LAST, DistributedContext())
    torch.manual_seed(99)  # as in a new process
    rest = [row for row, _ in fit(run, DistributedContext(), load(tmp_path / "first" / LAST))]
    assert [numbers(r) for r in [report, *rest]] == [numbers(r) for r in wanted]
    whole = list(fit_and_checkpoint(run, DistributedContext(), tmp_path))
    assert whole[-1].stopped_by == rest[-1].stopped_by is not None
    saved = load(tmp_path / LAST)
    assert list(fit(run, DistributedContext(), saved)) == []
    with pytest.raises(RequestError, match=r"sentinels.stop.fgsm_gap: .*=null goes on to the end"):
        check_resumable(run, saved, preflight(run))
    freed = as_run(run, {"sentinels.stop": None})
    check_resumable(freed, saved, preflight(freed))
    on = [row.epoch for row, _ in fit(freed, DistributedContext(), saved)]
    assert on == list(range(len(wanted) + 1, 6))


def test_checkpoints_from_before_there_were_sentinels_are_read(tmp_path: Path) -> None:
    run = run_of(epochs=2)
    _, state = next(fit(run, DistributedContext()))
    save(state, run, tmp_path / LAST, DistributedContext())
    saved = load(tmp_path / LAST)
    del saved.content["counters"]["seen"]
    assert [row.epoch for row, _ in fit(run, DistributedContext(), saved)] == [2]


def test_robustness_that_is_lost_ends_a_run_too() -> None:
    # At this rate training breaks down after it has learned something.
    fast = {"lr": 0.5, "schedule": "constant"}
    rule = {"stop": {"robust_drop": 0.4}}
    reports, _ = rows_of(run_of(sentinels=rule, optimizer=fast, epochs=12))
    drops = [report.metrics()[DROP] for report in reports]
    assert drops[-1] > 0.4 >= max(drops[:-1]) and reports[-1].stopped_early
    assert str(reports[-1].stopped_by).startswith(f"sentinels.stop.robust_drop: {DROP} is 0.")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"stop": {"fgsm_gap": 1.5}}, "sentinels.stop.fgsm_gap"),
        ({"stop": {"gap": 0.5}}, "sentinels.stop.gap"),
        ({"images": 0}, "sentinels.images"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_field(value: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field}: "):
        as_run({"sentinels": value})


def test_a_rule_is_set_on_the_command_line() -> None:
    run = as_run(None, ["sentinels.stop.zero_grad=0.5"])
    assert run.sentinels == Sentinels.model_validate({"stop": {"zero_grad": 0.5}})
    assert as_run(None, ["sentinels=null"]).sentinels is None
    assert as_run(run, ["sentinels.stop=null"]).sentinels == Sentinels()
    assert run.signature() != as_run(None).signature()


# --- two workers ----------------------------------------------------------------------------------


def work(rank: int, folder: Path, rule: dict[str, Any]) -> None:
    run = run_of(sentinels=rule)
    with one_of_two(rank, folder) as context:
        whole = [report for report, _ in fit(run, context)]
        rest = [report for report, _ in fit(run, context, load(folder / LAST))]
        found = [[(numbers(r), r.stopped_by) for r in reports] for reports in (whole, rest)]
        (folder / f"found-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_workers_see_what_one_sees_and_stop_where_it_stops(
    ending: Ending, tmp_path: Path
) -> None:
    wanted, rule = ending
    run = run_of(sentinels=rule)
    _, state = next(fit(run, DistributedContext()))
    save(state, run, tmp_path / LAST, DistributedContext())
    run_both(work, tmp_path, rule)
    for rank in range(2):
        whole, rest = json.loads((tmp_path / f"found-{rank}.json").read_text())
        for found, ours in ((whole, wanted), (rest, wanted[1:])):
            for (metrics, _), report in zip(found, ours, strict=True):
                assert metrics == pytest.approx(numbers(report), rel=1e-10, abs=1e-12)
            assert found[-1][1].startswith("sentinels.stop.fgsm_gap: ")
            assert all(why is None for _, why in found[:-1])
