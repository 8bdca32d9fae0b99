"""Passes of a network that are recorded for a few batch sizes and replayed."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import same, tiny_net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.core.network import FrozenNetwork, mode, trainable
from raytrain.core.recording import NUM_EAGER, RecordedPasses, batch_sizes
from raytrain.core.types import Predict
from raytrain.testing.recorded import RecordedOperations


def images_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=generator)


def with_gradient(predict: Predict, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the sum of their squares."""
    point = images.clone().requires_grad_(True)
    logits = predict(point)
    (grad,) = torch.autograd.grad(logits.square().sum(), point)
    return logits.detach(), grad


def passes_of(largest: int) -> tuple[nn.Module, RecordedPasses]:
    """A network in eval mode that takes no gradient, and its passes."""
    model = tiny_net(batch_norm=True).eval().requires_grad_(False)
    return model, RecordedPasses(model, model, RecordedOperations(), largest)


@given(st.integers(1, 2000))
def test_a_batch_is_padded_by_less_than_an_eighth_of_the_largest(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest
    gaps = [after - before for before, after in zip([0, *sizes], sizes, strict=False)]
    assert max(gaps) <= -(-largest // 8) and len(sizes) < 16


def test_passes_of_every_size_are_those_of_the_network() -> None:
    model, passes = passes_of(20)
    for count in [*range(1, 21)] * (NUM_EAGER + 1):
        images = images_of(count, seed=count)
        for found, wanted in zip(
            with_gradient(passes, images), with_gradient(model, images), strict=True
        ):
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            assert torch.allclose(passes(images), model(images), rtol=1e-12, atol=1e-14)
    # Two kinds, with gradient and without, of each size: all but the first three of each are replayed.
    assert passes.replayed == 2 * (60 - 3 * len(batch_sizes(20)))
    larger = images_of(21)
    assert torch.equal(passes(larger), model(larger))


def test_a_result_does_not_depend_on_the_passes_before() -> None:
    _, passes = passes_of(16)
    images = images_of(5)
    first, *later = [with_gradient(passes, images) for _ in range(NUM_EAGER + 3)]
    assert passes.replayed and all(all(map(torch.equal, first, one)) for one in later)


@pytest.mark.parametrize("bn", ["train", "batch_nostat"])
def test_updates_with_batch_statistics_are_those_of_the_network(bn: str) -> None:
    plain = tiny_net(batch_norm=True)
    model = copy.deepcopy(plain)
    passes = RecordedPasses(model, model, RecordedOperations(), 8, trainable(model))
    predict = {plain: plain, model: passes}
    for step in range(NUM_EAGER + 4):
        for network, passed in predict.items():
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            with mode(network, bn):  # pyright: ignore[reportArgumentType]
                passed(images_of(6, seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert passes.replayed == 3 and same(plain, model)


def test_a_pass_before_the_gradients_of_the_last_is_an_ordinary_one() -> None:
    model, passes = passes_of(4)
    for seed in range(NUM_EAGER + 1):
        with_gradient(passes, images_of(4, seed))
    first, second = (images_of(4, seed).requires_grad_(True) for seed in (7, 8))
    outputs = passes(first), passes(second)
    assert passes.replayed == 1
    sum(one.square().sum() for one in outputs).backward()  # pyright: ignore
    for images in (first, second):
        assert images.grad is not None
        assert torch.equal(images.grad, with_gradient(model, images.detach())[1])
    del outputs
    passes(first)  # whose gradients are never taken
    passes(second)
    assert passes.replayed == 3


def test_gradients_of_a_recorded_pass_are_taken_once() -> None:
    _, passes = passes_of(4)
    for seed in range(NUM_EAGER + 1):
        with_gradient(passes, images_of(4, seed))
    loss = passes(images_of(4).requires_grad_(True)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()


class Deciding(nn.Module):
    """Reads a pixel on the host."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * (2.0 if float(images.detach().sum()) > 0 else 1.0)


def test_what_cannot_be_recorded_is_run_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    model = Deciding()
    passes = RecordedPasses(model, model, RecordedOperations(), 4)
    for seed in range(NUM_EAGER + 3):
        images = images_of(4, seed)
        found, wanted = with_gradient(passes, images), with_gradient(model, images)
        assert all(map(torch.equal, found, wanted))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raytrain: performance: passes are not recorded: ")
    assert passes.replayed == 0


def test_recorded_passes_follow_the_weights() -> None:
    model = tiny_net(batch_norm=True)
    frozen = FrozenNetwork.of(model, lambda module: module)
    passes = RecordedPasses(frozen.module, frozen.module, RecordedOperations(), 4)
    frozen.module.eval()
    model.eval()
    for seed in range(NUM_EAGER + 3):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        found, wanted = (with_gradient(one, images_of(4, seed)) for one in (passes, model))
        assert all(torch.allclose(*pair, rtol=1e-12) for pair in zip(found, wanted, strict=True))
    assert passes.replayed == 2
