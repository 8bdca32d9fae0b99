"""The attacks as plain functions: inside the threat model, by seed, and whatever the batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import ball_of, batch_of, same, tiny_net

import raytrain
from raytrain.attacks import Gap, ProjectedAscent
from raytrain.attacks.autoattack import STAGES
from raytrain.core.cost import Meter
from raytrain.core.errors import RequestError
from raytrain.core.losses import CrossEntropy, Trades
from raytrain.core.oracle import Oracle
from raytrain.core.threat_models import Linf
from raytrain.core.types import Progress


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_result_lies_in_the_ball_and_in_the_pixel_box(norm: str) -> None:
    batch, ball = batch_of(8), ball_of(norm)
    found = raytrain.attack(tiny_net(), batch.images, batch.labels, threat=norm, eps=ball.eps)
    assert found.min() >= 0 and found.max() <= 1
    assert float(ball.norm_of(found - batch.images).max()) <= ball.eps * (1 + 1e-6)
    assert torch.equal(found, raytrain.attack(tiny_net(), batch.images, batch.labels, threat=ball))


def test_it_is_projected_ascent_on_the_network_as_it_is() -> None:
    batch, model, ball = batch_of(8), tiny_net(batch_norm=True).train(), Linf(eps=0.1)
    before = copy.deepcopy(model)
    found = raytrain.attack(model, batch.images, batch.labels, eps=0.1, steps=3, start="zero")
    ascent = ProjectedAscent.model_validate(
        {"start": "zero", "steps": 3, "step_size": "eps/4", "bn": "eval"}
    )
    oracle = Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval")
    wanted = ascent.maximise(oracle, ball, torch.zeros_like(batch.images), Progress(1.0, 1.0))
    assert torch.equal(found, batch.images + wanted.delta)
    assert same(model, before) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_result_is_that_of_the_seed_whatever_the_batches() -> None:
    batch, model = batch_of(9), tiny_net()
    one, other, another = (
        raytrain.attack(model, batch.images, batch.labels, eps=0.1, batch_size=size, seed=seed)
        for size, seed in ((9, 1), (4, 1), (9, 2))
    )
    # 1e-12: convolutions of another batch size sum in another order, and signs magnify nothing here.
    assert float((one - other).abs().max()) <= 1e-12
    assert not torch.equal(one, another)


def test_a_restart_keeps_what_fooled_the_network_and_else_the_highest_loss() -> None:
    batch, model = batch_of(32), tiny_net()
    args: dict[str, Any] = {"eps": 0.05, "steps": 2}
    once, often = (
        raytrain.attack(model, batch.images, batch.labels, restarts=restarts, **args)
        for restarts in (1, 6)
    )
    assert accuracy(model, often, batch.labels) <= accuracy(model, once, batch.labels)
    fooled = model(once).argmax(1) != batch.labels
    assert torch.equal(once[fooled], often[fooled])


def test_parts_may_be_names_records_or_parts() -> None:
    batch, model = batch_of(4), tiny_net()
    stops: list[Any] = [{"kind": "gap", "c_max": 0.1}, Gap(c_max=0.1)]
    one, other = (
        raytrain.attack(model, batch.images, batch.labels, eps=0.1, stop=stop) for stop in stops
    )
    assert torch.equal(one, other)
    losses: list[Any] = [{"name": "trades", "beta": 2.0}, Trades(beta=2.0)]
    one, other = (
        raytrain.attack(model, batch.images, batch.labels, eps=0.1, loss=loss) for loss in losses
    )
    assert torch.equal(one, other)


def test_autoattack_returns_what_fooled_the_network_and_leaves_the_rest() -> None:
    batch, model = batch_of(6, dtype=torch.float32), tiny_net(torch.float32).eval()
    labels = model(batch.images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    found = raytrain.autoattack(
        model, batch.images, labels, eps=0.05, stages=iter(STAGES[:1]), batch_size=4
    )
    moved = (found != batch.images).flatten(1).any(1)
    fooled = model(found).argmax(1) != labels
    assert torch.equal(moved, fooled & (torch.arange(6) > 0))
    assert float((found - batch.images).abs().max()) <= 0.05 + 1e-6
    assert bool(moved.any())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"images": torch.rand(2, 8, 8)}, "images: expected floating-point pixels"),
        ({"images": 2 * torch.ones(2, 1, 8, 8)}, "images: expected pixels in"),
        ({"labels": torch.zeros(3).long()}, "labels: expected 2 class numbers"),
        ({"threat": "l3"}, "threat: .* expected tags: 'linf', 'l2', 'l1'"),
        ({"eps": -1.0}, "threat.eps: .* greater than or equal to 0, found -1.0"),
        ({"loss": "hinge"}, "loss: .* expected tags: 'cross_entropy', 'trades', 'mart'"),
        ({"steps": -1}, "steps: .* greater than or equal to 0, found -1"),
        ({"restarts": 0}, "restarts: expected 1 or more"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {
        "images": torch.rand(2, 1, 8, 8),
        "labels": torch.zeros(2).long(),
        **changed,
    }
    with pytest.raises(RequestError, match=sentence) as caught:
        raytrain.attack(tiny_net(torch.float32), **given)
    assert "\n" not in str(caught.value)
