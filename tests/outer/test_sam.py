"""SAM: where the gradient is measured, where it is applied, its limit, its cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import applied, assert_near, ball_of, batch_of, same, state_of, tiny_net, weights_of

from raytrain.algorithms import Pgd, SiHg
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.outer import AbstractOuter, Awp, Clip, Engm, Plain, Sam
from raytrain.testing import OuterConformance
from raytrain.testing.algorithms import equal, trained

UPDATES = {"sam": Sam(), "clip": Sam(then=Clip()), "engm": Sam(then=Engm(tau=4, chunk=1))}


class TestSam(OuterConformance):
    @pytest.fixture(params=UPDATES)
    def outer(self, request: pytest.FixtureRequest) -> AbstractOuter:
        return UPDATES[request.param]


def test_the_gradient_is_that_of_the_weights_rho_up_the_mean_gradient() -> None:
    batch, rho = batch_of(8), 0.3
    model = tiny_net()
    algorithm = Pgd(steps=1).build(ball_of("linf"), Sam(rho=rho))
    twin = copy.deepcopy(model)
    outcome = algorithm.step(state_of(model, algorithm), batch)

    def gradient(net: torch.nn.Module) -> torch.Tensor:
        net.zero_grad()
        F.cross_entropy(net(batch.images + outcome.delta), batch.labels).backward()
        return applied(net)

    up = gradient(twin)
    away = up * rho / up.norm()
    moved = copy.deepcopy(twin)
    torch.nn.utils.vector_to_parameters(weights_of(twin) + away, moved.parameters())
    wanted = gradient(moved)
    assert_near(applied(model), wanted, 1e-12)
    # Applied at the present weights, by a first step of SGD at rate 0.1.
    assert_near(weights_of(model), weights_of(twin) - 0.1 * wanted, 1e-12)
    assert float((wanted - up).norm() / up.norm()) > 0.01  # the two gradients do differ


def test_weight_decay_acts_at_the_present_weights() -> None:
    algorithm = Pgd(steps=1).build(ball_of("linf"), Sam(rho=0.3))
    with_decay, without = (tiny_net() for _ in range(2))
    before = weights_of(with_decay)
    algorithm.step(state_of(with_decay, algorithm, weight_decay=0.5), batch_of(8))
    algorithm.step(state_of(without, algorithm), batch_of(8))
    assert_near(weights_of(with_decay), weights_of(without) - 0.1 * 0.5 * before, 1e-12)


@pytest.mark.parametrize("then", [Plain(), Clip(max_norm=0.1), Engm(tau=2, chunk=1)], ids=str)
def test_without_length_it_is_the_update_that_follows_bit_for_bit(then: AbstractOuter) -> None:
    one, other = (
        trained(Pgd(steps=1).build(ball_of("linf"), outer), batch_norm=True)
        for outer in (Sam(rho=0, then=then), then)
    )
    assert equal(one, other)


def test_a_zero_gradient_moves_nothing() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x.flatten(1).sum(1, keepdim=True) + 0 * self.weight

    algorithm, model = Pgd(steps=0).build(ball_of("linf"), Sam()), Flat()
    before = copy.deepcopy(model)
    algorithm.step(state_of(model, algorithm), batch_of(4))
    assert same(model, before)


def test_running_statistics_see_the_training_pass_only() -> None:
    model = tiny_net(batch_norm=True)
    algorithm = Pgd(steps=2).build(ball_of("linf"), Sam())
    algorithm.step(state_of(model, algorithm), batch_of(8))
    assert int(model.state_dict()["norm.num_batches_tracked"]) == 1


def test_it_is_refused_where_weights_may_not_be_displaced() -> None:
    with pytest.raises(ValueError, match="sam does not go with si_hg: .*; expected sgd or clip"):
        SiHg(mode="C").build(ball_of("linf"), Sam())
    with pytest.raises(RequestError, match="outer.then: awp displaces the weights itself"):
        as_run({"outer": {"name": "sam", "then": "awp"}})
    assert Sam(then=Engm()).weighs_samples and not Awp(then=Plain()).weighs_samples
