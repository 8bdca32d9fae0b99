"""What a dry run says is what the run does: images, steps, cost, memory; and nothing is changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raytrain.algorithms import RECIPES
from raytrain.config.cost_estimate import estimate_validation
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import TrainingFailed
from raytrain.data.loader import iter_eval, open_splits
from raytrain.evaluation.validation import validate
from raytrain.models import ModelSpec
from raytrain.training import preview as previews
from raytrain.training.preview import RunPreview, preview_run
from raytrain.training.setup import preflight
from raytrain.training.trainer import fit

PARAMETERS = 56_554  # of small_cnn for digits

BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 100, "validation": 20},
    "batch_size": 32,
    "epochs": 2,
    "evaluation": {"steps": 1, "batch_size": 50},
    "device": "cpu",
}


def previewed(**changes: Any) -> RunPreview:
    run = as_run({**BASE, **changes})
    return preview_run(run, preflight(run), None)


def test_images_steps_and_cost_are_those_of_the_run() -> None:
    algorithm = {"name": "pgd", "steps": 2}
    preview = previewed(algorithm=algorithm)
    *_, (report, state) = fit(as_run({**BASE, "algorithm": algorithm}), DistributedContext())
    assert (preview.images, preview.validation_images) == (100, 20)
    assert (preview.steps_per_epoch, preview.epochs, state.step) == (3, 2, 6)
    assert preview.fe_per_image == 2 * 7
    assert preview.fe == report.fe == 6 * 32 * 7
    assert not preview.bound
    assert preview.forward_flops == 922_880
    assert preview.flops == report.fe * 922_880
    assert str(preview.execution) == report.execution


def test_the_cost_of_a_run_that_ends_by_cost_is_that() -> None:
    preview = previewed(algorithm={"name": "pgd", "steps": 2}, fe_per_image=20)
    assert (preview.fe_per_image, preview.fe, preview.epochs) == (20, 2000, 3)


def test_memory_is_that_of_the_tensors_of_the_run() -> None:
    preview = previewed(algorithm="atta", ema=0.9)
    *_, (_, state) = fit(as_run({**BASE, "algorithm": "atta", "ema": 0.9}), DistributedContext())
    held = sum(value.nbytes for value in [*state.model.parameters(), *state.model.buffers()])
    momentum = sum(one["momentum_buffer"].nbytes for one in state.optimizer.state.values())
    assert preview.memory == {
        "weights": held,
        "gradients": 4 * PARAMETERS,
        "optimizer": momentum,
        "averaged": held,
        "images": 120 * (64 + 8),
    }
    assert preview.algorithm_memory == {"delta": 100 * 64 * 4}
    plain = previewed(optimizer={"momentum": 0}, precision="fp64")
    assert plain.memory["gradients"] == 8 * PARAMETERS
    assert (plain.memory["optimizer"], plain.memory["averaged"]) == (0, 0)
    assert plain.algorithm_memory == {}


def test_memory_of_an_algorithm_is_that_of_its_parts() -> None:
    assert previewed(algorithm="free").algorithm_memory == {"slots": 32 * 64 * 4}
    half = previewed(algorithm={"name": "si_hg", "bank_dtype": "fp16"}).algorithm_memory
    assert half["delta"] == 100 * 64 * 2
    learned = previewed(algorithm={"name": "l2l", "steps": 1}).algorithm_memory
    weights, adam = learned["attacker"], learned["attacker_optimizer"]
    assert adam > 2 * weights > 0


def test_the_steps_that_are_measured_are_steps_of_the_run() -> None:
    preview = previewed(algorithm={"name": "pgd", "steps": 2})
    measured = preview.measured
    assert measured is not None and preview.seconds is not None
    assert (measured.images, measured.fe) == (32, 32 * 7)
    assert preview.validation_fe == 2 * (20 * 4 + 20 * 5)
    rate = measured.seconds / measured.fe
    assert preview.seconds == pytest.approx(rate * (preview.fe + preview.validation_fe))


def test_at_most_five_steps_are_measured_after_the_first() -> None:
    measured = previewed(algorithm="natural").measured
    assert measured is not None and 1 <= measured.steps <= 5
    one = previewed(algorithm="natural", batch_size=100).measured  # in an epoch
    assert one is not None and (one.steps, one.fe) == (1, 300)


def test_a_step_that_is_too_large_is_measured_on_fewer_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(previews._LARGEST_STEP, "cpu", 7 * 922_880 * 10.0)
    preview = previewed(algorithm={"name": "pgd", "steps": 2})
    assert preview.measured is not None
    assert (preview.measured.images, preview.measured.fe) == (10, 70)
    assert preview.steps_per_epoch == 3


def test_nothing_is_measured_for_workers_of_ray() -> None:
    run = as_run({**BASE, "workers": 2})
    preview = preview_run(run, preflight(run), "cpu")
    assert preview.measured is None and preview.seconds is None
    assert preview.fe == previewed().fe


def test_random_numbers_and_the_run_stay_what_they_are() -> None:
    run = as_run({**BASE, "algorithm": "atta"})
    splits, random = preflight(run), torch.get_rng_state()
    dump = run.model_dump_json()
    preview_run(run, splits, None)
    assert torch.equal(torch.get_rng_state(), random)
    assert run.model_dump_json() == dump
    (first, _), *_ = fit(run, DistributedContext())
    preview_run(run, splits, None)
    (again, _), *_ = fit(run, DistributedContext())
    assert first.loss == again.loss


def test_a_step_that_diverges_is_measured_and_one_that_fails_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = previewed(algorithm="natural", optimizer={"lr": 1e30}).measured
    assert measured is not None and measured.fe == 3 * 32

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(previews, "train_epoch", fails)
    with pytest.raises(TrainingFailed, match="no room"):
        previewed()


@pytest.mark.parametrize("name", ["dynamic", "fat", "pgd"])
def test_the_cost_of_attacks_that_stop_is_a_bound(name: str) -> None:
    assert previewed(algorithm={"name": name, "steps": 2}).bound == (name != "pgd")
    assert name in RECIPES


def test_the_cost_of_a_validation_is_reached_where_all_images_are_robust() -> None:
    """At a radius of zero what is right stays right; what is wrong costs one pass."""
    run = as_run({"evaluation": {"steps": 3, "restarts": 2, "eps": 0}, "sentinels": None})
    splits = open_splits(run.data, DistributedContext())
    model = ModelSpec().build(1, 8, 10, splits.source.mean, splits.source.std).eval()
    for images in (None, 50):
        batches = iter_eval(splits.valid, 64, 0, images)
        report, flags = validate(model, batches, run.threat, run.evaluation, DistributedContext())
        right = int(flags.clean.sum())
        bound = estimate_validation(run, right) if right else 0
        assert report.fe == (bound or 0) + report.images - right


def costs(**evaluation: Any) -> float | None:
    return estimate_validation(as_run({"evaluation": evaluation}), 1000)


def test_the_cost_of_a_validation_has_its_images_restarts_and_sentinels() -> None:
    assert costs() == 1000 * 22 + 128 * 5
    assert costs(steps=1, restarts=3, images=100) == 100 * 10 + 100 * 5
    assert costs(attack="apgd") is None
    without = RunConfig.model_validate({"sentinels": None})
    assert estimate_validation(without, 10) == 220
