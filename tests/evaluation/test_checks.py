"""Checks before belief: each broken defence is caught by its own check, and no honest model is."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from helpers import ball_of, generator, tiny_net
from scipy.fft import dct
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.data.digits import read_digits
from raytrain.evaluation.checks import (
    Finding,
    after,
    batch,
    before_belief,
    black_box,
    falls_with_eps,
    large_eps,
    modes,
    more_steps,
    pixel_range,
    probabilities,
    randomised,
    under_noise,
    zero_gradients,
)
from raytrain.evaluation.checks.attacked import largest_rise, survivors
from raytrain.evaluation.checks.probe import still
from raytrain.evaluation.validation import Evaluation
from raytrain.training.trainer import fit

NAMES = [
    "range",
    "modes",
    "randomised",
    "batch",
    "probabilities",
    "zero_gradients",
    "falls_with_eps",
    "large_eps",
    "more_steps",
]
SMALL = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
"""Radii at which a robust model of digits keeps most images and a natural one few."""


@lru_cache(maxsize=2)
def digits(split: str) -> tuple[Tensor, Tensor]:
    found = read_digits("train" if split == "train" else "test")
    return found.whole.float() / 255, found.labels


@lru_cache(maxsize=2)
def trained(algorithm: str) -> nn.Module:
    """A small network after a few epochs on real digits: near 97 %, natural or robust."""
    changes = {"natural": {"epochs": 3}, "pgd": {"epochs": 4}}[algorithm]
    values = {
        "data": {"name": "digits", "validation": 60},
        "model": "small_cnn",
        "algorithm": {"name": algorithm} | ({"steps": 3} if algorithm == "pgd" else {}),
        "batch_size": 64,
        "evaluation": {"steps": 1, "every": 9},
        "device": "cpu",
    }
    *_, (_, state) = fit(RunConfig.model_validate({**values, **changes}), DistributedContext())
    state.model.zero_grad(set_to_none=True)
    return state.model.eval()


def linear(features: nn.Module) -> nn.Module:
    """Logistic regression on fixed features of real digits, as a network."""
    images, labels = digits("train")
    with torch.no_grad():
        rows = features(images).double().numpy()
    found = LogisticRegression(C=0.5, tol=1e-2, max_iter=1000).fit(rows, labels.numpy())
    layer = nn.Linear(rows.shape[1], 10)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(found.coef_))
        layer.bias.copy_(torch.from_numpy(found.intercept_))
    return nn.Sequential(features, layer).eval()


class Map(nn.Module):
    """A function as a module, before or after a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def before(function: Callable[[Tensor], Tensor], model: nn.Module) -> nn.Module:
    return nn.Sequential(Map(function), model).eval()


def behind(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(model, Map(function)).eval()


def far(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Whether each image is further than `radius` (l2) from every test image, and the nearest one."""
    known = digits("test")[0].flatten(1)
    distance, nearest = torch.cdist(x.flatten(1).detach(), known).min(1)
    return (distance > radius).view(-1, 1, 1, 1), known[nearest].view_as(x)


def findings(
    model: nn.Module, ball: AbstractThreatModel | None = None, seed: int = 0, num: int = 64
) -> dict[str, Finding]:
    images, labels = some(num)
    found = before_belief(model, images, labels, ball or ball_of("linf", 0.1), seed)
    return {finding.check: finding for finding in found}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if not finding.passed}


def some(num: int = 128) -> tuple[Tensor, Tensor]:
    images, labels = digits("test")
    return images[:num], labels[:num]


# ---------------------------------------------------------------- honest models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "norm"), [("natural", "linf"), ("natural", "l2"), ("pgd", "linf"), ("pgd", "l1")]
)
def test_an_honestly_trained_network_passes_everything(algorithm: str, norm: str) -> None:
    found = findings(trained(algorithm), ball_of(norm, SMALL[norm]), num=397)
    assert list(found) == NAMES
    assert failed(found) == set(), found


def test_an_undefended_network_that_an_attack_breaks_on_every_image_passes() -> None:
    images, labels = digits("test")
    ball = ball_of("linf", 0.4)
    (flags,) = survivors(trained("natural"), images, labels, ball, [Evaluation(steps=20)], 0)
    assert not flags.any()
    assert failed(findings(trained("natural"), ball)) == set()


@pytest.mark.parametrize("scale", [1, 10])
def test_a_linear_model_passes_everything(scale: int) -> None:
    """Also with margins of 60 nats, where float32 rounds the probabilities to 0 and 1."""
    images, _ = some()
    model = behind(linear(nn.Flatten()), lambda z: scale * z)
    assert (float((model(images).softmax(1) == 1).any(1).float().mean()) > 0.5) == (scale > 1)
    assert failed(findings(model)) == set()


def test_a_network_that_collapsed_to_one_class_is_told_and_not_accused() -> None:
    model = behind(trained("natural"), lambda z: 0 * z + torch.eye(10)[3])
    found = findings(model)
    assert failed(found) == {"probabilities"}  # the row of an identity matrix is a distribution
    assert "one class" in found["large_eps"].sentence and found["large_eps"].value > 0.05


# ---------------------------------------------------------------- a deterministic map to logits


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda x: 255 * x, "divide 0..255 by 255"),
        (lambda x: (x - 0.5) / 0.25, "as if normalised"),
        (lambda x: x / 255, "twice"),
        (lambda x: x / x, "not finite"),
    ],
)
def test_images_in_another_unit_are_told_and_nothing_else_is_measured(
    change: Callable[[Tensor], Tensor], hint: str
) -> None:
    images, labels = some()
    found = before_belief(trained("natural"), change(images), labels, ball_of("linf"), 0)
    assert [finding.check for finding in found] == ["range", "modes"]
    assert not found[0].passed and hint in found[0].sentence
    assert pixel_range(images).passed and pixel_range(torch.zeros(1, 1, 2, 2)).passed


def test_layers_left_in_training_mode_are_named() -> None:
    model = tiny_net(batch_norm=True, dropout=0.3)
    assert modes(model.eval()).passed
    model.dropout.train()
    found = modes(model)
    assert not found.passed and "the first is dropout;" in found.sentence and found.value == 1
    found = modes(model.train())
    assert "the first is norm;" in found.sentence and found.value == 2
    assert modes(tiny_net(dropout=0.0).train()).passed  # nothing there that has modes
    assert modes(nn.InstanceNorm2d(1).train()).passed


def test_other_checks_run_in_eval_mode_so_one_fault_is_one_finding() -> None:
    model = trained("natural").train()
    try:
        assert failed(findings(model)) == {"modes"}
    finally:
        model.eval()


@pytest.mark.parametrize(
    "disturb",
    [
        lambda x: x + 0.05 * torch.randn_like(x),
        lambda x: x + 0.05 * torch.from_numpy(np.random.randn(*x.shape)).float(),
        lambda x: torch.roll(x, random.choice([-1, 0, 1]), 3),
        lambda x: nn.functional.interpolate(
            nn.functional.interpolate(x, size=random.randint(6, 9)), size=8
        ),
        lambda x: torch.dropout(x, 0.1, train=True),
    ],
    ids=["torch noise", "numpy noise", "random shift", "random resize", "dropout"],
)
def test_a_randomised_defence_is_caught(disturb: Callable[[Tensor], Tensor]) -> None:
    images, _ = some()
    found = randomised(before(disturb, trained("natural")), images, 0)
    assert not found.passed and found.value > 1e-3 and "EOT" in found.sentence
    assert randomised(trained("natural"), images, 0).value == 0


def test_statistics_of_the_batch_are_caught() -> None:
    """BatchNorm without running statistics uses the batch's in eval mode too."""
    images, _ = some()
    norm = nn.BatchNorm2d(1, affine=False, track_running_stats=False)
    found = batch(nn.Sequential(norm, trained("natural")).eval(), images, 0)
    assert not found.passed and found.value > 0.01
    assert batch(trained("natural"), images, 0).passed
    one = batch(nn.Sequential(norm, trained("natural")).eval(), images[:1], 0)
    assert not one.passed  # a single image too: it gets company


def test_a_randomised_model_is_not_accused_of_depending_on_its_batch() -> None:
    found = findings(before(lambda x: x + 0.02 * torch.randn_like(x), trained("natural")))
    assert "randomised" in failed(found) and "batch" not in found


def test_probabilities_and_their_logarithms_are_caught() -> None:
    images, _ = some()
    model = trained("natural")
    plain = probabilities(behind(model, lambda z: z.softmax(1)), images, 0)
    logs = probabilities(behind(model, lambda z: z.log_softmax(1)), images, 0)
    assert not plain.passed and "answers probabilities" in plain.sentence
    assert not logs.passed and "answers log-probabilities" in logs.sentence
    half = behind(model, lambda z: z.softmax(1).half())
    assert not probabilities(half, images, 0).passed
    assert probabilities(model, images, 0).passed
    assert probabilities(behind(model, lambda z: z.sigmoid()), images, 0).passed


# ---------------------------------------------------------------- gradients


def jpeg_like(x: Tensor) -> Tensor:
    """The cosine transform of the whole image, rounded to a coarse grid, and back."""
    basis = torch.from_numpy(dct(np.eye(8), norm="ortho", axis=0)).to(x)
    coarse = torch.round((basis @ x @ basis.T) / 0.2) * 0.2
    return basis.T @ coarse @ basis


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: torch.round(4 * x) / 4,
        lambda x: (torch.sign(x - 0.5) + 1) / 2,
        jpeg_like,
        lambda x: x.detach(),
        lambda x: torch.from_numpy(np.rint(8 * x.detach().numpy()) / 8),
    ],
    ids=["quantised", "binarised", "jpeg", "detached", "numpy"],
)
def test_a_defence_that_masks_gradients_is_caught(mask: Callable[[Tensor], Tensor]) -> None:
    found = zero_gradients(before(mask, trained("natural")), *some(), 0)
    assert not found.passed and found.value == 1
    assert "masks its gradients" in found.sentence


def test_a_masked_defence_goes_through_all_checks_and_fails_no_unrelated_one() -> None:
    found = findings(before(lambda x: x.detach(), trained("natural")))
    assert list(found) == NAMES
    assert {"zero_gradients"} <= failed(found) <= {"zero_gradients", "large_eps"}


def test_sign_activations_are_caught() -> None:
    weight = torch.randn(64, 100, generator=generator(0))
    model = linear(Map(lambda x: torch.sign(x.flatten(1) @ weight)))
    found = zero_gradients(model, *some(), 0)
    assert not found.passed and found.value == 1 and "masks" in found.sentence


def test_a_rounding_with_a_smooth_stand_in_has_gradients() -> None:
    """The straight-through estimator of BPDA: the same logits, and nothing hidden."""
    model = before(lambda x: x + (jpeg_like(x) - x).detach(), trained("natural"))
    assert zero_gradients(model, *some(), 0).value == 0


def test_logits_that_saturate_the_softmax_are_told_from_masked_ones() -> None:
    model = behind(trained("natural"), lambda z: 1e4 * z)
    found = zero_gradients(model, *some(), 0)
    assert not found.passed and found.value > 0.9 and "saturate" in found.sentence


def test_a_gradient_that_is_no_number_counts_as_none() -> None:
    """x^(1/2) has an infinite slope at the black pixels of every digit."""
    found = zero_gradients(before(lambda x: x.sqrt(), trained("natural")), *some(), 0)
    assert not found.passed and found.value == 1


def test_one_image_without_a_gradient_is_not_enough_and_two_of_many_are() -> None:
    images, labels = some()
    right = (trained("natural")(images).argmax(1) == labels).nonzero().flatten()

    def masking(count: int) -> nn.Module:
        marked = images[right[:count]].flatten(1)

        def cut(x: Tensor) -> Tensor:
            known = (x.detach().flatten(1)[:, None] == marked).all(2).any(1)
            return torch.where(known.view(-1, 1, 1, 1), x.detach(), x)

        return before(cut, trained("natural"))

    assert zero_gradients(masking(1), images, labels, 0).passed
    found = zero_gradients(masking(2), images, labels, 0)
    assert not found.passed and found.value == 2 / len(right)


# ---------------------------------------------------------------- attacks with more room and steps


def test_survivors_of_an_affine_model_have_the_closed_form() -> None:
    """Two classes and grey images: an image falls exactly if eps |w|_1 exceeds its margin."""
    weight = torch.randn(16, generator=generator(1), dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(64, 1, 4, 4, generator=generator(2), dtype=torch.float64)
    scores = images.flatten(1) @ weight - 0.5 * weight.sum()

    def logits(x: Tensor) -> Tensor:
        score = x.flatten(1) @ weight - 0.5 * weight.sum()
        return torch.stack([-score, score], 1)

    labels = (scores > 0).long()
    eps = float(scores.abs().mean() / weight.abs().sum())
    (flags,) = survivors(
        Map(logits), images, labels, ball_of("linf", eps), [Evaluation(steps=10)], 0
    )
    assert (torch.from_numpy(flags) == (scores.abs() > eps * weight.abs().sum())).all()
    assert 0 < flags.sum() < 64


def test_a_rise_counts_when_chance_makes_it_once_in_a_hundred() -> None:
    """Eight of eight coin tosses have p = 2 / 2^8 = 0.0078, seven 0.0156; three pairs need Holm."""
    low, high = np.zeros(100, bool), np.arange(100)
    assert largest_rise([low, high < 8]) == (0.08, True)
    assert largest_rise([low, high < 7]) == (0.07, False)
    assert largest_rise([high < 50, high < 20]) == (0.0, False)
    assert largest_rise([low, low, high < 8]) == (0.08, False)
    assert largest_rise([low, low, high < 10]) == (0.1, True)


def test_an_attack_that_is_blocked_far_from_the_data_is_caught() -> None:
    """Images far from the known ones are replaced by the nearest: small eps works, large does not."""

    def purify(x: Tensor) -> Tensor:
        distant, nearest = far(x, 1.6)
        return torch.where(distant, nearest, x)

    images, labels = some()
    model, ball = before(purify, trained("natural")), ball_of("linf", 0.15)
    found = falls_with_eps(model, images, labels, ball, 0)
    assert not found.passed and found.value > 0.2 and "rises with eps" in found.sentence
    found = large_eps(model, images, labels, ball, 0)
    assert not found.passed and found.value > 0.2 and "grey" in found.sentence
    assert zero_gradients(model, images, labels, 0).passed  # there is one at the images themselves


def test_gradients_that_mislead_many_short_steps_are_caught() -> None:
    """Beyond a distance the gradient points back: one long step is through before it does."""

    def treacherous(x: Tensor) -> Tensor:
        distant, _ = far(x, 0.8)
        return torch.where(distant, 2 * x.detach() - x, x)

    images, labels = some()
    model, ball = before(treacherous, trained("natural")), ball_of("linf", 0.15)
    found = more_steps(model, images, labels, ball, 0)
    assert not found.passed and found.value > 0.1 and "rises with PGD's steps" in found.sentence
    assert torch.equal(model(images), trained("natural")(images))


def test_at_no_radius_nothing_rises_and_nothing_is_accused() -> None:
    found = findings(trained("natural"), ball_of("linf", 0.0))
    assert failed(found) == set()
    for name, by in (("falls_with_eps", "eps"), ("more_steps", "PGD's steps")):
        assert f"does not rise with {by}" in found[name].sentence and found[name].value == 0


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("images", "broken", "passed"),
    [(100, 1, True), (100, 2, False), (1000, 2, True), (1000, 3, False), (10_000, 20, True)],
)
def test_a_black_box_may_break_two_in_a_thousand_and_always_one(
    images: int, broken: int, passed: bool
) -> None:
    white = np.arange(images) < images // 2
    black = np.arange(images) >= broken
    (found,) = after(white, {"Square": black})
    assert found.check == "black_box" and found.passed == passed
    assert found.value == broken / images and f"Square {broken}" in found.sentence
    assert ("too weak, or the gradients mislead" in found.sentence) != passed


def test_images_that_two_black_boxes_break_count_once_and_fallen_ones_not_at_all() -> None:
    white = np.array([True] * 8 + [False] * 2)
    square = np.array([False] * 3 + [True] * 5 + [False] * 2)
    noise = np.array([True] + [False] * 3 + [True] * 6)
    assert black_box(white, {"Square": square, "noise": noise}).value == 0.4
    assert black_box(white, {}).passed
    with pytest.raises(RequestError, match="found 10, 3"):
        black_box(white, {"Square": square[:3]})


def test_noise_breaks_what_masked_gradients_hide_and_nothing_of_an_honest_model() -> None:
    images, labels = digits("test")
    ball, honest = ball_of("linf", 0.3), trained("natural")
    masked = before(lambda x: torch.round(16 * x) / 16, honest)  # digits are on this grid
    for model, passed in ((honest, True), (masked, False)):
        (white,) = survivors(model, images, labels, ball, [Evaluation(steps=10)], 0)
        noise = under_noise(model, images, labels, ball, 0)
        assert black_box(white, {"noise": noise}).passed == passed


def test_noise_that_goes_nowhere_leaves_the_clean_results() -> None:
    images, labels = digits("test")
    flags = under_noise(trained("natural"), images, labels, ball_of("l2", 0.0), 0, draws=1)
    right = trained("natural")(images).argmax(1) == labels
    assert (torch.from_numpy(flags) == right).all()


# ---------------------------------------------------------------- what is left behind


class Diary(nn.Module):
    """A defence that draws from every generator, counts its calls in a buffer, and remembers sizes."""

    calls: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        noise = random.random() + np.random.random() + torch.rand(())
        return self.model(x + 0.01 * noise)


def states_of_generators() -> tuple[object, ...]:
    _, numbers, *context = np.random.get_state(legacy=True)
    return torch.get_rng_state().tolist(), list(numbers), context


@pytest.mark.slow
def test_a_model_is_left_as_it_was_and_so_are_all_generators() -> None:
    model = Diary(trained("natural")).eval()
    model.dropout.train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    modes_before = [module.training for module in model.modules()]
    states = {name: value.clone() for name, value in model.state_dict().items()}
    generators = states_of_generators()
    found = findings(model)
    assert {"modes", "randomised"} <= failed(found)
    assert [module.training for module in model.modules()] == modes_before
    assert all(torch.equal(states[name], value) for name, value in model.state_dict().items())
    assert states_of_generators() == generators
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    first.grad = None
    assert max(model.sizes) <= 256  # 128 images, and their company in `batch`
    assert findings(model) == found != findings(model, seed=1)


def test_pythons_own_generator_is_seeded_inside_and_put_back() -> None:
    """On its own, since the checks of argument types draw from it as well."""
    was, drawn = random.getstate(), []
    for _ in range(2):
        with still(nn.Identity(), 0, torch.device("cpu")):
            drawn.append(random.random())
    assert random.getstate() == was and drawn[0] == drawn[1]


def test_what_is_no_classifier_is_refused() -> None:
    images, labels = some(4)
    ball = ball_of("linf")
    with pytest.raises(RequestError, match=r"logits of shape \(4, classes\), found tuple"):
        before_belief(Map(lambda x: (x, x)), images, labels, ball, 0)  # pyright: ignore
    with pytest.raises(RequestError, match=r"found \(4, 1, 8, 8\)"):
        before_belief(Map(lambda x: x), images, labels, ball, 0)
    with pytest.raises(RequestError, match="at least two classes"):
        before_belief(Map(lambda x: x.flatten(1)[:, :1]), images, labels, ball, 0)
    with pytest.raises(RequestError, match="found 0 and 0"):
        before_belief(trained("natural"), images[:0], labels[:0], ball, 0)
