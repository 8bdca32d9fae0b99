"""Population-based training: who copies whom, what is copied, and that it goes on after a dead driver."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sweep_helpers import METRIC, Launch, space_of

from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.distributed.jobs import Job
from raytrain.tuning.population import check_population, perturbed
from raytrain.tuning.space.settings import Population

RATE = {"optimizer.lr": {"float": [0.01, 0.3], "log": True}}


def launch_of(folder: Path, size: int = 4, seed: int = 0, **changes: Any) -> Launch:
    rules = {"size": size, "interval": 2, "resample": 0.0}
    search = {"sampler": "pbt", "population": rules, "seed": seed}
    space = space_of(**{"space": RATE, "search": search, "budget": {"trials": size}, **changes})
    return Launch(folder / "s", space=space)


def told(epoch: int, value: float, epochs: int = 4) -> dict[str, Any]:
    final = epoch == epochs
    metrics = json.dumps({METRIC: value, "cost/fe": 10.0 * epoch})
    progress = epoch / epochs
    return {"metrics": metrics, "epoch": epoch, "progress": progress, "final": final, "done": True}


def leave(job: Job, text: str) -> None:
    """A checkpoint, put in place as the loop does: the old file lives on under its other names."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    new = Path(job.folder) / "new"
    new.write_text(text)
    new.replace(Path(job.folder) / "last.pt")


def lr(job: Job) -> float:
    return RunConfig.model_validate_json(job.run).optimizer.lr


def halfway(launch: Launch, values: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)) -> list[Job]:
    """All members have trained to the first exchange."""
    jobs = [launch.begin(f"a{number}") for number in range(len(values))]
    for number, (job, value) in enumerate(zip(jobs, values, strict=True)):
        leave(job, f"member {number}")
        launch.manager.end(f"a{number}", told(2, value), lost=False)
    return jobs


def content(job: Job) -> str:
    return (Path(job.folder) / "last.pt").read_text()


def test_the_worst_quarter_goes_on_from_the_best_with_its_numbers_moved(tmp_path: Path) -> None:
    launch = launch_of(tmp_path)
    jobs = halfway(launch)
    assert {job.until for job in jobs} == {0.5 - 1e-9} and not any(job.resume for job in jobs)
    again = [launch.begin(f"b{number}") for number in range(4)]
    assert all(job.resume and job.until == 1.0 - 1e-9 for job in again)
    assert [content(job) for job in again] == ["member 3", "member 1", "member 2", "member 3"]
    factors = (1.25, 1 / 1.25)
    expected = [min(0.3, max(0.01, lr(jobs[3]) * factor)) for factor in factors]
    assert any(lr(again[0]) == pytest.approx(one, rel=1e-12) for one in expected)
    assert [lr(job) for job in again[1:]] == [lr(job) for job in jobs[1:]]
    (line,) = (launch.folder / "population.jsonl").read_text().splitlines()
    assert (json.loads(line)["member"], json.loads(line)["from"]) == (0, 3)
    assert launch.manager.history.rows()[0].params == {"optimizer.lr": lr(again[0])}
    assert list(Path(again[0].folder).glob(".last*")) == []


def test_a_population_is_as_many_trials_as_it_has_members(tmp_path: Path) -> None:
    launch = launch_of(tmp_path)
    halfway(launch)
    for number in range(4):
        launch.begin(f"b{number}")
    assert launch.manager.begin("c") is None
    for number in range(4):
        launch.manager.end(f"b{number}", told(4, 0.5), lost=False)
    with pytest.raises(StopIteration):
        launch.manager.begin("c")
    assert launch.manager.progress().finished == len(launch.trials()) == 4
    assert set(launch.store.status.values()) == {"FINISHED"}


def test_all_members_begin_before_one_goes_on_whatever_the_number_of_slots(tmp_path: Path) -> None:
    launch, slots = launch_of(tmp_path), 2
    jobs: list[Job] = []
    for number in range(4):
        jobs.append(launch.begin(f"a{number}"))
        leave(jobs[-1], f"member {number}")
        if number >= slots - 1:
            done = number - slots + 1
            launch.manager.end(f"a{done}", told(2, 0.1 * (done + 1)), lost=False)
    assert len({job.folder for job in jobs}) == 4 and not any(job.resume for job in jobs)
    launch.manager.end("a3", told(2, 0.4), lost=False)
    # The first to pause is the first to go on, and is compared with three others.
    assert content(launch.begin("b0")) == "member 3"


def test_scores_are_compared_among_those_that_cost_as_much(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, size=2)
    jobs = [launch.begin("a"), launch.begin("b")]
    for number, job in enumerate(jobs):
        leave(job, f"member {number}")
    launch.manager.end("b", told(2, 0.9), lost=False)
    assert content(launch.begin("b1")) == "member 1", "nobody to compare with"
    launch.manager.end("a", {**told(1, 0.1), "progress": 0.25}, lost=False)
    assert content(launch.begin("a1")) == "member 0", "it has cost less"
    # Epochs of another length end a little beyond the same exchange.
    launch.manager.end("a1", {**told(2, 0.1), "progress": 0.55}, lost=False)
    assert content(launch.begin("a2")) == "member 1"


def test_a_member_copies_from_one_that_waits_to_be_tried_again(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, size=2)
    jobs = halfway(launch, (0.9, 0.1))
    first = launch.begin("b0")
    launch.manager.end("b0", None, lost=True)
    again = launch.begin("b1")
    assert (content(again), lr(first)) == ("member 0", lr(jobs[0]))
    assert lr(again) != lr(jobs[1])


def test_numbers_that_make_no_run_are_not_taken(tmp_path: Path) -> None:
    # 0.3 is the largest that the constraint allows, and the only move downwards leaves the range
    launch = launch_of(tmp_path, size=2, constraints=["optimizer.lr == 0.1"])
    for _ in range(2):
        launch.manager.enqueue({"optimizer.lr": 0.1})
    jobs = halfway(launch, (0.9, 0.1))
    again = [launch.begin("b0"), launch.begin("b1")]
    assert content(again[1]) == "member 0" and lr(again[1]) == lr(jobs[0]) == 0.1


def test_the_same_seed_makes_the_same_exchanges(tmp_path: Path) -> None:
    def rates(folder: str, seed: int) -> list[float]:
        launch = launch_of(tmp_path / folder, seed=seed)
        halfway(launch)
        return [lr(launch.begin(f"b{number}")) for number in range(4)]

    assert rates("one", 1) == rates("two", 1) != rates("three", 2)


def test_a_member_goes_on_after_a_dead_driver_with_the_numbers_it_had(tmp_path: Path) -> None:
    launch = launch_of(tmp_path)
    halfway(launch)
    before = [launch.begin(f"b{number}") for number in range(2)]  # two more are paused
    later = launch.again()
    assert later.manager.recover() == 4
    after = {job.folder: job for job in (later.begin(f"c{number}") for number in range(4))}
    for job in before:
        assert lr(after[job.folder]) == lr(job) and after[job.folder].resume
        assert after[job.folder].until == job.until
    assert content(before[0]) == "member 3"
    assert later.trials(TrialState.WAITING) == []
    assert {t.user_attrs["scores"]["1"][0] for t in later.trials(TrialState.RUNNING)} == {
        0.1,
        0.2,
        0.3,
        0.4,
    }
    assert set(later.store.status.values()) == {"RUNNING"}


@pytest.mark.parametrize("dies_at", range(1, 5))
def test_numbers_and_checkpoint_are_taken_together(tmp_path: Path, dies_at: int) -> None:
    """A driver that dies within an exchange: either both are the donor's, or neither is."""

    class Killed(BaseException):
        pass

    launch = launch_of(tmp_path, size=2)
    calls, armed = 0, False

    def die(name: str) -> None:
        nonlocal calls
        calls += armed
        if calls == dies_at:
            raise Killed(name)

    launch = Launch(launch.folder, launch.store, launch.space, deaths=die)
    jobs, armed = halfway(launch, (0.1, 0.9)), True
    with contextlib.suppress(Killed):
        launch.begin("b0")
    later = launch.again()
    later.manager.recover()
    after = {job.folder: job for job in (later.begin("c0"), later.begin("c1"))}[jobs[0].folder]
    taken = content(after) == "member 1"
    assert taken == (lr(after) != lr(jobs[0]))


@pytest.mark.parametrize(
    ("shape", "value", "allowed"),
    [
        (FloatDistribution(0.1, 1.0), 0.4, {0.5, 0.32}),
        (FloatDistribution(0.1, 1.0), 0.9, {1.0, 0.72}),
        (FloatDistribution(0.1, 1.0, log=True), 0.11, {0.1375, 0.1}),
        (FloatDistribution(0.0, 0.7, step=0.1), 0.7, {0.7, 0.6}),
        (FloatDistribution(0.0, 1.0, step=0.5), 0.5, {1.0, 0.0}),
        (IntDistribution(1, 20), 8, {10, 6}),
        (IntDistribution(1, 20), 1, {1, 2}),
        (IntDistribution(0, 50, step=5), 10, {15, 5}),
        (IntDistribution(0, 10), 0, {0, 1}),
        (CategoricalDistribution(("a", "b")), "a", {"a"}),
    ],
)
def test_a_number_moves_by_the_factor_within_its_bounds_on_its_grid(
    shape: Any, value: Any, allowed: set[Any]
) -> None:
    rules, draw = Population(resample=0.0), random.Random(0)
    moved = {perturbed(value, shape, rules, draw) for _ in range(40)}
    assert sorted(moved) == pytest.approx(sorted(allowed)) if value != "a" else moved == allowed
    if value != "a":
        assert all(shape.low <= one <= shape.high and type(one) is type(value) for one in moved)


@pytest.mark.parametrize(
    "shape",
    [
        FloatDistribution(0.01, 1.0, log=True),
        FloatDistribution(0.0, 0.7, step=0.1),
        IntDistribution(1, 64, log=True),
        IntDistribution(0, 12, step=4),
        CategoricalDistribution((1, 2, 4)),
    ],
)
def test_a_fresh_draw_is_anywhere_in_the_range(shape: Any) -> None:
    rules, draw = Population(resample=1.0), random.Random(0)
    value = shape.choices[0] if isinstance(shape, CategoricalDistribution) else shape.low
    drawn = [perturbed(value, shape, rules, draw) for _ in range(200)]
    assert all(shape._contains(shape.to_internal_repr(one)) for one in drawn)
    assert len(set(drawn)) >= 3


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ("batch_size", {"int": [32, 64]}),
        ("model.width", {"int": [8, 16]}),
        ("algorithm.name", {"choice": ["pgd", "trades"]}),
        ("threat.norm", {"choice": ["linf", "l2"]}),
        ("algorithm", {"choice": ["pgd", "trades"]}),
    ],
)
def test_what_a_checkpoint_is_made_of_may_not_change(path: str, entry: Any) -> None:
    with pytest.raises(RequestError, match=rf"^space\.{path}: pbt changes numbers"):
        check_population(space_of(space={**RATE, path: entry}))


def test_numbers_of_the_optimiser_and_the_attack_may_change() -> None:
    check_population(space_of(space={**RATE, "algorithm.steps": {"int": [1, 10]}}))


def test_a_donor_is_copied_as_it_was_at_the_same_cost_and_epochs_go_on_counting(
    tmp_path: Path,
) -> None:
    # Member 1 trains on before member 0 comes to the exchange; its epochs are shorter, too.
    launch = launch_of(tmp_path, size=2)
    jobs = [launch.begin("a"), launch.begin("b")]
    leave(jobs[1], "one, halfway")
    launch.manager.end("b", {**told(5, 0.9), "progress": 0.5, "final": False}, lost=False)
    launch.begin("b1")
    leave(jobs[1], "one, later")
    launch.manager.row("b1", {**told(7, 0.95), "progress": 0.75, "final": False})
    leave(jobs[0], "zero")
    launch.manager.end("a", {**told(2, 0.1), "progress": 0.5, "final": False}, lost=False)
    again = launch.begin("a1")
    assert content(again) == "one, halfway" and content(jobs[1]) == "one, later"
    # The checkpoint is of epoch 5; what it trains next is this member's third.
    launch.manager.row("a1", {**told(6, 0.92), "progress": 0.6, "final": False})
    assert launch.store.rows["t0000"] == [2, 2, 3], "a row, the note of the exchange, a row"
    later = launch.again()
    later.manager.recover()
    resumed = later.begin("c")
    assert resumed.folder == again.folder and lr(resumed) == lr(again)
    later.manager.row("c", {**told(7, 0.93), "progress": 0.7, "final": False})
    assert later.store.rows["t0000"] == [2, 2, 3, 4]


def test_nothing_is_left_of_old_intervals(tmp_path: Path) -> None:
    launch = launch_of(tmp_path)
    jobs = halfway(launch)
    assert all((Path(job.folder) / "at1-last.pt").is_file() for job in jobs)
    for number in range(4):
        launch.begin(f"b{number}")
        launch.manager.end(f"b{number}", told(4, 0.5), lost=False)
    assert list(launch.folder.glob("trials/*/at*")) == []
