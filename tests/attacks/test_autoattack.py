"""AutoAttack without its waste: the verdicts of the library that holds the authors' loops, at exact cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import TinyNet, ball_of, same, tiny_net, unchecked
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from raytrain.attacks import autoattack as standard
from raytrain.attacks.autoattack import (
    STAGES,
    Standard,
    exact_float32,
    misclassified,
    survivors,
)
from raytrain.attacks.autoattack import counted_model as answers_module
from raytrain.attacks.autoattack.counted_model import CountedModel, fast_copy, folded
from raytrain.attacks.autoattack.fab import project_linf
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.recording import Recorder
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.data.loader import open_test
from raytrain.testing.recorded import RecordedOperations
from raytrain.training.trainer import fit

STEPS, QUERIES = 6, 60
SEED = 3
LIBRARY = {"linf": "Linf", "l2": "L2", "l1": "L1"}
RADII = {"linf": 0.1, "l2": 0.5, "l1": 1.2}
"""At which the network of these tests holds for some digits and falls for others."""


@dataclass(frozen=True)
class Digits:
    """A network that was trained against PGD, with BatchNorm, and test images."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]


@pytest.fixture(scope="module")
def digits() -> Digits:
    values = {
        "data": {"name": "digits", "train_size": 400},
        "model": "small_cnn",
        "threat": {"norm": "linf", "eps": 0.1},
        "algorithm": {"name": "fgsm_rs"},
        "batch_size": 32,
        "epochs": 5,
        "evaluation": {"steps": 1, "every": 5, "images": 50},
        "optimizer": {"lr": 0.1},
        "device": "cpu",
        # With channels last, a row of a product depends on the other rows of the batch by rounding.
        "performance": {"channels_last": False},
    }
    run = RunConfig.model_validate(values)
    with unchecked():
        *_, (_, state) = fit(run, DistributedContext())
    part, _ = open_test(run.data, DistributedContext())
    return Digits(state.model.eval(), part.whole.float() / 255, part.labels)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard version with a few of its steps and queries."""
    of = Standard.of

    def shorter(norm: str, classes: int) -> Standard:
        return replace(of(norm, classes), steps=STEPS, queries=QUERIES)

    monkeypatch.setattr(Standard, "of", staticmethod(shorter))


def answers_of(
    model: nn.Module, meter: Meter | None = None, recorder: Recorder | None = None
) -> CountedModel:
    """As outside tests: a network whose annotations are checked cannot be traced and folded."""
    with unchecked():
        return CountedModel(model, Meter() if meter is None else meter, recorder, largest=60)


def ours(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: AbstractThreatModel,
    stages: tuple[standard.Stage, ...] = STAGES,
    meter: Meter | None = None,
    recorder: Recorder | None = None,
) -> dict[str, Tensor]:
    """Which images survive up to and with each stage."""
    answers = answers_of(model, meter, recorder)
    flags, after = answers.classes(images) == labels, {}
    for stage in stages:
        rows = flags.nonzero().flatten()
        if len(rows):
            left = survivors(stage, answers, images[rows], labels[rows], ball, SEED)
            flags = flags.index_copy(0, rows, left)
        after[stage] = flags
    return after


def theirs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: AbstractThreatModel,
    stages: tuple[str, ...] = STAGES,
    targets: int | None = None,
    short: bool = True,
) -> Tensor:
    """Which images survive the library's own evaluation."""
    with torch.random.fork_rng(devices=[]):
        attack: Any = AutoAttack(model, norm=LIBRARY[ball.norm], eps=ball.eps, seed=SEED)  # pyright: ignore
        attack.attacks_to_run = list(stages)
        for apgd in (attack.apgd, attack.apgd_targeted) if short else ():
            other = APGDAttack(model, n_iter=STEPS, eps=ball.eps, norm=LIBRARY[ball.norm])
            for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
                setattr(apgd, name, getattr(other, name))
        if short:
            attack.fab.n_iter, attack.square.n_queries = STEPS, QUERIES
        if targets is not None:
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        _, found = attack.run_standard_evaluation(images, labels, batch_size=250)
    return found == labels


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize(("norm", "count"), [("linf", 200), ("l2", 30), ("l1", 30)])
def test_the_ensemble_has_the_verdicts_of_the_library(
    digits: Digits, norm: str, count: int
) -> None:
    images, labels = digits.first(count)
    found = ours(digits.model, images, labels, ball_of(norm, RADII[norm]))
    wanted = theirs(digits.model, images, labels, ball_of(norm, RADII[norm]))
    assert torch.equal(found["square"], wanted)
    clean = int((digits.model(images).argmax(1) == labels).sum())
    assert 0.05 * count < int(wanted.sum()) < clean - 0.05 * count


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.slow
def test_every_stage_alone_has_the_verdicts_of_the_library(
    digits: Digits, norm: str, stage: standard.Stage
) -> None:
    images, labels = digits.first(25)
    ball = ball_of(norm, RADII[norm])
    found = ours(digits.model, images, labels, ball, (stage,))[stage]
    wanted = theirs(digits.model, images, labels, ball, (stage,))
    assert torch.equal(found, wanted)
    assert 0 < int(wanted.sum()) < int((digits.model(images).argmax(1) == labels).sum())


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.slow
def test_recorded_passes_change_neither_verdict_nor_cost(digits: Digits, norm: str) -> None:
    images, labels = digits.first(30)
    ball, meters = ball_of(norm, RADII[norm]), (Meter(), Meter())
    recorded, plain = (
        ours(digits.model, images, labels, ball, meter=meter, recorder=recorder)
        for meter, recorder in zip(meters, (RecordedOperations(), None), strict=True)
    )
    assert all(torch.equal(recorded[stage], plain[stage]) for stage in STAGES)
    assert meters[0] == meters[1]


@pytest.mark.slow
def test_the_standard_version_at_full_length_has_the_verdicts_of_the_library(
    digits: Digits,
) -> None:
    images, labels = digits.first(200)
    ball = ball_of("linf", RADII["linf"])
    wanted = theirs(digits.model, images, labels, ball, short=False)
    assert torch.equal(ours(digits.model, images, labels, ball)["square"], wanted)


def unsieved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(standard, "Apgd", APGDAttack)
    patch.setattr(standard, "ApgdTargeted", APGDAttack_targeted)


def unfolded(patch: pytest.MonkeyPatch) -> None:
    """The network as it is, bit for bit."""
    patch.setattr(answers_module, "fast_copy", lambda own, *_: (own, torch.contiguous_format))


def unstopped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(standard, "Fab", lambda answers, ball, **given: FABAttack_PT(answers, **given))


def unskipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(standard, "Square", SquareAttack)


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("without", [unsieved, unfolded, unstopped, unskipped])
@pytest.mark.slow
def test_no_saving_changes_a_verdict(
    digits: Digits, without: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits.first(60)
    ball, saving, plain = ball_of("linf", RADII["linf"]), Meter(), Meter()
    found = ours(digits.model, images, labels, ball, meter=saving)
    without(monkeypatch)
    other = ours(digits.model, images, labels, ball, meter=plain)
    assert all(torch.equal(found[stage], other[stage]) for stage in STAGES)
    assert saving.fe < plain.fe or without is unfolded


def test_batch_norm_is_folded_away_and_the_function_stays(digits: Digits) -> None:
    with unchecked():
        fast = folded(copy.deepcopy(digits.model))
    kinds = {type(module) for module in fast.modules()}
    assert nn.BatchNorm2d in {type(module) for module in digits.model.modules()}
    assert nn.BatchNorm2d not in kinds and nn.Conv2d in kinds
    images, _ = digits.first(50)
    with torch.no_grad():
        exact, found = copy.deepcopy(digits.model).double()(images.double()), fast(images)
    assert float((found - exact).abs().max()) < 1e-4 * float(exact.abs().max())


class Viewing(nn.Module):
    """Takes its activations for rows, which channels that lie innermost do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 3, 3), nn.Linear(108, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu()
        return self.linear(h.view(len(h), -1))


@pytest.mark.parametrize("kind", [Viewing, TinyNet])
def test_channels_lie_innermost_where_the_network_takes_it(kind: type[nn.Module]) -> None:
    model = kind().float().eval()
    answers = answers_of(model)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(answers(images), model(images), atol=1e-6)
    layout = torch.contiguous_format if kind is Viewing else torch.channels_last
    assert answers._layout is layout
    moved = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(answers(moved).square().sum(), moved)
    plain = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(plain).square().sum(), plain)
    assert torch.allclose(grad, wanted, atol=1e-5)


class Tied(nn.Module):
    """One convolution and one BatchNorm, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.linear = nn.Linear(64, 5)
        nn.init.constant_(self.bn.running_var, 0.05)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.bn(self.conv(x)).relu()
        return self.linear(x.flatten(1))


class Typed(nn.Module):
    """What is traced is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x.flatten(1) - 0.5) / 0.1 if type(x) is Tensor else x.flatten(1))


class Apart(nn.Module):
    """Channels as images of their own, which a single image allows in every layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 1, 3)
        self.linear = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        n, c, height, width = h.shape
        return self.linear(self.one(h.view(n * c, 1, height, width)).view(n, c * 36))


class Overwriting(nn.Module):
    """Normalises the images where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.sub_(0.5).flatten(1))


def test_a_copy_is_asked_about_the_images_that_the_network_was_asked_about() -> None:
    model, images = Overwriting().eval(), torch.rand(4, 1, 8, 8)
    before = images.clone()
    fast, layout = fast_copy(model, folded(model), images)
    assert torch.equal(images, before) and layout is torch.channels_last
    with torch.no_grad():
        assert torch.allclose(fast(images.clone()), model(images.clone()), atol=1e-6)


@pytest.mark.parametrize("kind", [Tied, Typed, Apart])
def test_a_copy_that_is_another_function_is_not_attacked(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    answers = answers_of(model)
    with torch.no_grad():
        answers(images[:1])
        assert torch.allclose(answers(images), model(images), atol=1e-5)
    if kind in (Tied, Typed):  # what tracing alone would have made of it
        with torch.no_grad():
            other = folded(copy.deepcopy(model))
            assert not torch.allclose(other(images), model(images), atol=1e-3)


class Branching(TinyNet):
    """No tracer follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.mean() < 2) else self.linear(x)


@pytest.mark.usefixtures("fewer")
def test_a_network_that_cannot_be_traced_is_attacked_as_it_is(digits: Digits) -> None:
    images, labels = digits.first(40)
    plain, branching = tiny_net(torch.float32), Branching()
    branching.load_state_dict(plain.state_dict())
    assert folded(branching) is branching
    kept = labels < 4
    images, labels = images[kept], plain(images[kept]).argmax(1)
    ball = ball_of("linf", 0.02)
    found, other = (ours(model, images, labels, ball) for model in (plain, branching))
    assert all(torch.equal(found[stage], other[stage]) for stage in STAGES)
    assert 0 < int(found["square"].sum()) < len(images)


# --- few classes ------------------------------------------------------------------------------


ALIKE = torch.tensor([8, 1, 9, 3, 5])


class Some(nn.Module):
    """The logits of the first of these digits alone."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, ALIKE[: self.classes]]


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize(
    ("norm", "classes"), [("linf", 2), ("linf", 3), ("linf", 4), ("linf", 5), ("l1", 3)]
)
@pytest.mark.slow
def test_few_classes_run_every_stage_with_as_many_targets_as_there_are(
    digits: Digits, norm: str, classes: int
) -> None:
    model = Some(digits.model, classes)
    rows, labels = (digits.labels[:, None] == ALIKE[:classes]).nonzero()[:30].unbind(1)
    images, ball = digits.images[rows], ball_of(norm, 2 * RADII[norm])
    for stage in STAGES:
        found = ours(model, images, labels, ball, (stage,))[stage]
        assert int(found.sum()) < len(images)
        if stage == "apgd-t" and classes < 4:
            continue  # the library divides by the fourth logit
        wanted = theirs(model, images, labels, ball, (stage,), targets=classes - 1)
        assert torch.equal(found, wanted), stage


def test_there_are_never_more_targets_than_other_classes() -> None:
    for norm, most in (("linf", 9), ("l2", 9), ("l1", 5)):
        targets = [Standard.of(norm, classes).targets for classes in (2, 3, 5, 10, 100)]
        assert targets == [1, 2, 4, min(9, most), most]
        fab = [Standard.of(norm, classes).fab_targets for classes in (2, 3, 5, 10, 100)]
        assert fab == [1, 2, 4, 9, 9]


# --- Square -----------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A network that remembers what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.extend(x.detach().clone())
        return self.model(x)


def square_runs(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, queries: int
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Meter]:
    """What the library and what we ask of the same network for one image, and both results."""
    unfolded(monkeypatch)
    images, labels = digits.first(30)
    right = (digits.model(images).argmax(1) == labels).nonzero().flatten()
    image, label = images[right[:1]], labels[right[:1]]
    common: dict[str, Any] = {"n_queries": queries, "eps": 0.03, "resc_schedule": False}
    asked, results, meter = [], [], Meter()
    for kind in (SquareAttack, standard.Square):
        recorded = Recorded(digits.model)
        answers = CountedModel(recorded, meter) if kind is standard.Square else recorded
        attack = kind(answers, norm="Linf", seed=SEED, **common)
        attack.init_hyperparam(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            results.append(attack.attack_single_run(image, label)[1])
        # CountedModel attacks a copy of the network.
        asked.append(answers._own.asked if isinstance(answers, CountedModel) else answers.asked)
    return asked[0], asked[1], results[0], results[1], meter


def test_square_ends_at_the_same_image_bit_for_bit_and_skips_only_what_it_has_asked(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = 600
    library, here, wanted, found, meter = square_runs(digits, monkeypatch, queries)
    assert torch.equal(found, wanted)
    assert len(library) == queries + 1  # nothing breaks this image
    left, seen, skipped = iter(here), set(), 0
    following = next(left)
    for image in library:
        key = image.numpy().tobytes()
        if following is not None and torch.equal(image, following):
            following = next(left, None)
        else:
            assert key in seen  # its margin is known, and was no improvement when it was asked
            skipped += 1
        seen.add(key)
    assert following is None
    assert 0 < skipped == len(library) - len(here)
    assert meter.forwards == len(here) and meter.input_backwards == 0


def test_square_ends_at_the_same_images_where_some_are_broken(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfolded(monkeypatch)
    images, labels = digits.first(80)
    rows = (digits.model(images).argmax(1) == labels).nonzero().flatten()
    images, labels = images[rows], labels[rows]
    found = []
    for kind in (SquareAttack, standard.Square):
        predict = digits.model if kind is SquareAttack else CountedModel(digits.model, Meter())
        attack = kind(predict, n_queries=150, eps=0.1, seed=SEED, resc_schedule=False)  # pyright: ignore
        attack.init_hyperparam(images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            found.append(attack.attack_single_run(images, labels)[1])
    assert torch.equal(*found)
    broken = int((digits.model(found[0]).argmax(1) != labels).sum())
    assert 0 < broken < len(images)


# --- cost -------------------------------------------------------------------------------------


class Slight(nn.Module):
    """Ten classes; logits of slope 1e-4 that no perturbation turns."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        self.slopes = nn.Parameter(1e-4 * rows)
        self.register_buffer("offset", -torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.slopes.T + self.offset


ONE_RUN = STEPS + 1  # gradients of one APGD run
COSTS = {  # per image, forwards and input backwards, without the two passes that frame a stage
    "apgd-ce": (1 + ONE_RUN, ONE_RUN),
    "apgd-t": (1 + 9 * (1 + ONE_RUN), 9 * ONE_RUN),
    # of each target: a look at the clean image, a gradient and a look per step, one at the end
    "fab-t": (1 + 9 * (2 + 2 * STEPS), 9 * STEPS),
}


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("stage", COSTS)
def test_a_stage_costs_what_its_steps_and_targets_say(stage: standard.Stage) -> None:
    meter, count = Meter(), 7
    images, labels = torch.full((count, 1, 8, 8), 0.5), torch.zeros(count, dtype=torch.long)
    left = survivors(stage, CountedModel(Slight(), meter), images, labels, ball_of("linf"), SEED)
    assert bool(left.all())
    forwards, backwards = COSTS[stage]
    # One image tells the number of classes; the network's own verdict is one pass of each.
    assert meter.forwards == 1 + count * (forwards + 1)
    assert meter.input_backwards == count * backwards
    assert meter.full_backwards == 0


@pytest.mark.usefixtures("fewer")
def test_square_of_a_network_that_holds_costs_a_pass_per_query_at_most() -> None:
    def forwards(norm: str) -> int:
        meter = Meter()
        images, labels = torch.full((3, 1, 10, 10), 0.5), torch.zeros(3, dtype=torch.long)
        model = nn.Sequential(nn.AvgPool2d(3, padding=1, stride=1), nn.AdaptiveAvgPool2d(8))
        answers = CountedModel(nn.Sequential(model, Slight()), meter)
        assert bool(survivors("square", answers, images, labels, ball_of(norm), SEED).all())
        return meter.forwards

    frame = 1 + 3 * (1 + 1 + 1 + 1)  # classes; of each: clean, stripes, at the end, own verdict
    assert forwards("l2") == frame + 3 * QUERIES
    assert frame < forwards("linf") < frame + 3 * QUERIES


class Brittle(nn.Module):
    """Class 0 for plain grey, class 1 for all else."""

    def forward(self, x: Tensor) -> Tensor:
        off = (x - 0.5).abs().flatten(1).sum(1)
        return torch.stack([torch.zeros_like(off), off - 1e-3, off - 2, off - 3, off - 4], 1)


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_that_falls_to_the_first_attempt_costs_no_further_pass(norm: str) -> None:
    meter, count = Meter(), 4
    images, labels = torch.full((count, 1, 8, 8), 0.5), torch.zeros(count, dtype=torch.long)
    left = survivors(
        "apgd-ce", CountedModel(Brittle(), meter), images, labels, ball_of(norm), SEED
    )
    assert not left.any()
    assert (meter.forwards, meter.input_backwards) == (1 + 4 * count, count)


class TwoSides(nn.Module):
    """Class 0 where the mean pixel is below 0.505, class 1 above; three more that are never seen."""

    def forward(self, x: Tensor) -> Tensor:
        off = x.flatten(1).mean(1) - 0.505
        never = torch.full_like(off, -9.0)
        return torch.stack([-off, off, never, never, never], 1)


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("norm", RADII)
def test_an_image_that_falls_to_the_first_step_of_fab_costs_no_further_pass(norm: str) -> None:
    meter, count = Meter(), 4
    images, labels = torch.full((count, 1, 8, 8), 0.5), torch.zeros(count, dtype=torch.long)
    # The boundary is 0.005 away in l-inf, 0.04 in l2 and 0.32 in l1.
    left = survivors(
        "fab-t", CountedModel(TwoSides(), meter), images, labels, ball_of(norm, 0.4), SEED
    )
    assert not left.any()
    # Of each: right at first, the target, the gradient, the look, that look judged, right at the
    # end, judged at the end. One image tells the number of classes.
    assert (meter.forwards, meter.input_backwards) == (1 + 7 * count, count)


class TwoWays(nn.Module):
    """Class 1 wins above a mean pixel of 0.505, if the network is `open` to it; class 2 below 0.49."""

    def __init__(self, is_open: bool) -> None:
        super().__init__()
        self.off = -1e-6 if is_open else 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        first = (mean - 0.505).clamp(max=0.0) - self.off
        zero, never = torch.zeros_like(mean), torch.full_like(mean, -9.0)
        return torch.stack([zero, first, 0.49 - mean, never, never], 1)


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("stage", ["apgd-t", "fab-t"])
def test_where_only_the_copy_is_deceived_other_targets_are_tried(stage: standard.Stage) -> None:
    images, labels = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    for own in (TwoWays(True), TwoWays(False)):
        answers = CountedModel(TwoWays(True), Meter())
        answers._own, answers._fast = own, TwoWays(True)
        left = survivors(stage, answers, images, labels, ball_of("linf", 0.1), SEED)
        assert not left.any()


@pytest.mark.usefixtures("fewer")
def test_square_goes_on_where_only_the_copy_is_deceived() -> None:
    images, labels = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.long)
    meter = Meter()
    answers = CountedModel(Slight(), meter)
    answers._fast = TwoSides()  # is deceived at once by most stripes
    left = survivors("square", answers, images, labels, ball_of("linf", 0.1), SEED)
    assert left.all() and meter.forwards > 20


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("norm", RADII)
def test_logits_that_are_all_equal_end_no_evaluation(norm: str) -> None:
    class Equal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True) * torch.zeros(1, 5)

    images, labels = torch.rand(3, 1, 10, 10), torch.zeros(3, dtype=torch.long)
    for stage in STAGES:
        answers = CountedModel(Equal(), Meter())
        assert survivors(stage, answers, images, labels, ball_of(norm), SEED).all()


def test_a_projection_that_rounds_stays_among_the_pixels() -> None:
    points, w = torch.tensor([[0.581, 0.684, 0.869, 0]]), torch.tensor([[0.66, 0.39, 0.23, 1e-9]])
    b = torch.tensor([1.2799999713897705])
    found = project_linf(points, w, b)
    assert bool((points + found >= 0).all() and (points + found <= 1).all())
    assert torch.allclose(found, projection_linf(points, w, b), atol=1e-5)


@pytest.mark.parametrize("pixels", [1, 2, 64, 300])
@pytest.mark.parametrize("far", [0.0, 0.01, 0.1, 0.5, 3.0])
def test_the_projection_without_sorting_is_the_library_s(pixels: int, far: float) -> None:
    generator = torch.Generator().manual_seed(pixels)
    points = torch.rand(50, pixels, generator=generator)
    points[points < 0.2] = 0  # at the edge there is no room
    w = torch.randn(50, pixels, generator=generator)
    w[:, 1::7] = 0
    b = (w * points).sum(1) + far * torch.randn(50, generator=generator) * w.abs().sum(1)
    found, wanted = project_linf(points, w, b), projection_linf(points, w, b)
    assert torch.allclose(found, wanted, atol=2e-6, rtol=0)
    assert bool((points + found >= 0).all() and (points + found <= 1).all())
    missed = ((w * (points + found)).sum(1) - b).abs()
    moved_all = (torch.where(found > 0, 1 - points, points) - found.abs() < 1e-6) | (w == 0)
    assert bool(((missed < 1e-4 * pixels) | moved_all.all(1)).all())
    assert bool((missed < 1e-4 * pixels).any()) or far >= 3


def test_a_projection_on_no_hyperplane_moves_nothing() -> None:
    points = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    for b in (torch.zeros(4), torch.ones(4)):
        assert not project_linf(points, torch.zeros(4, 6), b).any()
    broken = project_linf(points, torch.full((4, 6), torch.nan), torch.zeros(4))
    assert broken.shape == points.shape  # and it ends


# --- what an evaluation leaves as it was -------------------------------------------------------


@pytest.fixture
def precisions() -> Iterator[None]:
    """All that may make float32 less than it says, restored afterwards."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.usefixtures("fewer", "precisions")
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_flags_and_random_state_are_as_before(digits: Digits, matmul: str, cudnn: bool) -> None:
    images, labels = digits.first(20)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    state = torch.get_rng_state()
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    survivors("apgd-ce", answers_of(digits.model), images, labels, ball_of("linf"), SEED)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 == cudnn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("fewer")
def test_verdicts_do_not_depend_on_the_random_state_or_on_autocast_outside(
    digits: Digits,
) -> None:
    images, labels = digits.first(40)
    ball = ball_of("linf", RADII["linf"])
    answers = answers_of(digits.model)
    wanted = survivors("apgd-ce", answers, images, labels, ball, SEED)
    torch.manual_seed(99)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(survivors("apgd-ce", answers, images, labels, ball, SEED), wanted)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stage", STAGES)
def test_the_network_keeps_weights_gradients_mode_and_precision(
    dtype: torch.dtype, stage: standard.Stage
) -> None:
    model = tiny_net(dtype, batch_norm=True).train()
    before = copy.deepcopy(model)
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    labels = model.eval()(images).argmax(1)
    model.train()
    survivors(stage, CountedModel(model, Meter()), images, labels, ball_of("linf", 0.03), SEED)
    assert same(model, before) and model.training and model.norm.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_every_answer_is_float32(digits: Digits) -> None:
    wide = copy.deepcopy(digits.model).double()
    images, _ = digits.first(3)
    with torch.no_grad():
        found = answers_of(wide)(images)
        assert found.dtype == torch.float32
        assert torch.equal(found, answers_of(digits.model)(images))


# --- legality ---------------------------------------------------------------------------------


class Moved(nn.Module):
    """Class 0 for 0.2-grey images, class 1 for all else, NaN included."""

    def forward(self, x: Tensor) -> Tensor:
        same = ((x - 0.2).abs().flatten(1).amax(1) == 0).to(x.dtype)
        return torch.stack([same, 1 - same], 1)


@pytest.mark.parametrize("norm", RADII)
def test_an_image_outside_the_ball_or_the_box_is_no_success(norm: str) -> None:
    found = torch.full((7, 1, 2, 2), 0.2)
    inside, outside, edge, low, high, nan, far = found.flatten(1)
    inside[0] += 0.05
    outside[0] += 0.101
    edge[0] = 0.3  # one rounding of float32 away from the radius
    low[0], high[0] = -0.01, 1.01
    nan[0] = torch.nan
    far[:] = torch.inf
    images, labels = torch.full_like(found, 0.2), torch.zeros(len(found), dtype=torch.long)
    answers = CountedModel(Moved(), Meter())
    success = misclassified(found, answers, images, labels, ball_of(norm, 0.1))
    assert success.tolist() == [True, False, True, False, False, False, False]


def test_the_box_counts_where_the_ball_is_wide() -> None:
    images, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    found = images.clone()
    found[0, 0, 0, 0], found[1, 0, 0, 0] = -0.05, 0.05

    class AnyChange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            off = x.abs().flatten(1).sum(1)
            return torch.stack([torch.zeros_like(off), off - 1e-3], 1)

    answers = CountedModel(AnyChange(), Meter())
    success = misclassified(found, answers, images, labels, ball_of("linf", 0.1))
    assert success.tolist() == [False, True]
