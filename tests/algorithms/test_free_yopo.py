"""Free and YOPO: several gradients from few passes, checked against the passes written out."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EPS,
    Affine,
    TinyNet,
    assert_near,
    ball_of,
    batch_of,
    generator,
    same,
    state_of,
    tiny_net,
)
from torch import Tensor, nn

from raytrain.algorithms import AbstractAlgorithm, Free, Natural, Yopo
from raytrain.attacks import Gaussian, ProjectedAscent, Uniform, Zero
from raytrain.config.run import RunConfig
from raytrain.core.algorithm_state import Numbers, TrainingSetup
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.losses import CrossEntropy
from raytrain.core.network import stem_share
from raytrain.core.oracle import Oracle, Weigh
from raytrain.core.sample_store import SlotStore
from raytrain.core.threat_models import in_box
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, Delta, PerSample, Progress
from raytrain.models.classifier import Classifier, Normalise
from raytrain.outer import AbstractOuter, Awp, Plain
from raytrain.training.setup import preflight

NORMS = ["linf", "l2", "l1"]
TINY_SHARE = (64 * 6 * 9) / (64 * 6 * 9 + 16 * 8 * 54 + 128 * 4)
"""Multiplications of TinyNet's first convolution, and of all its layers."""


class Fixed(AbstractOuter):
    """SGD on a weighted mean, the weights given."""

    values: tuple[float, ...]
    asked: bool = False  # hand the weights over as a function of losses and input gradients

    @property
    def weighs(self) -> bool:
        return True

    @property
    def leaves(self) -> bool:
        return False

    def weights(
        self, state: TrainState, oracle: Oracle, delta: Delta, given: PerSample | None = None
    ) -> PerSample | Weigh | None:
        found = torch.tensor(self.values, dtype=delta.dtype)
        return (lambda losses, input_grads: found) if self.asked else found


UNEVEN = (0.1, 2.0, 0.5, 1.5, 0.01, 1.0, 3.0, 0.7)


def free(norm: str = "linf", eps: float | None = None, **fields: Any) -> AbstractAlgorithm:
    return Free(**{"m": 3, **fields}).build(ball_of(norm, eps), Plain())


def yopo(
    norm: str = "linf",
    eps: float | None = None,
    outer: AbstractOuter | None = None,
    **fields: Any,
) -> AbstractAlgorithm:
    return Yopo(**{"m": 3, "n": 2, **fields}).build(ball_of(norm, eps), outer or Plain())


def slots_of(state: TrainState) -> SlotStore:
    return state.part("slots", SlotStore)


def steepest(norm: str, grad: Tensor) -> Tensor:
    """The step of length one, for the norms whose step is a formula."""
    if norm == "linf":
        return grad.sign()
    return grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def clipped(norm: str, delta: Tensor, images: Tensor) -> Tensor:
    if norm == "linf":
        delta = delta.clamp(-EPS["linf"], EPS["linf"])
    else:
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = torch.where(length > EPS["l2"], delta * (EPS["l2"] / length), delta)
    return torch.max(torch.min(delta, 1 - images), -images)


class Watched(nn.Module):
    """A network that remembers the images it was shown."""

    def __init__(self, model: TinyNet) -> None:
        super().__init__()
        self.model, self.seen = model, list[Tensor]()

    def stem(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.model.stem(x)

    def rest(self, h: Tensor) -> Tensor:
        return self.model.rest(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


class Curved(TinyNet):
    """A first stage that is not linear in the image."""

    def stem(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * self.conv1(x))


def curved_net() -> Curved:
    net = Curved().double()
    net.load_state_dict(tiny_net().state_dict())
    return net


class ByHand:
    """Momentum SGD with weight decay, written out."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, decay: float) -> None:
        self.weights = list(model.parameters())
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.speed = [torch.zeros_like(p) for p in self.weights]

    def step(self, grads: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, speed, grad in zip(self.weights, self.speed, grads, strict=True):
                speed.mul_(self.momentum).add_(grad + self.decay * weight)
                weight.sub_(self.lr * speed)


def assert_near_weights(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert_near(ours.detach(), theirs.detach(), tolerance)


# --- Free -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_free_is_its_algorithm_written_out(norm: str, batch_norm: bool, smoothing: float) -> None:
    algorithm = free(norm, label_smoothing=smoothing, step_size="0.8*eps")
    state = state_of(tiny_net(batch_norm=batch_norm), algorithm, weight_decay=0.01)
    twin = tiny_net(batch_norm=batch_norm).train()
    sgd, carried = ByHand(twin, 0.1, 0.9, 0.01), torch.zeros(8, 1, 8, 8, dtype=torch.float64)
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        outcome = algorithm.step(state, batch)
        first = None
        delta = clipped(norm, carried, batch.images)
        for _ in range(3):
            delta = delta.detach().requires_grad_(True)
            losses = F.cross_entropy(
                twin(batch.images + delta),
                batch.labels,
                reduction="none",
                label_smoothing=smoothing,
            )
            first = losses.detach() if first is None else first
            *grads, up = torch.autograd.grad(losses.mean(), [*twin.parameters(), delta])
            sgd.step(list(grads))
            there = delta + 0.8 * EPS[norm] * steepest(norm, up)
            delta = clipped(norm, there, batch.images).detach()
        carried = delta
        assert first is not None
        assert_near(outcome.losses, first, 1e-12)
        assert_near(slots_of(state).values, carried, 1e-12)
        assert torch.equal(outcome.delta, slots_of(state).values)
        assert outcome.steps.tolist() == [3] * 8
    assert_near_weights(state.model, twin, 1e-12)
    for ours, theirs in zip(state.model.buffers(), twin.buffers(), strict=True):
        assert_near(ours.double(), theirs.double(), 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_free_never_shows_the_network_anything_outside_ball_and_box(norm: str) -> None:
    watched = Watched(tiny_net())
    algorithm, overshot = free(norm), 0
    state = state_of(watched, algorithm)
    for seed in range(3):
        batch, carried = batch_of(8, seed=seed), slots_of(state).values.clone()
        overshot += not torch.equal(in_box(carried, batch.images), carried)
        watched.seen.clear()
        algorithm.step(state, batch)
        assert len(watched.seen) == 3
        for seen in watched.seen:
            assert float(seen.min()) >= 0 and float(seen.max()) <= 1
            longest = ball_of(norm).norm_of(seen - batch.images).max()
            assert float(longest) <= EPS[norm] * (1 + 1e-12)
    assert overshot == 2  # what was carried would have left the box of the new images


def test_a_pixel_that_the_box_stops_is_carried_over_clipped_and_turns_back_at_once() -> None:
    # The authors' code clips the image inside its graph instead, and delta to the ball alone.
    eps, base = EPS["linf"], batch_of(8)
    white, grey = (torch.full_like(base.images, level) for level in (0.99, 0.5))
    labels, algorithm = torch.zeros_like(base.labels), free(m=1)
    up = torch.full((1, 8, 8), 0.01, dtype=torch.float64)
    model = Affine(up.clone())
    state, theirs = state_of(model, algorithm, lr=0.0), torch.zeros_like(white)
    ours = []
    for images, slope in ((white, up), (white, -up), (white, up), (grey, up)):
        with torch.no_grad():
            model.slope.copy_(slope)
        batch = Batch(images, labels, base.index, base.rng)
        ours.append(float(algorithm.step(state, batch).delta.mean()))
        theirs = theirs.requires_grad_(True)
        loss = F.cross_entropy(model((images + theirs).clamp(0, 1)), labels)
        (grad,) = torch.autograd.grad(loss, theirs)
        theirs = (theirs + eps * grad.sign()).clamp(-eps, eps).detach()
        if images is white:
            assert torch.equal(theirs, torch.full_like(white, eps))  # stopped, and without a slope
    assert ours == pytest.approx([0.01, 0.01 - eps, 0.01, eps], abs=1e-15)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("m", [1, 3])
def test_free_without_a_radius_replays_each_batch_of_natural_training(norm: str, m: int) -> None:
    algorithm, natural = free(norm, eps=0.0, m=m), Natural().build(ball_of(norm), Plain())
    ours = state_of(tiny_net(batch_norm=True), algorithm)
    theirs = state_of(tiny_net(batch_norm=True))
    for seed in range(2):
        algorithm.step(ours, batch_of(8, seed=seed))
        for _ in range(m):
            natural.step(theirs, batch_of(8, seed=seed))
    assert same(ours.model, theirs.model)
    assert float(slots_of(ours).values.abs().max()) == 0
    assert ours.meter == theirs.meter


def test_one_replay_is_natural_training_only_if_the_slots_are_emptied() -> None:
    algorithm, natural = free(m=1), Natural().build(ball_of("linf"), Plain())
    theirs = state_of(tiny_net(batch_norm=True))
    kinds = {kind: state_of(tiny_net(batch_norm=True), algorithm) for kind in ("kept", "emptied")}
    for seed in range(2):
        natural.step(theirs, batch_of(8, seed=seed))
        for kind, state in kinds.items():
            if kind == "emptied":
                slots_of(state).values.zero_()
            algorithm.step(state, batch_of(8, seed=seed))
    assert same(kinds["emptied"].model, theirs.model)
    assert not same(kinds["kept"].model, theirs.model)


@pytest.mark.parametrize("norm", NORMS)
def test_free_with_frozen_weights_walks_the_path_of_pgd_from_the_carried_start(norm: str) -> None:
    algorithm, ball = free(norm, m=4), ball_of(norm)
    state = state_of(tiny_net(), algorithm, lr=0.0)
    pgd = ProjectedAscent(steps=4, step_size="eps", bn="train")
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        start = ball.feasible(slots_of(state).values, batch.images)
        found = algorithm.step(state, batch).delta
        oracle = Oracle(state.model, CrossEntropy(), batch, Meter(), attack_bn="train")
        wanted = pgd.maximise(oracle, ball, start, Progress(0.0, 0.0)).delta
        # A gradient of the mean times n; l-inf sees its signs alone.
        assert_near(found, wanted, 0 if norm == "linf" else 1e-13)
    assert same(state.model, tiny_net())


def test_free_with_weights_moves_along_each_samples_own_gradient() -> None:
    found = []
    for outer in (Plain(), Fixed(values=UNEVEN), Fixed(values=UNEVEN, asked=True)):
        algorithm = Free(m=3, step_size="eps/3").build(ball_of("l2"), outer)
        state = state_of(tiny_net(), algorithm, lr=0.0)
        found.append(algorithm.step(state, batch_of(8)).delta)
    assert_near(found[1], found[0], 1e-13)
    assert_near(found[2], found[0], 1e-13)


def test_free_with_weights_updates_with_the_weighted_mean() -> None:
    algorithm, batch = Free(m=1).build(ball_of("linf"), Fixed(values=UNEVEN)), batch_of(8)
    model = tiny_net()
    twin = copy.deepcopy(model)
    algorithm.step(state_of(model, algorithm), batch)
    losses = F.cross_entropy(twin(batch.images), batch.labels, reduction="none")
    weighted = (losses * torch.tensor(UNEVEN, dtype=torch.float64)).mean()
    ByHand(twin, 0.1, 0.9, 0).step(list(torch.autograd.grad(weighted, list(twin.parameters()))))
    assert_near_weights(model, twin, 1e-14)


@pytest.mark.parametrize("m", [1, 8])
def test_free_costs_one_forward_and_one_backward_per_update(m: int) -> None:
    algorithm = free(m=m)
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch_of(8))
    assert state.meter == Meter(forwards=8 * m, full_backwards=8 * m)
    assert state.meter.fe == 8 * 3 * m


@dataclass(frozen=True)
class Told(DistributedContext):
    """A worker whose gathering is told beforehand what all workers hold."""

    rows: tuple[Tensor, ...] = ()

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self.rows)


def slot_setup(context: DistributedContext, batch_size: int = 12) -> TrainingSetup:
    return TrainingSetup(context, tiny_net(), 99, (1, 2, 3), batch_size, torch.float64, seed=0)


@pytest.mark.parametrize(("before", "after"), list(itertools.product([1, 2, 3, 6], repeat=2)))
def test_slots_are_dealt_anew_to_any_number_of_workers(before: int, after: int) -> None:
    whole = torch.randn(12, 1, 2, 3, generator=generator(0), dtype=torch.float64)
    held = []
    for rank in range(before):
        store = SlotStore(slot_setup(DistributedContext(rank=rank, world=before)))
        assert store.values.shape == (12 // before, 1, 2, 3) and not store.values.any()
        store.load_state_dict({"values": whole})
        # Slot s belongs to worker s modulo their number, as its images do.
        assert torch.equal(store.values, whole[rank::before])
        held.append(store.values)
    saved: dict[str, Any] = {}
    for rank in range(before):
        writer = SlotStore(slot_setup(Told(rank=rank, world=before, rows=tuple(held))))
        saved = writer.state_dict()
        assert torch.equal(saved["values"], whole)
    for rank in range(after):
        reader = SlotStore(slot_setup(DistributedContext(rank=rank, world=after)))
        reader.load_state_dict(saved)
        assert torch.equal(reader.values, whole[rank::after])


def test_one_passes_do_not_go_with_gradients_at_other_weights() -> None:
    for recipe in (Free(), Yopo()):
        with pytest.raises(ValueError, match=f"outer: awp does not go with {recipe.name}"):
            recipe.build(ball_of("linf"), Awp())


# --- YOPO: the two stages ---------------------------------------------------------------------


def yopo_oracle(model: nn.Module, batch: Batch) -> Oracle:
    return Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="train")


def noise(batch: Batch, norm: str = "linf") -> Tensor:
    return Uniform().delta(ball_of(norm), batch, None)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_costate_is_the_gradient_after_the_first_layer(
    batch_norm: bool, weighted: bool
) -> None:
    batch, model = batch_of(8), tiny_net(batch_norm=batch_norm)
    delta, twin = noise(batch), copy.deepcopy(model).train()
    weights = torch.tensor(UNEVEN, dtype=torch.float64) if weighted else None
    losses, costate, _ = yopo_oracle(model, batch).costate(delta, weights, stem_too=False)
    seam = twin.stem(batch.images + delta).detach().requires_grad_(True)
    wanted = F.cross_entropy(twin.rest(seam), batch.labels, reduction="none")
    assert_near(losses, wanted.detach(), 1e-14)
    if not (batch_norm and weighted):  # with both, the weights reach other samples' costates
        (grad,) = torch.autograd.grad(wanted.sum(), seam, retain_graph=True)
        assert_near(costate, grad, 1e-12)
    mean = (wanted if weights is None else wanted * weights).mean()
    later = [p for name, p in twin.named_parameters() if not name.startswith("conv1")]
    grads = iter(torch.autograd.grad(mean, later))
    for name, parameter in model.named_parameters():
        if name.startswith("conv1"):
            assert parameter.grad is None  # the Hamiltonian brings it
        else:
            assert parameter.grad is not None
            assert_near(parameter.grad, next(grads), 1e-14)


@pytest.mark.parametrize("make", [tiny_net, curved_net])
def test_with_a_fresh_costate_the_first_layer_tells_the_whole_input_gradient(make: Any) -> None:
    batch, model = batch_of(8), make()
    oracle, delta = yopo_oracle(model, batch), noise(batch)
    _, costate, _ = oracle.costate(delta, None, stem_too=False)
    found = oracle.stem_delta_grad(delta, costate, 0.0)
    assert_near(found, oracle.delta_grad(delta)[1], 1e-13)
    stale = oracle.stem_delta_grad(0 * delta, costate, 0.0)
    apart = float((stale - oracle.delta_grad(0 * delta)[1]).abs().max())
    assert apart > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_yopo_m_1_walks_the_path_of_pgd(norm: str) -> None:
    batch, ball = batch_of(8), ball_of(norm)
    algorithm = yopo(norm, m=4, n=1, step_size="eps/3")
    state = state_of(tiny_net(), algorithm, lr=0.0)
    found = algorithm.step(state, batch)
    pgd = ProjectedAscent(steps=4, step_size="eps/3", bn="train")
    start = noise(batch, norm)
    wanted = pgd.maximise(yopo_oracle(state.model, batch), ball, start, Progress(0.0, 0.0)).delta
    assert_near(found.delta, wanted, 0 if norm == "linf" else 1e-12)
    assert found.steps.tolist() == [4] * 8
    assert_near(found.losses, yopo_oracle(state.model, batch).losses(start), 1e-14)


@pytest.mark.parametrize("make", [tiny_net, curved_net])
@pytest.mark.parametrize("stem_grad", ["hamiltonian", "both"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("weighted", [None, False, True])
def test_yopo_is_its_algorithm_written_out(
    make: Any, stem_grad: str, m: int, n: int, weighted: bool | None
) -> None:
    # weighted: no weights, numbers, or a function that asks for losses and input gradients.
    outer = None if weighted is None else Fixed(values=UNEVEN, asked=weighted)
    algorithm = yopo(outer=outer, m=m, n=n, stem_grad=stem_grad, label_smoothing=0.1)
    state, twin = state_of(make(), algorithm, weight_decay=0.01), make()
    sgd = ByHand(twin, 0.1, 0.9, 0.01)
    weights = torch.tensor(UNEVEN if outer else [1.0] * 8, dtype=torch.float64)
    for seed in range(2):
        batch = batch_of(8, seed=seed)
        images, labels = batch.images, batch.labels
        outcome = algorithm.step(state, batch)
        delta = noise(batch)
        sums = [torch.zeros_like(p) for p in twin.parameters()]
        for _ in range(m):
            seam = twin.stem(images + delta).detach().requires_grad_(True)
            losses = F.cross_entropy(
                twin.rest(seam), labels, reduction="none", label_smoothing=0.1
            )
            (costate,) = torch.autograd.grad(losses.sum(), seam, retain_graph=True)
            passes = [(losses * weights).mean()]
            if stem_grad == "both":
                there = (twin.stem(images + delta) * costate).flatten(1).sum(1)
                passes.append((there * weights).mean())
            for _ in range(n):
                delta = delta.detach().requires_grad_(True)
                (up,) = torch.autograd.grad((twin.stem(images + delta) * costate).sum(), delta)
                delta = clipped("linf", delta + EPS["linf"] / 4 * up.sign(), images).detach()
            after = (twin.stem(images + delta) * costate).flatten(1).sum(1)
            passes.append((after * weights).mean())
            for value in passes:
                grads = torch.autograd.grad(value, list(twin.parameters()), allow_unused=True)
                for total, grad in zip(sums, grads, strict=True):
                    total += 0 if grad is None else grad / m
        sgd.step(sums)
        assert torch.equal(outcome.delta, delta)
    assert_near_weights(state.model, twin, 1e-12)


def test_with_one_pass_only_the_first_layer_sees_the_new_perturbation() -> None:
    models = {}
    for size in (1e-9, "eps"):
        algorithm = yopo(m=1, n=2, step_size=size)
        models[size] = tiny_net()
        algorithm.step(state_of(models[size], algorithm), batch_of(8))
    for (name, one), other in zip(
        models["eps"].named_parameters(), models[1e-9].parameters(), strict=True
    ):
        # The bias of the first layer adds the costates up, wherever the images are.
        blind = not name.startswith("conv1") or name.endswith("bias")
        assert (float((one - other).detach().abs().max()) <= 1e-15) == blind


def test_the_public_code_counts_the_first_layer_twice() -> None:
    moves = {}
    for kind in ("hamiltonian", "both"):
        model, algorithm = tiny_net(), yopo(stem_grad=kind, step_size=1e-13, m=2)
        before = copy.deepcopy(model)
        algorithm.step(state_of(model, algorithm), batch_of(8))
        pairs = zip(model.named_parameters(), before.parameters(), strict=True)
        moves[kind] = {name: (now - was).detach() for (name, now), was in pairs}
    for name, move in moves["hamiltonian"].items():
        factor = 2 if name.startswith("conv1") else 1
        assert_near(moves["both"][name], factor * move, 1e-11)


def test_the_public_rate_and_decay_are_m_times_and_a_share_of_ours() -> None:
    # There the m gradients are summed: its 0.04 and 5e-4 with m = 5 are 0.2 and 1e-4 here.
    algorithm, twin = yopo(m=5, step_size=1e-14), tiny_net()
    state = state_of(tiny_net(), algorithm, lr=0.2, weight_decay=1e-4)
    sgd = ByHand(twin, 0.04, 0.9, 5e-4)
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        algorithm.step(state, batch)
        # Perturbations that do not move have m equal gradients.
        loss = F.cross_entropy(twin(batch.images + noise(batch)), batch.labels)
        sgd.step([5 * grad for grad in torch.autograd.grad(loss, list(twin.parameters()))])
        assert_near_weights(state.model, twin, 1e-11)


def test_with_a_linear_first_layer_n_steps_are_one_step_n_times_as_long() -> None:
    for make, alike in ((tiny_net, True), (curved_net, False)):
        found = []
        for n, size in ((4, "eps/8"), (1, "eps/2")):
            algorithm = yopo(m=3, n=n, step_size=size)
            state = state_of(make(), algorithm)
            found.append(algorithm.step(state, batch_of(8)).delta)
        near = float((found[0] - found[1]).abs().max()) <= 1e-14
        assert near == alike


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_without_steps_yopo_is_training_on_noise(m: int, norm: str) -> None:
    # m equal gradients, averaged. A step of 1e-14 pixels is none.
    batch, model = batch_of(8), tiny_net(batch_norm=True)
    algorithm, twin = yopo(norm, m=m, step_size=1e-14), copy.deepcopy(model).train()
    algorithm.step(state_of(model, algorithm), batch)
    loss = F.cross_entropy(twin(batch.images + noise(batch, norm)), batch.labels)
    ByHand(twin, 0.1, 0.9, 0).step(list(torch.autograd.grad(loss, list(twin.parameters()))))
    assert_near_weights(model, twin, 1e-11)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_radius_yopo_is_natural_training_to_rounding(norm: str) -> None:
    ours, theirs = (tiny_net(batch_norm=True) for _ in range(2))
    algorithm = yopo(norm, eps=0.0)
    one, two = state_of(ours, algorithm, weight_decay=0.1), state_of(theirs, weight_decay=0.1)
    for seed in range(3):
        algorithm.step(one, batch_of(8, seed=seed))
        Natural().build(ball_of(norm), Plain()).step(two, batch_of(8, seed=seed))
    assert_near_weights(ours, theirs, 1e-12)
    counts = [int(net.norm.num_batches_tracked) for net in (ours, theirs)]  # pyright: ignore
    assert counts == [9, 3]  # every full pass, and no step through the first layer, is counted


@pytest.mark.parametrize("norm", NORMS)
def test_every_image_yopo_shows_the_network_is_feasible(norm: str) -> None:
    watched, batch = Watched(tiny_net()), batch_of(8)
    algorithm = yopo(norm)
    state = state_of(watched, algorithm)
    watched.seen.clear()  # counting the operations of the first layer looked at it too
    algorithm.step(state, batch)
    assert len(watched.seen) == 3 * (1 + 2 + 1)
    for seen in watched.seen:
        assert float(seen.min()) >= 0 and float(seen.max()) <= 1
        longest = ball_of(norm).norm_of(seen - batch.images).max()
        assert float(longest) <= EPS[norm] * (1 + 1e-6)  # starts are drawn in float32


# --- YOPO: cost and refusals ------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("stem_grad", ["hamiltonian", "both"])
def test_yopo_costs_full_passes_and_a_share_for_the_first_layer(
    m: int, n: int, stem_grad: str
) -> None:
    algorithm = yopo(m=m, n=n, stem_grad=stem_grad)
    state = state_of(tiny_net(), algorithm)
    share = state.part("stem", Numbers)["share"]
    assert abs(share - TINY_SHARE) <= 1e-12
    algorithm.step(state, batch_of(8))
    meter = state.meter
    assert (meter.forwards, meter.full_backwards) == (8 * m, 8 * m)
    assert meter.input_backwards == 0
    assert abs(meter.stem - 8 * 2 * m * (n + 1) * TINY_SHARE) <= 1e-9
    assert meter.fe == round(8 * (3 * m + 2 * m * (n + 1) * TINY_SHARE))


def test_measuring_the_first_layer_leaves_the_network_as_it_was() -> None:
    model = tiny_net(batch_norm=True, dropout=0.5).train()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    image = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert abs(stem_share(model, image) - TINY_SHARE) <= 1e-12
    assert same(model, before) and torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


class Whole(nn.Module):
    """Eight by eight grey images to logits, in one piece."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def foreign(num_classes: int) -> nn.Module:
    """Somebody else's network, as a configuration names it."""
    return Whole(num_classes)


def test_a_network_in_one_piece_is_refused_before_anything_is_trained() -> None:
    wrapped = Classifier(Normalise(1, [0.0], [1.0]), Whole()).double()
    for model in (Affine(torch.ones(1, 8, 8).double()), wrapped):
        with pytest.raises(RequestError, match="model.name: .*first layer"):
            state_of(model, yopo())
    fields = {"data": "digits", "algorithm": "yopo", "device": "cpu"}
    with pytest.raises(RequestError, match="model.name: .*first layer"):
        preflight(RunConfig.model_validate({**fields, "model": f"{__name__}:foreign"}))
    preflight(RunConfig.model_validate({**fields, "model": "small_cnn"}))


def test_yopo_keeps_no_perturbation_per_image() -> None:
    recipe = Yopo.model_validate({"name": "yopo", "start": "remembered"})
    with pytest.raises(ValueError, match="start: yopo keeps no perturbation per image"):
        recipe.build(ball_of("linf"), Plain())
    for start in (Zero(), Gaussian()):
        batch, algorithm = batch_of(8), yopo(start=start, step_size=1e-15)
        found = algorithm.step(state_of(tiny_net(), algorithm), batch).delta
        assert_near(found, start.delta(ball_of("linf"), batch, None), 1e-13)
