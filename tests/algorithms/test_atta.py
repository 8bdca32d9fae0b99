"""ATTA: perturbations accumulate from epoch to epoch, and begin anew on time."""

from __future__ import annotations

import pytest
import torch
from helpers import ball_of, batch_of, state_of, tiny_net

from raytrain.algorithms import Atta, Nested, Pgd
from raytrain.attacks import Gaussian, ProjectedAscent, Remembered
from raytrain.core.sample_store import SampleStore
from raytrain.core.train_state import TrainState
from raytrain.core.types import Progress
from raytrain.outer import Plain
from raytrain.testing.algorithms import built, equal


def visited(algorithm: Nested, epochs: range, state: TrainState | None = None) -> TrainState:
    """The state after one step in each epoch, all of them on the same batch."""
    state = state or state_of(tiny_net(batch_norm=True), algorithm)
    for epoch in epochs:
        state.epoch, state.progress = epoch, Progress(epoch / 20, epoch / 20, epoch)
        algorithm.step(state, batch_of(8))
    return state


def test_with_frozen_weights_visits_are_the_steps_of_one_attack() -> None:
    algorithm = Atta(steps=2, step_size="eps/8").build(ball_of("linf"), Plain())
    assert isinstance(algorithm, Nested)
    state = state_of(tiny_net(), algorithm, lr=0.0)
    visited(algorithm, range(3), state)
    whole = ProjectedAscent(start=Gaussian(), steps=6, step_size="eps/8", bn="eval")
    once = Nested(ball_of("linf"), whole, Plain())
    wanted = once.step(state_of(tiny_net(), once, lr=0.0), batch_of(8)).delta
    assert torch.equal(state.part("delta", SampleStore).read(batch_of(8)), wanted)


def test_all_perturbations_begin_anew_on_time() -> None:
    algorithm = Atta(reset_every=3).build(ball_of("linf"), Plain())
    assert isinstance(algorithm, Nested)
    state = visited(algorithm, range(3))
    fresh = visited(algorithm, range(3))
    store = fresh.part("delta", SampleStore)
    store.write(batch_of(8), torch.zeros_like(batch_of(8).images))
    for one in (state, fresh):
        visited(algorithm, range(3, 4), one)
    assert equal(state, fresh)  # what was remembered before epoch 3 does not matter
    for one, after in ((state, range(4, 5)), (fresh, range(4, 5))):
        if one is fresh:
            store.write(batch_of(8), torch.zeros_like(batch_of(8).images))
        visited(algorithm, after, one)
    assert not equal(state, fresh)


def test_without_resets_it_is_pgd_from_a_remembered_start_after_the_first_epoch() -> None:
    atta = Atta(reset_every=None, steps=2, step_size="eps/4").build(ball_of("l2"), Plain())
    pgd = Pgd(start=Remembered(), steps=2).build(ball_of("l2"), Plain())
    assert isinstance(atta, Nested) and isinstance(pgd, Nested)
    one, other = (visited(algorithm, range(1, 4)) for algorithm in (atta, pgd))
    assert equal(one, other)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_costs_what_pgd_of_as_many_steps_costs(steps: int) -> None:
    state = visited_of(steps)
    assert state.meter.fe == 2 * 8 * (2 * steps + 3)


def visited_of(steps: int) -> TrainState:
    algorithm = built(Atta(steps=steps))
    assert isinstance(algorithm, Nested)
    return visited(algorithm, range(2))
