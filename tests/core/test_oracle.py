"""Evaluating, differentiating and counting: exact, per sample, and without side effects."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TinyNet,
    assert_near,
    batch_of,
    everything,
    generator,
    same,
    tiny_net,
)
from torch import Tensor, nn

from raytrain.core.cost import Meter
from raytrain.core.losses import AbstractLoss, CrossEntropy, Reference, cross_entropy
from raytrain.core.network import mode
from raytrain.core.oracle import Oracle
from raytrain.core.types import Batch, BatchNorm, Delta, PerSample, Predict

MODES: tuple[BatchNorm, ...] = get_args(BatchNorm)


def oracle_of(
    model: nn.Module,
    batch: Batch,
    meter: Meter | None = None,
    attack_bn: BatchNorm = "eval",
    objective: AbstractLoss | None = None,
) -> Oracle:
    return Oracle(
        model,
        objective or CrossEntropy(),
        batch,
        meter or Meter(),
        attack_bn=attack_bn,
    )


def delta_of(batch: Batch, seed: int = 5) -> Tensor:
    noise = torch.rand(batch.images.shape, generator=generator(seed), dtype=batch.images.dtype)
    return 0.2 * noise - 0.1


class TwoPasses(AbstractLoss):
    """Clean plus perturbed loss: two forwards under one backward."""

    def inner(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        return cross_entropy(predict(batch.images + delta), batch.labels)

    def outer(
        self, predict: Predict, batch: Batch, delta: Delta, reference: Reference
    ) -> PerSample:
        clean = cross_entropy(predict(batch.images), batch.labels)
        return clean + self.inner(predict, batch, delta, reference)


# --- cost -------------------------------------------------------------------------------------


def test_each_call_costs_the_samples_it_walks() -> None:
    batch, meter = batch_of(6), Meter()
    oracle, delta = oracle_of(tiny_net(), batch, meter), delta_of(batch)
    oracle.losses(delta)
    assert meter == Meter(forwards=6)
    oracle.correct(delta)
    assert meter == Meter(forwards=12)
    oracle.delta_grad(delta)
    assert meter == Meter(forwards=18, input_backwards=6)
    rows = torch.tensor([5, 2])
    oracle.delta_grad(delta[rows], rows)
    assert meter == Meter(forwards=20, input_backwards=8)
    oracle.theta_grad(delta)
    assert meter == Meter(forwards=26, input_backwards=8, full_backwards=6)
    assert meter.fe == 26 + 8 + 2 * 6


def test_the_cost_of_a_call_does_not_depend_on_the_calls_before_it() -> None:
    batch = batch_of(3)
    for order in permutations(["losses", "correct", "delta_grad", "theta_grad"]):
        meter = Meter()
        oracle = oracle_of(tiny_net(), batch, meter)
        for call in order:
            getattr(oracle, call)(delta_of(batch))
        assert meter == Meter(forwards=12, input_backwards=3, full_backwards=3), order


def test_a_backward_through_two_forwards_costs_two() -> None:
    batch, meter = batch_of(4), Meter()
    oracle_of(tiny_net(), batch, meter, objective=TwoPasses()).theta_grad(delta_of(batch))
    assert meter == Meter(forwards=8, full_backwards=8)


# --- input gradients --------------------------------------------------------------------------


def test_input_gradient_is_that_of_each_samples_own_loss() -> None:
    batch, model = batch_of(5), tiny_net().eval()
    delta = delta_of(batch)
    losses, grad = oracle_of(model, batch).delta_grad(delta)
    for i in range(5):
        point = delta[i : i + 1].clone().requires_grad_(True)
        logits = model(batch.images[i : i + 1] + point)
        loss = F.cross_entropy(logits, batch.labels[i : i + 1])
        (alone,) = torch.autograd.grad(loss, point)
        # 1e-14: float64 sums in another order for another batch size.
        assert_near(losses[i], loss.detach(), 1e-14)
        assert_near(grad[i], alone[0], 1e-14)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_input_gradient_in_eval_mode_knows_no_other_row(batch_norm: bool) -> None:
    batch, model = batch_of(6), tiny_net(batch_norm=batch_norm)
    delta = delta_of(batch)
    losses, grad = oracle_of(model, batch).delta_grad(delta)
    changed = Batch(batch.images.clone(), batch.labels.clone(), batch.index, batch.rng)
    changed.images[3:] = 1 - changed.images[3:]
    changed.labels[3:] = (changed.labels[3:] + 1) % 4
    other_losses, other_grad = oracle_of(model, changed).delta_grad(delta)
    assert torch.equal(losses[:3], other_losses[:3]) and torch.equal(grad[:3], other_grad[:3])
    assert not torch.equal(grad[3:], other_grad[3:])


def test_input_gradient_of_rows_is_that_of_the_whole_batch() -> None:
    batch, model, rows = batch_of(6), tiny_net(batch_norm=True), torch.tensor([4, 0, 5])
    delta = delta_of(batch)
    losses, grad = oracle_of(model, batch).delta_grad(delta)
    some_losses, some_grad = oracle_of(model, batch).delta_grad(delta[rows], rows)
    # 1e-14: float64 sums in another order for another batch size.
    assert_near(some_losses, losses[rows], 1e-14)
    assert_near(some_grad, grad[rows], 1e-14)


def test_input_gradient_is_found_without_a_graph_around_it() -> None:
    batch, model = batch_of(3), tiny_net()
    delta = delta_of(batch)
    _, wanted = oracle_of(model, batch).delta_grad(delta)
    with torch.no_grad():
        losses, grad = oracle_of(model, batch).delta_grad(delta.requires_grad_(True))
    assert torch.equal(grad, wanted)
    assert not losses.requires_grad and not grad.requires_grad


def test_losses_are_those_of_delta_grad_and_correct_is_the_argmax() -> None:
    batch, model = batch_of(32), tiny_net(batch_norm=True)
    oracle, delta = oracle_of(model, batch), delta_of(batch)
    losses, _ = oracle.delta_grad(delta)
    assert torch.equal(oracle.losses(delta), losses)
    right = model.eval()(batch.images + delta).argmax(1) == batch.labels
    assert 0 < int(right.sum()) < 32
    assert torch.equal(oracle.correct(delta), right)


# --- side effects -----------------------------------------------------------------------------


def probe(oracle: Oracle, delta: Tensor) -> None:
    oracle.delta_grad(delta)
    oracle.delta_grad(delta[:2], torch.tensor([0, 1]))
    oracle.losses(delta)
    oracle.correct(delta)


@pytest.mark.parametrize("attack_bn", MODES)
def test_attack_leaves_parameters_gradients_and_training_flags_alone(attack_bn: BatchNorm) -> None:
    batch, model = batch_of(4), tiny_net(batch_norm=True)
    model.conv2.eval()  # a layer somebody froze on purpose
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    probe(oracle_of(model, batch, attack_bn=attack_bn), delta_of(batch))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is not None and bool((value.grad == 7).all())
    assert [module.training for module in model.modules()] == flags
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats


@pytest.mark.parametrize(("attack_bn", "moves"), [("eval", 0), ("batch_nostat", 0), ("train", 4)])
def test_only_train_mode_updates_running_statistics(attack_bn: BatchNorm, moves: int) -> None:
    batch, model = batch_of(4), tiny_net(batch_norm=True)
    before = dict(model.named_buffers())
    before = {name: value.clone() for name, value in before.items()}
    probe(oracle_of(model, batch, attack_bn=attack_bn), delta_of(batch))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]) == (moves == 0)
    counter = dict(model.named_buffers())["norm.num_batches_tracked"]
    assert int(counter) == moves  # four forwards in `probe`


@pytest.mark.parametrize("attack_bn", MODES)
def test_attack_draws_no_random_numbers(attack_bn: BatchNorm) -> None:
    batch, model = batch_of(4), tiny_net(batch_norm=True)
    state = torch.get_rng_state()
    probe(oracle_of(model, batch, attack_bn=attack_bn), delta_of(batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_attack_in_eval_mode_switches_dropout_off() -> None:
    batch, model = batch_of(4), tiny_net(dropout=0.5).train()
    state = torch.get_rng_state()
    oracle, delta = oracle_of(model, batch), delta_of(batch)
    assert torch.equal(oracle.losses(delta), oracle.losses(delta))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_nostat_uses_the_statistics_of_the_batch() -> None:
    batch, model = batch_of(6), tiny_net(batch_norm=True)
    delta, twin = delta_of(batch), copy.deepcopy(tiny_net(batch_norm=True)).train()
    losses, grad = oracle_of(model.eval(), batch, attack_bn="batch_nostat").delta_grad(delta)
    point = delta.clone().requires_grad_(True)
    wanted = F.cross_entropy(twin(batch.images + point), batch.labels, reduction="none")
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), point)
    assert torch.equal(losses, wanted.detach()) and torch.equal(grad, wanted_grad)
    eval_losses = oracle_of(model, batch).losses(delta)
    assert not torch.allclose(losses, eval_losses)


@pytest.mark.parametrize("attack_bn", MODES)
def test_mode_is_restored_when_a_pass_fails(attack_bn: BatchNorm) -> None:
    model = tiny_net(batch_norm=True).eval()
    with pytest.raises(RuntimeError), mode(model, attack_bn):
        model(torch.zeros(2, 5, 8, 8, dtype=torch.float64))
    assert not any(module.training for module in model.modules())
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats


def test_mode_leaves_a_norm_without_running_statistics_without_them() -> None:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    with mode(norm, "batch_nostat"):
        norm(torch.rand(3, 2, 4, 4))
    assert not norm.track_running_stats and not list(norm.buffers())


@pytest.mark.parametrize("attack_bn", MODES)
def test_holding_the_mode_changes_no_number(attack_bn: BatchNorm) -> None:
    batch, one, other = batch_of(4), tiny_net(batch_norm=True), tiny_net(batch_norm=True)
    delta = delta_of(batch)
    held, loose = (oracle_of(m, batch, attack_bn=attack_bn) for m in (one, other))
    with held.attacking():
        first, second = held.delta_grad(delta), held.delta_grad(2 * delta)
        with held.attacking():  # nested: nothing happens
            held.losses(delta)
    for ours, theirs in zip(first, loose.delta_grad(delta), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(second, loose.delta_grad(2 * delta), strict=True):
        assert torch.equal(ours, theirs)
    loose.losses(delta)
    assert same(one, other) and one.training == other.training


# --- weight gradients -------------------------------------------------------------------------


def theta_grads(model: TinyNet) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weight_gradient_is_that_of_the_mean_loss_in_train_mode(batch_norm: bool) -> None:
    batch, model = batch_of(6), tiny_net(batch_norm=batch_norm).eval()
    delta, twin = delta_of(batch), tiny_net(batch_norm=batch_norm).train()
    losses = oracle_of(model, batch).theta_grad(delta)
    wanted = F.cross_entropy(twin(batch.images + delta), batch.labels, reduction="none")
    wanted.mean().backward()
    assert torch.equal(losses, wanted.detach()) and not losses.requires_grad
    assert len(theta_grads(model)) == len(list(model.parameters()))
    for ours, theirs in zip(theta_grads(model), theta_grads(twin), strict=True):
        assert torch.equal(ours, theirs)
    # The weight update is the pass that moves the running statistics, once.
    assert same(model, twin) and not model.training


def test_weight_gradient_is_added_to_what_is_there() -> None:
    batch, model = batch_of(6), tiny_net()
    delta, oracle = delta_of(batch), oracle_of(model, batch)
    oracle.theta_grad(delta)
    once = [grad.clone() for grad in theta_grads(model)]
    oracle.theta_grad(delta)
    for twice, single in zip(theta_grads(model), once, strict=True):
        assert torch.equal(twice, 2 * single)


def test_weights_multiply_the_losses_of_their_samples() -> None:
    batch, weights = batch_of(6), torch.linspace(0, 2, 6, dtype=torch.float64)
    delta, model, twin = delta_of(batch), tiny_net(), tiny_net()
    weights.requires_grad_(True)
    losses = oracle_of(model, batch).theta_grad(delta, weights)
    wanted = F.cross_entropy(twin(batch.images + delta), batch.labels, reduction="none")
    (wanted * weights.detach()).mean().backward()
    assert torch.equal(losses, wanted.detach())  # returned unweighted
    assert weights.grad is None  # weights are constants
    for ours, theirs in zip(theta_grads(model), theta_grads(twin), strict=True):
        assert torch.equal(ours, theirs)


def test_unit_weights_are_no_weights() -> None:
    batch, model, twin = batch_of(6), tiny_net(), tiny_net()
    delta = delta_of(batch)
    oracle_of(model, batch).theta_grad(delta)
    oracle_of(twin, batch).theta_grad(delta, torch.ones(6, dtype=torch.float64))
    for ours, theirs in zip(theta_grads(model), theta_grads(twin), strict=True):
        assert torch.equal(ours, theirs)


def test_weight_gradient_does_not_reach_the_perturbation() -> None:
    batch, model = batch_of(3), tiny_net()
    delta = delta_of(batch).requires_grad_(True)
    oracle_of(model, batch).theta_grad(delta)
    assert delta.grad is None


def test_weight_gradients_go_through_the_wrapper_and_input_gradients_do_not() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.module(x)

    batch, model = batch_of(3), tiny_net()
    wrapper = Wrapper(model)
    oracle = Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval", wrapper=wrapper)
    probe(oracle, delta_of(batch))
    assert wrapper.calls == 0
    oracle.theta_grad(delta_of(batch))
    assert wrapper.calls == 1


# --- precision --------------------------------------------------------------------------------


def test_bfloat16_gives_float32_losses_and_gradients_near_those_of_float32() -> None:
    batch, model = batch_of(8, dtype=torch.float32), tiny_net(torch.float32)
    delta = delta_of(batch)
    exact_losses, exact_grad = oracle_of(model, batch).delta_grad(delta)
    rough = Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval", precision="bf16")
    losses, grad = rough.delta_grad(delta)
    assert losses.dtype == grad.dtype == rough.theta_grad(delta).dtype == torch.float32
    assert all(value.dtype == torch.float32 for _, value in everything(model))
    assert all(value.dtype == torch.float32 for value in theta_grads(model))
    assert not torch.equal(losses, exact_losses)  # it did run in bfloat16
    # bfloat16 keeps 8 bits: 0.4% per operation, a few operations deep.
    assert_near(losses, exact_losses, 0.03)
    # A ReLU near zero may fall on its other side, which turns one row a little.
    assert float(F.cosine_similarity(grad.flatten(1), exact_grad.flatten(1)).min()) > 0.95


def test_cross_entropy_is_computed_in_float32_at_least() -> None:
    logits = torch.tensor([[0.0, 10.0]])
    labels = torch.tensor([1])
    for dtype, wanted in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        loss = cross_entropy(logits.to(dtype), labels)
        assert loss.dtype == wanted
        # log(1 + e^-10), which bfloat16 would round by 0.4%; float32 keeps 1e-3 of it here.
        assert float(loss) == pytest.approx(4.5399e-5, rel=2e-3)
