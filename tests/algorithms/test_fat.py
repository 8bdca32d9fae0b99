"""Friendly adversarial training: where images stop, how tau grows, what it costs, its limit."""

from __future__ import annotations

import pytest
import torch
from helpers import ball_of, batch_of, state_of, tiny_net

from raytrain.algorithms import Fat, Pgd
from raytrain.algorithms.fat import Misclassified
from raytrain.attacks import AbstractStopping, ProjectedAscent
from raytrain.core.cost import Meter
from raytrain.core.losses import CrossEntropy
from raytrain.core.oracle import Oracle
from raytrain.core.types import Progress
from raytrain.outer import Plain
from raytrain.testing import StoppingConformance
from raytrain.testing.algorithms import built, equal, trained

STEPS = 8


class TestTheRule(StoppingConformance):
    @pytest.fixture
    def stopping(self) -> AbstractStopping:
        return Misclassified(tau=2, grow_at=(0.5, 1.0))


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_an_image_stops_at_its_misclassified_iterate_number_tau_plus_one(tau: int) -> None:
    batch, ball, model = batch_of(32), ball_of("linf"), tiny_net()

    def iterate(steps: int, stop: AbstractStopping) -> tuple[torch.Tensor, torch.Tensor]:
        attack = ProjectedAscent(steps=steps, step_size="eps/8", stop=stop, bn="eval")
        oracle = Oracle(model, CrossEntropy(), batch, Meter(), attack_bn="eval")
        found = attack.maximise(oracle, ball, attack.start.delta(ball, batch), Progress(1.0, 1.0))
        return found.delta, found.steps

    never = Misclassified(tau=STEPS, grow_at=(0.1,) * STEPS)
    path = [iterate(steps, never)[0] for steps in range(STEPS + 1)]
    wrong = torch.stack([model(batch.images + delta).argmax(1) != batch.labels for delta in path])
    delta, steps = iterate(STEPS, Misclassified(tau=tau, grow_at=(0.1,) * tau))
    for i in range(len(batch)):
        at = [step for step in range(STEPS) if wrong[step, i]][tau : tau + 1] or [STEPS]
        assert int(steps[i]) == at[0]
        # 1e-12: convolutions of another batch size sum in another order.
        assert float((delta[i] - path[at[0]][i]).abs().max()) <= 1e-12
    assert len(set(steps.tolist())) > 2  # they did stop at different steps


@pytest.mark.parametrize(("epoch", "tau"), [(0, 0), (49, 0), (50, 1), (89, 1), (90, 2), (119, 2)])
def test_tau_grows_at_the_epochs_of_the_public_code(epoch: int, tau: int) -> None:
    # Three images, misclassified at every iterate: each takes tau steps.
    batch, model = batch_of(3), tiny_net()
    labels = (model(batch.images).argmax(1) + 1) % 4
    batch = type(batch)(batch.images, labels, batch.index, batch.rng)
    algorithm = Fat(start="zero", step_size=1e-9).build(ball_of("linf"), Plain())  # pyright: ignore[reportArgumentType]
    state = state_of(model, algorithm)
    state.progress = Progress(epoch / 120, epoch / 120, epoch)
    assert algorithm.step(state, batch).steps.tolist() == [tau] * 3


def test_it_costs_a_gradient_more_than_the_steps_of_each_image() -> None:
    algorithm, state = built(Fat()), state_of(tiny_net())
    outcome = algorithm.step(state, batch_of(24))
    cost = 2 * (outcome.steps + 1).clamp_max(10) + 3
    assert state.meter.fe == int(cost.sum()) and int(cost.min()) >= 5
    assert len(cost.unique()) > 1


def test_a_tau_that_is_never_reached_is_pgd_bit_for_bit() -> None:
    patient = Fat(tau=10, grow_at=(1e-9,) * 10)
    one, other = built(patient), built(Pgd())
    states = [state_of(tiny_net(batch_norm=True), algorithm) for algorithm in (one, other)]
    for algorithm, state in zip((one, other), states, strict=True):
        state.progress = Progress(0.5, 0.5)
        algorithm.step(state, batch_of(8))
    assert equal(*states)
    assert not equal(trained(built(Fat())), trained(built(Pgd())))
