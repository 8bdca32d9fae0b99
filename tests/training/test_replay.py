"""Recorded steps: which are recorded together, what is drawn anew, and what happens where none can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ball_of, batch_of, rng_of, same, state_of, tiny_net
from torch import Tensor

from raytrain.algorithms import Dynamic, Fat, L2l, Nested, Pgd, SiHg, Ssds
from raytrain.algorithms.base import AbstractAlgorithm
from raytrain.attacks import AbstractInit, ProjectedAscent, Uniform
from raytrain.core.cost import CostSetting
from raytrain.core.errors import NotReplayable
from raytrain.core.recording import RecordedPasses
from raytrain.core.sample_store import SampleStore
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import BEGINNING, Batch, Progress
from raytrain.outer import Engm, Plain
from raytrain.testing.algorithms import assert_same_steps, built, stepwise
from raytrain.testing.recorded import RecordedOperations
from raytrain.training.replay import (
    ReplayedSteps,
    ReplayedWherePossible,
    StaticRandom,
    record_passes,
)


def test_static_random_numbers_are_those_of_each_batch_in_the_same_place() -> None:
    random = StaticRandom(rng_of(4, seed=0))
    draws: list[Callable[[Any], Tensor]] = [
        lambda rng: rng.uniform("start", 1, 2, 2),
        lambda rng: rng.normal("start", 3),
        lambda rng: rng.integers("top", 5),
    ]
    places = [draw(random).data_ptr() for draw in draws]
    for seed in range(3):
        random.refill(rng_of(4, seed=seed))
        assert all(torch.equal(draw(random), draw(rng_of(4, seed=seed))) for draw in draws)
        assert [draw(random).data_ptr() for draw in draws] == places


def test_numbers_that_were_never_drawn_are_refused_while_a_step_is_recorded() -> None:
    random = StaticRandom(rng_of(4))
    random.uniform("start", 2)
    random.close()
    random.uniform("start", 2)
    with pytest.raises(NotReplayable, match="other random numbers"):
        random.uniform("align", 2)


def test_numbers_of_a_curriculum_are_recorded_apart() -> None:
    # Eight steps: three of each kind until one is recorded.
    schedule = [{"eps": 0.1}] * 4 + [{"eps": 0.05}] * 4
    found = stepwise(built(Pgd(steps=1)), recorded=True, scheduled=schedule)
    assert found.replayed == 2


def test_numbers_that_change_in_every_step_are_not_recorded() -> None:
    schedule = [{"eps": 0.1 / (1 + step)} for step in range(9)]
    with pytest.raises(NotReplayable, match="change too often"):
        stepwise(built(Pgd(steps=1)), recorded=True, scheduled=schedule)


@pytest.mark.parametrize(
    "algorithm",
    [
        built(L2l(steps=2, hidden=3, phi_every=2)),
        built(SiHg(mode="B", replays=2)),
        built(Ssds(order="jacobi", budget="multiplier", replays=2)),
        built(Dynamic(steps=3, compact=False, c_max=0.05, per="epoch")),
        built(Dynamic(steps=3, c_max=-1)),
        Pgd(steps=1).build(ball_of("linf"), Engm(tau=2, chunk=1, quantile=0.5, renorm=True)),
    ],
    ids=[
        "l2l-every-2",
        "si_hg-B",
        "ssds-multiplier",
        "dynamic-official",
        "dynamic-never",
        "engm-quantile",
    ],
)
def test_steps_that_alternate_are_recorded_one_by_one(algorithm: AbstractAlgorithm) -> None:
    schedule = [{}] * 10
    recorded, plain = (
        stepwise(algorithm, recorded=recorded, scheduled=schedule) for recorded in (True, False)
    )
    assert_same_steps(recorded, plain)


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        (built(Dynamic(steps=2)), "removed from the batch"),
        (built(SiHg(mode="T")), "every sample's gradient"),
        (built(Ssds(budget="full")), "on the host"),
    ],
    ids=["dynamic", "si_hg-T", "ssds-full"],
)
def test_a_step_that_cannot_be_recorded_says_why_and_its_passes_are(
    algorithm: AbstractAlgorithm, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotReplayable, match=reason):
        stepwise(algorithm, recorded=True)
    one, other = (state_of(tiny_net(), algorithm) for _ in range(2))
    steps = ReplayedWherePossible(one, RecordedOperations)
    for seed in range(3):
        steps(algorithm, batch_of(8, seed=seed), {})
        algorithm.step(other, batch_of(8, seed=seed))
    assert same(one.model, other.model) and one.meter == other.meter
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raytrain: performance: ") and reason in line


@pytest.mark.parametrize(
    "algorithm",
    [built(Dynamic(steps=4, c_max=0.03)), built(Fat(steps=4))],
    ids=["dynamic", "fat"],
)
def test_passes_of_samples_that_have_not_stopped_are_replayed(
    algorithm: AbstractAlgorithm,
) -> None:
    one, other = (state_of(tiny_net(batch_norm=True), algorithm) for _ in range(2))
    record_passes(one, RecordedOperations, batch_size=16)
    steps = []
    for seed in range(5):
        batches = [batch_of(16, seed=seed) for _ in range(2)]
        found, wanted = (
            algorithm.step(state, batch)
            for state, batch in zip((one, other), batches, strict=True)
        )
        assert torch.equal(found.steps, wanted.steps)
        assert torch.allclose(found.delta, wanted.delta, rtol=0, atol=1e-12)
        steps.append(found.steps)
    taken = torch.stack(steps)
    assert int(taken.min()) < int(taken.max())  # samples stop at different times
    assert one.meter == other.meter
    assert one.frozen is not None and isinstance(one.frozen.predict, RecordedPasses)
    assert isinstance(one.compiled, RecordedPasses)
    assert one.frozen.predict.replayed > 0 and one.compiled.replayed == 5 - 3


class ReadsOnTheHost(AbstractAlgorithm):
    """Claims that its steps can be recorded, and reads a loss on the host from the third on."""

    def __init__(self) -> None:
        self.ball, self.outer = ball_of("linf"), Plain()

    def fe_per_image(self, setting: CostSetting) -> float:
        return 3.0

    def replay_key(self, state: TrainState) -> tuple[()]:
        return ()

    def step(self, state: TrainState, batch: Batch) -> StepResult:
        delta = torch.zeros_like(batch.images)
        oracle = state.oracle(batch, Pgd().cross_entropy(), "eval")
        if state.step >= 2:
            float(oracle.losses(delta).sum())
        losses = self.outer.update(state, oracle, delta)
        return StepResult(losses, delta, torch.zeros_like(batch.labels))


def test_a_step_that_reads_on_the_host_is_run_again_and_counted_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    algorithm = ReadsOnTheHost()
    one, other = (state_of(tiny_net(), algorithm) for _ in range(2))
    steps = ReplayedWherePossible(one, RecordedOperations)
    for seed in range(4):
        steps(algorithm, batch_of(8, seed=seed), {})
        algorithm.step(other, batch_of(8, seed=seed))
        one.step, other.step = seed + 1, seed + 1
    assert same(one.model, other.model) and one.meter == other.meter
    assert "not whole steps: " in capsys.readouterr().err
    assert "not steps: " in one.execution and other.execution == "eager"


class Growing(AbstractInit):
    """A start whose radius grows with training."""

    kind: str = "growing"

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Tensor:
        return Uniform(radius=0.1 + progress.step).delta(threat, batch, store, progress)


def test_a_start_of_ones_own_is_not_replayed_at_another_progress() -> None:
    attack = ProjectedAscent(start=Growing(), steps=0, step_size="eps", bn="eval")
    algorithm = Nested(ball_of("linf"), attack, Plain())
    one, other = (state_of(tiny_net(), algorithm) for _ in range(2))
    steps = ReplayedSteps(one, RecordedOperations())
    for seed in range(6):
        one.progress = other.progress = Progress(step=seed / 6)
        found = steps(algorithm, batch_of(8, seed=seed), {})
        assert torch.equal(found.delta, algorithm.step(other, batch_of(8, seed=seed)).delta)


def test_kinds_of_steps_do_not_pile_up() -> None:
    algorithm = built(Pgd(steps=0))
    state = state_of(tiny_net(), algorithm)
    steps = ReplayedSteps(state, RecordedOperations())
    held: list[int] = []
    for number in range(60):
        steps(algorithm, batch_of(8), {"eps": 0.01 * (number // 3)})
        held.append(len(steps._kinds))
    assert max(held) == held[-1] == 8
