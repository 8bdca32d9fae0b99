"""ENGM: no example pulls harder than alpha, however its norm is found, and finding it changes nothing."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Affine,
    applied,
    assert_near,
    ball_of,
    batch_of,
    everything,
    generator,
    input_norms,
    moved,
    one_by_one,
    same,
    state_of,
    through_the_batch,
    tiny_net,
    weights_of,
)
from outer_helpers import CE, INSTANCES, OBJECTIVES, Scaled, ready, trained, update
from pydantic import ValidationError
from torch import Tensor, nn

from raytrain.algorithms import (
    AbstractAlgorithm,
    AbstractRecipe,
    Dynamic,
    FgsmRs,
    Free,
    GradAlign,
    L2l,
    MartRecipe,
    Natural,
    Pgd,
    SiHg,
    Ssds,
    TradesRecipe,
    Yopo,
)
from raytrain.algorithms.gradalign import Aligned
from raytrain.attacks import Zero
from raytrain.core.cost import Meter
from raytrain.core.losses import (
    AbstractLoss,
    CrossEntropy,
    Reference,
    cross_entropy,
)
from raytrain.core.network import trainable
from raytrain.core.oracle import Oracle
from raytrain.core.sample_store import SlotStore
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, BatchNorm, Delta
from raytrain.outer import Clip, Engm, Plain
from raytrain.outer.base import AbstractOuter
from raytrain.outer.engm import EngmMemory

EVERY_OBJECTIVE: dict[str, AbstractLoss] = {
    **OBJECTIVES,
    "smoothed": CrossEntropy(label_smoothing=0.1),
    "gradalign": Aligned(lam=2.0),
}
FOUND: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "exact_one_by_one": {"estimator": "exact", "chunk": 1},
    "exact_train": {"estimator": "exact", "probe_bn": "train"},
    "affine": {"estimator": "affine"},
    "affine_reuse": {"estimator": "affine", "gradient": "reuse"},
    "affine_train": {"estimator": "affine", "probe_bn": "train"},
    "loglog": {"estimator": "affine", "fit": "loglog"},
    "input": {"estimator": "input", "kappa": 7.0},
    "input_train": {"estimator": "input", "kappa": 7.0, "probe_bn": "train"},
    "loss": {"estimator": "loss"},
    "loss_loglog": {"estimator": "loss", "fit": "loglog"},
}
EXACT = ["exact", "exact_one_by_one", "exact_train"]
SOME = ["exact", "affine", "affine_reuse", "input_train", "loss_loglog"]
"""One of each kind, where more would test the same again."""


def direction(outer: AbstractOuter, model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    """The gradient that one update at the usual perturbation applies; the model is left alone."""
    objective = options.pop("objective", CE)
    state = ready(outer, copy.deepcopy(model), objective)
    update(outer, state, batch, objective, **options)
    return applied(state.model)


def reference_of(objective: AbstractLoss, model: nn.Module, batch: Batch) -> Reference:
    """The fixed gradient and the noise that GradAlign needs; nothing for others."""
    if not isinstance(objective, Aligned):
        return ()
    point = batch.images.clone().requires_grad_(True)
    twin = copy.deepcopy(model).eval()
    (grad,) = torch.autograd.grad(cross_entropy(twin(point), batch.labels).sum(), point)
    return grad, moved(batch, seed=77)


def memory_of(state: TrainState) -> EngmMemory:
    return state.part("engm", EngmMemory)


def pretend(norms: Tensor, batch: Batch) -> Tensor:
    """Input gradients of these norms."""
    pixels = batch.images[0].numel()
    return torch.ones_like(batch.images) * (norms / pixels**0.5).view(-1, 1, 1, 1)


def mean_of(weights: Tensor, grads: Tensor) -> Tensor:
    return (weights[:, None] * grads).mean(0)


# --- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
def test_own_gradients_are_those_of_each_sample_alone(
    name: str, batch_norm: bool, chunk: int
) -> None:
    objective, model, batch = EVERY_OBJECTIVE[name], tiny_net(batch_norm=batch_norm), batch_of(8)
    model(moved(batch) + batch.images)  # running statistics that are not those of a fresh layer
    delta, reference = moved(batch), reference_of(objective, model, batch)
    oracle = Oracle(model, objective, batch, Meter(), attack_bn="eval")
    oracle.set_reference(*reference)
    chunks = list(oracle.sample_grads(delta, "eval", chunk))
    assert all(len(grad) <= chunk for grads in chunks for grad in grads)
    found = torch.cat([torch.cat([g.flatten(1) for g in grads], 1) for grads in chunks])
    assert_near(found, one_by_one(model, objective, batch, delta, reference), 1e-11)
    assert not found.requires_grad


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
def test_in_train_mode_own_gradients_go_through_the_statistics_of_the_batch(
    name: str, batch_norm: bool
) -> None:
    objective, model, batch = EVERY_OBJECTIVE[name], tiny_net(batch_norm=batch_norm), batch_of(5)
    delta, reference = moved(batch), reference_of(objective, model, batch)
    oracle = Oracle(model, objective, batch, Meter(), attack_bn="eval")
    oracle.set_reference(*reference)
    chunks = oracle.sample_grads(delta, "batch_nostat", 3)
    found = torch.cat([torch.cat([g.flatten(1) for g in grads], 1) for grads in chunks])
    wanted = through_the_batch(model, objective, batch, delta, reference)
    assert_near(found, wanted, 1e-11)
    alone = one_by_one(model, objective, batch, delta, reference)
    assert batch_norm != (float((alone - wanted).abs().max()) < 1e-9)


@pytest.mark.parametrize("bn", ["eval", "batch_nostat"])
def test_only_the_first_samples_are_measured_when_so_asked(bn: BatchNorm) -> None:
    model, batch, meter = tiny_net(), batch_of(8), Meter()
    oracle = Oracle(model, CE, batch, meter, attack_bn="eval")
    grads = list(oracle.sample_grads(moved(batch), bn, 2, count=5))
    found = torch.cat([torch.cat([g.flatten(1) for g in part], 1) for part in grads])
    assert_near(found, one_by_one(model, CE, batch, moved(batch))[:5], 1e-11)


@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
@pytest.mark.parametrize("found", EXACT)
def test_exact_norms_clip_every_objective(found: str, name: str) -> None:
    objective, model, batch = EVERY_OBJECTIVE[name], tiny_net(batch_norm=True), batch_of(6)
    delta, reference = moved(batch), reference_of(objective, model, batch)
    alone = one_by_one(model, objective, batch, delta, reference)
    grads = through_the_batch(model, objective, batch, delta, reference)
    norms = (grads if found == "exact_train" else alone).norm(dim=1)
    alpha = float(norms.median())
    outer = Engm(alpha=alpha, **FOUND[found])
    got = direction(outer, model, batch, objective=objective, reference=reference)
    assert_near(got, mean_of((alpha / norms).clamp(max=1), grads), 1e-11)


class Watched(Oracle):
    """Counts how many per-sample gradients are still alive when the next ones are computed."""

    most = 0

    def sample_grads(
        self, delta: Delta, bn: BatchNorm, chunk: int, count: int | None = None
    ) -> Iterator[list[Tensor]]:
        for grads in super().sample_grads(delta, bn, chunk, count):
            size = len(grads[0])
            kept = weakref.ref(grads[0])
            yield grads
            del grads
            alive = size if kept() is not None else 0
            self.most = max(self.most, alive + size)


@pytest.mark.parametrize("estimator", ["exact", "affine", "loss"])
def test_no_more_than_a_chunk_of_own_gradients_is_ever_held(estimator: str) -> None:
    outer = Engm.model_validate({"estimator": estimator, "chunk": 2})
    state, batch = ready(outer, tiny_net()), batch_of(8)
    oracle = Watched(state.model, CE, batch, state.meter, attack_bn="eval")
    outer.update(state, oracle, moved(batch))
    assert oracle.most == 2


# --- the twelve invariants --------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("found", FOUND)
def test_1_an_infinite_alpha_is_momentum_sgd_bit_for_bit(found: str, batch_norm: bool) -> None:
    outers = (Plain(), Engm(alpha=math.inf, tau=2, **FOUND[found]))
    states = [ready(outer, tiny_net(batch_norm=batch_norm), weight_decay=0.01) for outer in outers]
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        for outer, state in zip(outers, states, strict=True):
            losses = update(outer, state, batch, delta=moved(batch, seed=seed))
            assert not losses.requires_grad
    assert same(states[0].model, states[1].model)


@pytest.mark.parametrize("found", EXACT)
@pytest.mark.parametrize("name", EVERY_OBJECTIVE)
def test_2_the_mean_gradient_is_no_longer_than_alpha(found: str, name: str) -> None:
    # With batch statistics it holds where norms are measured through them, too.
    objective, model = EVERY_OBJECTIVE[name], tiny_net(batch_norm=found == "exact_train")
    for seed, alpha in enumerate((0.01, 1.0)):
        batch = batch_of(6, seed=seed)
        reference = reference_of(objective, model, batch)
        outer = Engm(alpha=alpha, **FOUND[found])
        got = direction(outer, model, batch, objective=objective, reference=reference)
        assert float(got.norm()) <= alpha * (1 + 1e-12)


def predicted(found: str, model: nn.Module, batch: Batch, latest: Tensor) -> Tensor:
    """What stands in for the norms (for their logarithms in a log-log fit) of cross-entropy."""
    delta, train = moved(batch), FOUND[found].get("probe_bn") == "train"
    if "reuse" in found:
        return latest.flatten(1).norm(dim=1)
    if found.startswith("loss"):
        return CE.outer(copy.deepcopy(model).train(), batch, delta, ()).detach()
    return FOUND[found].get("kappa", 1.0) * input_norms(model, CE, batch, delta, train=train)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("found", FOUND)
def test_3_the_applied_gradient_is_the_weighted_mean_of_own_gradients(
    found: str, batch_norm: bool
) -> None:
    model, batch, delta = tiny_net(batch_norm=batch_norm), batch_of(8), moved(batch_of(8))
    latest = pretend(1 + torch.rand(8, generator=generator(3), dtype=torch.float64), batch)
    grads = through_the_batch(model, CE, batch, delta)
    seen = copy.deepcopy(model)
    if found.startswith("loss"):
        seen(batch.images + delta)  # norms are asked for once the training pass has gone forward
    measured = grads if "train" in found else one_by_one(seen, CE, batch, delta)
    norms = measured.norm(dim=1)
    if not found.startswith("exact"):
        told = predicted(found, model, batch, latest)
        norms = told if found.startswith("input") else line(told, norms, "loglog" in found)
    alpha = float(norms.median())
    outer = Engm(alpha=alpha, **FOUND[found])
    got = direction(outer, model, batch, latest=latest)
    weights = (alpha / norms).clamp(max=1)
    assert 0 < int((weights < 1).sum()) < 8
    assert_near(got, mean_of(weights, grads), 1e-10)


def line(predictor: Tensor, norms: Tensor, loglog: bool) -> Tensor:
    """numpy's least squares of the norms on the predictor, at the predictor."""
    slope, intercept = fitted(predictor, norms, loglog)
    told = slope * (predictor.log() if loglog else predictor) + intercept
    return told.exp() if loglog else told.clamp_min(1e-6)


def fitted(predictor: Tensor, norms: Tensor, loglog: bool) -> tuple[float, float]:
    x, y = predictor.numpy(), norms.numpy()
    x, y = (np.log(x), np.log(y)) if loglog else (x, y)
    slope, intercept = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    if slope <= 0:  # the guard, which has tests of its own
        return (1.0, float((y - x).mean())) if loglog else (float(x @ y / (x @ x)), 0.0)
    return float(slope), float(intercept)


@pytest.mark.parametrize("found", EXACT)
def test_4_a_vanishing_alpha_leaves_the_mean_of_unit_vectors(found: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    grads = one_by_one(model, CE, batch, moved(batch))
    units = (grads / grads.norm(dim=1, keepdim=True)).mean(0)
    for alpha in (1e-3, 1e-9):
        got = direction(Engm(alpha=alpha, **FOUND[found]), model, batch) / alpha
        assert_near(got, units, 1e-12)


@pytest.mark.parametrize("found", ["exact", "input", "loss_loglog", "loglog"])
def test_4_a_vanishing_alpha_with_the_rate_scaled_up_is_normalisation(found: str) -> None:
    shared = {"tau": 2, **FOUND[found]}
    small = Engm(alpha=1e-8, mode="clip", **shared)
    normal = Engm(alpha=1.0, mode="normalise", **shared)
    states = [ready(small, tiny_net(), lr=1e8 * 0.1), ready(normal, tiny_net(), lr=0.1)]
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        for outer, state in zip((small, normal), states, strict=True):
            update(outer, state, batch)
    one, two = (weights_of(state.model) for state in states)
    assert_near(one, two, 1e-9)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    index = torch.tensor(rows)
    rng = batch_of(len(rows)).rng
    return Batch(batch.images[index], batch.labels[index], torch.arange(len(rows)), rng)


@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize(
    "rows", [[*range(8), *range(8)], [5, 2, 7, 0, 1, 6, 3, 4]], ids=["5", "6"]
)
def test_5_and_6_neither_duplicates_nor_the_order_change_the_update(
    rows: list[int], found: str
) -> None:
    model, batch = tiny_net(), batch_of(8)
    delta = moved(batch)
    outer = Engm(alpha=2.0, **FOUND[found])
    once = direction(outer, model, batch, latest=delta)
    other = rows_of(batch, rows)
    again = direction(outer, model, other, delta=delta[rows], latest=delta[rows])
    assert_near(again, once, 1e-12)


@pytest.mark.parametrize("factor", [0.01, 37.0])
@pytest.mark.parametrize("found", FOUND)
def test_7_scaling_losses_and_alpha_scales_the_update(found: str, factor: float) -> None:
    model, batch = tiny_net(), batch_of(8)
    latest = pretend(one_by_one(model, CE, batch, moved(batch)).norm(dim=1) ** 0.7, batch)
    once = direction(Engm(alpha=2.0, **FOUND[found]), model, batch, latest=latest)
    outer = Engm(alpha=2.0 * factor, **FOUND[found])
    objective = Scaled(by=(factor,) * 4)
    scaled = direction(outer, model, batch, objective=objective, latest=latest * factor)
    assert_near(scaled, factor * once, 1e-10)


@pytest.mark.parametrize("found", [*EXACT, "input", "input_train"])
def test_7_normalisation_does_not_see_the_scale_of_any_loss(found: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    outer = Engm(alpha=2.0, mode="normalise", **FOUND[found])
    once = direction(outer, model, batch)
    scaled = direction(outer, model, batch, objective=Scaled(by=(0.01, 0.5, 3.0, 100.0)))
    assert_near(scaled, once, 1e-10)


@pytest.mark.parametrize("found", ["affine", "affine_train", "loss", "loglog", "loss_loglog"])
def test_8_two_samples_are_interpolated_so_that_an_estimate_is_exact(found: str) -> None:
    tried = 0
    for seed in range(6):
        model, batch = tiny_net(), batch_of(2, seed=seed)
        norms = one_by_one(model, CE, batch, moved(batch)).norm(dim=1)
        predictor = predicted(found, model, batch, norms)
        if float((norms[0] - norms[1]) * (predictor[0] - predictor[1])) <= 0:
            continue  # the guard's turn
        tried += 1
        alpha = float(norms.mean())
        told = direction(Engm(alpha=alpha, tau=1, mu=0, **FOUND[found]), model, batch)
        exact = direction(Engm(alpha=alpha, estimator="exact"), model, batch)
        assert_near(told, exact, 1e-9)
    assert tried >= 2


@pytest.mark.parametrize("alpha", [0.05, 1.0, 1e3])
@pytest.mark.parametrize("found", [*EXACT, "affine", "loglog", "loss", "loss_loglog"])
def test_9_one_sample_is_clipped_as_a_batch_is(found: str, alpha: float) -> None:
    model, batch = tiny_net(), batch_of(1)
    own = direction(Engm(alpha=alpha, **FOUND[found]), model, batch)
    clipped = direction(Clip(max_norm=alpha), model, batch)
    assert float((own - clipped).norm()) <= 1e-6 * (1 + 1 / alpha) * float(clipped.norm())


@pytest.mark.parametrize("found", EXACT)
def test_9_several_samples_are_not_clipped_as_a_batch_is(found: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    norms = one_by_one(model, CE, batch, moved(batch)).norm(dim=1)
    alpha = float(norms.median())
    own = direction(Engm(alpha=alpha, **FOUND[found]), model, batch)
    clipped = direction(Clip(max_norm=alpha), model, batch)
    cosine = torch.nn.functional.cosine_similarity(own, clipped, dim=0)
    assert float(cosine) < 0.9999


def test_11_an_input_norm_is_an_affine_estimate_frozen_without_an_intercept() -> None:
    kappa = 3.7
    given = Engm(alpha=2.0, estimator="input", kappa=kappa)
    frozen = Engm(alpha=2.0, estimator="affine", tau=10**6)
    states = [ready(outer, tiny_net()) for outer in (given, frozen)]
    slope, origin = torch.tensor([kappa, 0.0], dtype=torch.float64)
    memory_of(states[1]).load_state_dict({"updates": 1, "gamma1": slope, "gamma0": origin})
    for seed in range(3):
        for outer, state in zip((given, frozen), states, strict=True):
            update(outer, state, batch_of(8, seed=seed), delta=moved(batch_of(8)))
    one, two = (weights_of(state.model) for state in states)
    assert_near(one, two, 1e-12)
    assert memory_of(states[0]).state_dict() == {"updates": 0}


@pytest.mark.parametrize("found", FOUND)
def test_12_no_gradient_flows_through_the_weights_of_samples(found: str) -> None:
    model, batch = tiny_net(), batch_of(6)
    delta, step = moved(batch), 1e-6
    latest = pretend(one_by_one(model, CE, batch, delta).norm(dim=1).sqrt(), batch)
    outer = Engm(alpha=1.0, **FOUND[found])
    got = direction(outer, model, batch, latest=latest)
    grads = one_by_one(model, CE, batch, delta)
    weights = 6 * torch.linalg.lstsq(grads.T, got[:, None]).solution[:, 0]
    assert float(weights.min()) < 0.9
    # A derivative of the weighted losses with numbers for weights, and one with weights that move.
    along = torch.randn(len(got), generator=generator(9), dtype=torch.float64)

    def losses(by: float) -> Tensor:
        twin = copy.deepcopy(model)
        nn.utils.vector_to_parameters(weights_of(model) + by * along, twin.parameters())
        return CE.outer(twin, batch, delta, ()).detach()

    slopes = (losses(step) - losses(-step)) / (2 * step)
    held = float((weights * slopes).mean())
    assert float(got @ along) == pytest.approx(held, rel=1e-5)


# --- how norms are told -----------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["affine", "loglog"])
@pytest.mark.parametrize("source", ["fresh", "reuse", "train", "loss"])
@pytest.mark.parametrize("probes", [None, 5])
def test_a_line_is_fitted_by_least_squares_at_every_tau_th_update_and_blended(
    fit: str, source: str, probes: int | None
) -> None:
    kind = {
        "fresh": {},
        "reuse": {"gradient": "reuse"},
        "train": {"probe_bn": "train"},
        "loss": {"estimator": "loss"},
    }[source]
    fields = {"alpha": 3.0, "fit": fit, "tau": 3, "mu": 0.4, "probes": probes, **kind}
    outer, loglog = Engm.model_validate(fields), fit == "loglog"
    state = ready(outer, tiny_net(), lr=0.02)
    memory, line = memory_of(state), (0.0, 0.0)
    for number in range(5):
        batch = batch_of(8, seed=number)
        delta = moved(batch, seed=number)
        grads = one_by_one(state.model, CE, batch, delta)
        norms, r = grads.norm(dim=1), input_norms(state.model, CE, batch, delta)
        if source == "reuse":
            wobble = torch.rand(8, generator=generator(number), dtype=torch.float64)
            r = (0.5 + wobble) * norms
        if source == "loss":
            r = CE.outer(state.model, batch, delta, ()).detach()
        if number % 3 == 0:
            new = fitted(r[:probes], norms[:probes], loglog)
            old = line if number else new
            line = tuple(0.4 * a + 0.6 * b for a, b in zip(old, new, strict=True))
        told = line[0] * (r.log() if loglog else r) + line[1]
        told = told.exp() if loglog else told.clamp_min(1e-6)
        update(outer, state, batch, delta=delta, latest=pretend(r, batch))
        assert float(memory.values["gamma1"]) == pytest.approx(line[0], rel=1e-9)
        assert float(memory.values["gamma0"]) == pytest.approx(line[1], rel=1e-9, abs=1e-9)
        assert memory.values["gamma1"].dtype == torch.float64
        assert_near(applied(state.model), mean_of((3.0 / told).clamp(max=1), grads), 1e-9)
    assert memory.counts["updates"] == 5


def test_exact_norms_are_measured_at_every_tau_th_update_and_at_no_other() -> None:
    outer = Engm(tau=4, gradient="reuse")
    state, batch, spent = ready(outer, tiny_net()), batch_of(8), []
    for _ in range(10):
        before = state.meter.fe
        update(outer, state, batch, latest=moved(batch))
        spent.append(state.meter.fe - before)
    assert spent == [48, 24, 24, 24, 48, 24, 24, 24, 48, 24]


GUARDED: dict[str, Tensor | str] = {
    "falling": "falling",
    "constant": torch.full((8,), 2.5, dtype=torch.float64),
    "one": torch.ones(8, dtype=torch.float64),
    "constant_to_rounding": 1e5 + 1e-9 * torch.arange(8, dtype=torch.float64),
    "tiny": torch.full((8,), 1e-30, dtype=torch.float64),
    "zero": torch.zeros(8, dtype=torch.float64),
}


@pytest.mark.parametrize("fit", ["affine", "loglog"])
@pytest.mark.parametrize("case", GUARDED)
def test_where_no_line_rises_one_through_the_origin_is_taken(case: str, fit: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    grads = one_by_one(model, CE, batch, moved(batch))
    s, given = grads.norm(dim=1), GUARDED[case]
    r = 1 / s if isinstance(given, str) else given
    alpha = float(s.median())
    outer = Engm.model_validate({"alpha": alpha, "gradient": "reuse", "fit": fit})
    state = ready(outer, copy.deepcopy(model))
    update(outer, state, batch, latest=pretend(r, batch))
    if fit == "affine":
        told = (float((r * s).sum() / (r * r).sum().clamp_min(1e-300)) * r).clamp_min(1e-6)
    else:
        logs = r.clamp_min(1e-12).log()
        told = (logs + (s.log() - logs).mean()).exp()
    if case != "tiny" or fit == "loglog":
        assert_near(applied(state.model), mean_of((alpha / told).clamp(max=1), grads), 1e-9)
    values = memory_of(state).values
    assert bool(torch.isfinite(applied(state.model)).all())
    assert all(bool(value.isfinite()) for value in values.values())
    assert float(values["gamma0"]) == 0 or fit == "loglog"
    assert float(values["gamma1"]) >= 0


def test_a_single_probe_gives_a_line_through_the_origin() -> None:
    model, batch = tiny_net(), batch_of(8)
    s = one_by_one(model, CE, batch, moved(batch)).norm(dim=1)
    r = input_norms(model, CE, batch, moved(batch))
    state = ready(outer := Engm(probes=1), copy.deepcopy(model))
    update(outer, state, batch)
    assert float(memory_of(state).values["gamma1"]) == pytest.approx(float(s[0] / r[0]))
    assert float(memory_of(state).values["gamma0"]) == 0


def below_the_line(mode: str) -> tuple[Engm, TrainState, Batch, Tensor]:
    """An estimator with the line s = 2 r - 3, and input norms of which two fall below its zero."""
    model, batch = tiny_net(), batch_of(8)
    outer = Engm.model_validate({"alpha": 1.0, "gradient": "reuse", "tau": 2, "mode": mode})
    state = ready(outer, model, lr=0.0)
    s = one_by_one(model, CE, batch, moved(batch)).norm(dim=1)
    update(outer, state, batch, latest=pretend(s / 2 + 1.5, batch))
    r = torch.tensor([0.0, 0.5, 1.6, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    update(outer, state, batch, latest=pretend(r, batch))
    assert float(memory_of(state).values["gamma0"]) == pytest.approx(-3)
    return outer, state, batch, (2 * r - 3).clamp_min(1e-6)


def test_a_negative_estimate_counts_as_no_norm_at_all() -> None:
    _, state, batch, told = below_the_line("clip")
    grads = one_by_one(state.model, CE, batch, moved(batch))
    weights = (1 / told).clamp(max=1)
    assert weights[:3].tolist() == [1, 1, 1]
    assert_near(applied(state.model), mean_of(weights, grads), 1e-9)


def test_a_negative_estimate_does_not_blow_up_a_normalised_update() -> None:
    # alpha / s_floor is a million: an easy sample would move the weights a million times too far.
    _, state, batch, _ = below_the_line("normalise")
    longest = one_by_one(state.model, CE, batch, moved(batch)).norm(dim=1).max()
    assert float(applied(state.model).norm()) < 1e3 * float(longest)


# --- thresholds and modes ---------------------------------------------------------------------


@pytest.mark.parametrize("found", ["exact", "exact_train", "affine", "input", "loss"])
def test_alpha_follows_a_quantile_of_the_norms(found: str) -> None:
    outer = Engm(quantile=0.7, alpha=1e-9, tau=1, mu=0, **FOUND[found])
    state, alpha = ready(outer, tiny_net(), lr=0.02), 0.0
    for number in range(5):
        batch = batch_of(8, seed=number)
        grads = one_by_one(state.model, CE, batch, moved(batch))
        norms = grads.norm(dim=1)
        if not found.startswith("exact"):
            told = predicted(found, state.model, batch, norms)
            norms = told if found == "input" else line(told, norms, False)
        now = float(np.quantile(norms.numpy(), 0.7))
        alpha = 0.9 * alpha + 0.1 * now if number else now
        update(outer, state, batch)
        assert float(memory_of(state).values["alpha"]) == pytest.approx(alpha, rel=1e-9)
        assert_near(applied(state.model), mean_of((alpha / norms).clamp(max=1), grads), 1e-9)


def test_normalised_weights_are_not_renormalised() -> None:
    with pytest.raises(ValidationError, match="renorm needs mode=clip"):
        Engm(mode="normalise", renorm=True)


@pytest.mark.parametrize("found", SOME)
def test_renormalised_weights_have_mean_one_and_the_same_direction(found: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    grads = one_by_one(model, CE, batch, moved(batch))
    latest = pretend(grads.norm(dim=1).sqrt(), batch)
    fields = {"alpha": 1.0, **FOUND[found]}
    plain, renormed = (
        direction(Engm.model_validate({**fields, "renorm": on}), model, batch, latest=latest)
        for on in (False, True)
    )
    cosine = torch.nn.functional.cosine_similarity(plain, renormed, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-12)
    weights = 8 * torch.linalg.lstsq(grads.T, renormed[:, None]).solution[:, 0]
    assert float(weights.mean()) == pytest.approx(1, abs=1e-7)
    assert float(weights.std()) > 0.01


@pytest.mark.parametrize("found", SOME)
def test_normalisation_weighs_by_alpha_over_the_norm_beyond_one_too(found: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    grads = one_by_one(model, CE, batch, moved(batch))
    norms, latest = grads.norm(dim=1), pretend(grads.norm(dim=1).sqrt(), batch)
    if not found.startswith("exact"):
        told = predicted(found, model, batch, latest)
        # A line promises no norm below the smallest measured.
        least = 0.0 if "loglog" in found else float(norms.min())
        fit = line(told, norms, "loglog" in found).clamp_min(least)
        norms = told if found.startswith("input") else fit
    alpha = 2 * float(norms.median())
    outer = Engm(alpha=alpha, mode="normalise", **FOUND[found])
    got = direction(outer, model, batch, latest=latest)
    assert_near(got, mean_of(alpha / norms, grads), 1e-8)


def test_normalisation_needs_a_finite_alpha() -> None:
    with pytest.raises(ValidationError, match="finite alpha"):
        Engm(mode="normalise", alpha=math.inf)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_alpha_is_a_positive_number(alpha: float) -> None:
    with pytest.raises(ValidationError):
        Engm(alpha=alpha)


def flat_for_label_one(seed: int = 0) -> tuple[nn.Module, Batch]:
    """A batch of which two samples have no gradient at all."""
    model, batch = tiny_net(), batch_of(8, seed=seed)
    index = torch.tensor([0, 0, 2, 3, 0, 2, 1, 1])
    return model, Batch(batch.images, index, batch.index, batch.rng)


@pytest.mark.parametrize(
    "how", [{}, {"renorm": True}, {"mode": "normalise"}], ids=["clip", "renorm", "normalise"]
)
@pytest.mark.parametrize("found", SOME)
def test_a_sample_without_a_gradient_does_not_silence_the_others(
    found: str, how: dict[str, Any]
) -> None:
    model, batch = flat_for_label_one()
    objective = Scaled(by=(1.0, 0.0, 1.0, 1.0))
    grads = one_by_one(model, objective, batch, moved(batch))
    assert grads.norm(dim=1)[6:].tolist() == [0, 0]
    latest = pretend(grads.norm(dim=1), batch)
    outer = Engm.model_validate({"alpha": 1.0, **how, **FOUND[found]})
    got = direction(outer, model, batch, objective=objective, latest=latest)
    units = grads[:6] / grads[:6].norm(dim=1, keepdim=True)
    assert bool(torch.isfinite(got).all())
    # At least a hundredth of the mean of their unit vectors is left.
    assert float(got.norm()) > 0.01 * float(units.sum(0).norm()) / 8


@pytest.mark.parametrize("found", SOME)
def test_no_gradient_at_all_is_no_update(found: str) -> None:
    for fields in ({}, {"mode": "normalise"}, {"renorm": True}, {"quantile": 0.5}):
        outer = Engm.model_validate({**FOUND[found], **fields})
        objective = Scaled(by=(0.0,) * 4)
        got = direction(outer, tiny_net(), batch_of(4), objective=objective)
        assert torch.equal(got, torch.zeros_like(got))


# --- weights that are given -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "normalise"])
@pytest.mark.parametrize("found", SOME)
def test_given_weights_belong_to_the_loss_whose_norm_is_bounded(found: str, mode: str) -> None:
    model, batch = tiny_net(), batch_of(8)
    grads = one_by_one(model, CE, batch, moved(batch))
    norms, latest = grads.norm(dim=1), pretend(grads.norm(dim=1).sqrt(), batch)
    given = 0.1 + 2 * torch.rand(8, generator=generator(4), dtype=torch.float64)
    given[3] = 0
    if not found.startswith("exact"):
        told = predicted(found, model, batch, latest)
        line_only = mode == "normalise" and "loglog" not in found
        least = float(norms.min()) if line_only else 0.0
        fit = line(told, norms, "loglog" in found).clamp_min(least)
        norms = told if found.startswith("input") else fit
    alpha = float((norms * given).median())
    outer = Engm.model_validate({"alpha": alpha, "mode": mode, **FOUND[found]})
    got = direction(outer, model, batch, latest=latest, given=given)
    scaled = (norms * given).clamp_min(1e-300)
    weights = alpha / scaled if mode == "normalise" else (alpha / scaled).clamp(max=1)
    weights = torch.where(given > 0, weights, torch.zeros_like(weights))
    assert_near(got, mean_of(weights, given[:, None] * grads), 1e-8)


def test_dynamic_training_weighted_by_its_own_losses_is_bounded_all_the_same() -> None:
    alpha = 0.5
    recipe = Dynamic(weighting="own_ce", steps=3)
    algorithm = recipe.build(ball_of("linf"), Engm(alpha=alpha, estimator="exact"))
    state, batch = state_of(tiny_net(), algorithm), batch_of(8)
    state.epoch = 1
    model = copy.deepcopy(state.model)
    outcome = algorithm.step(state, batch)
    losses = CE.inner(model, batch, outcome.delta, ()).detach()
    grads = losses[:, None] * one_by_one(model, CE, batch, outcome.delta)
    weights = (alpha / grads.norm(dim=1)).clamp(max=1)
    assert int((weights < 1).sum()) > 0
    assert_near(applied(state.model), mean_of(weights, grads), 1e-11)
    assert_near(outcome.losses, losses, 1e-12)  # reported without any weight


# --- where the input gradient comes from, and what it costs -----------------------------------


def test_the_last_gradient_of_the_attack_is_reused() -> None:
    kappa, batch = 5.0, batch_of(8)
    outer = Engm(alpha=1.0, estimator="input", kappa=kappa, gradient="reuse")
    algorithm = Pgd(steps=3).build(ball_of("linf"), outer)
    shorter = Pgd(steps=2).build(ball_of("linf"), Plain())
    state, twin = state_of(tiny_net(), algorithm), tiny_net()
    before = shorter.step(
        state_of(copy.deepcopy(twin)), batch
    ).delta  # where the last one was taken
    outcome = algorithm.step(state, batch)
    norms = kappa * input_norms(twin, CE, batch, before)
    grads = one_by_one(twin, CE, batch, outcome.delta)
    assert_near(applied(state.model), mean_of((1 / norms).clamp(max=1), grads), 1e-11)


def test_samples_that_stopped_early_reuse_the_gradient_they_stopped_on() -> None:
    batch, twin = batch_of(8), tiny_net()
    outer = Engm(alpha=1.0, estimator="input", gradient="reuse")
    algorithm = Dynamic(c_max=0.15).build(ball_of("linf"), outer)
    state = state_of(tiny_net(), algorithm)
    outcome = algorithm.step(state, batch)
    stopped = outcome.steps < 10
    assert int(stopped.sum()) > 0
    grads = one_by_one(twin, CE, batch, outcome.delta)
    weights = 8 * torch.linalg.lstsq(grads.T, applied(state.model)[:, None]).solution[:, 0]
    fresh = (1 / input_norms(twin, CE, batch, outcome.delta)).clamp(max=1)
    assert_near(weights[stopped], fresh[stopped], 1e-8)


WALKS: dict[str, tuple[AbstractRecipe, int, int]] = {
    "pgd": (Pgd(steps=3), 1, 0),
    "fgsm_rs": (FgsmRs(), 1, 0),
    "trades": (TradesRecipe(steps=2), 2, 0),
    "mart": (MartRecipe(steps=2), 2, 0),
    "gradalign": (GradAlign(), 2, 1),
}
"""Forwards in the training loss, and input gradients inside it."""


def spent(recipe: AbstractRecipe, outer: AbstractOuter, steps: int) -> list[Meter]:
    """What each of the first updates cost."""
    algorithm = recipe.build(ball_of("linf"), outer)
    state, found = state_of(tiny_net(), algorithm), []
    for number in range(steps):
        state.meter = Meter()
        algorithm.step(state, batch_of(8, seed=number))
        found.append(state.meter)
    return found


def beyond(recipe: AbstractRecipe, outer: AbstractOuter, steps: int) -> list[tuple[int, int, int]]:
    """Forwards, input and full backwards of each update beyond those of plain SGD, for 8 samples."""
    # Weights differ after an update, but no count of these recipes depends on them.
    pairs = zip(spent(recipe, outer, steps), spent(recipe, Plain(), steps), strict=True)
    return [
        (
            ours.forwards - base.forwards,
            ours.input_backwards - base.input_backwards,
            ours.full_backwards - base.full_backwards,
        )
        for ours, base in pairs
    ]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", WALKS)
def test_exact_norms_cost_a_pass_more_whatever_the_chunk(name: str, chunk: int) -> None:
    recipe, walks, nested = WALKS[name]
    outer = Engm(estimator="exact", chunk=chunk)
    probe = (8 * walks, 8 * nested, 8 * (walks + nested))
    assert beyond(recipe, outer, 1) == [probe]


@pytest.mark.parametrize("name", WALKS)
def test_exact_norms_through_the_batch_cost_a_whole_backward_for_each_sample(name: str) -> None:
    recipe, walks, nested = WALKS[name]
    outer = Engm(estimator="exact", probe_bn="train")
    assert beyond(recipe, outer, 1) == [(8 * walks, 8 * nested, 64 * (walks + nested))]


@pytest.mark.parametrize("name", ["pgd", "fgsm_rs", "trades", "mart"])
def test_a_fresh_input_gradient_costs_a_forward_and_an_input_backward(name: str) -> None:
    recipe, walks, _ = WALKS[name]
    outer = Engm(estimator="input")
    assert beyond(recipe, outer, 2) == [(8 * walks, 8, 0)] * 2


def test_a_fresh_input_gradient_of_gradalign_differentiates_nothing_twice() -> None:
    ((_, _, full),) = beyond(GradAlign(), Engm(estimator="input"), 1)
    assert full == 0


@pytest.mark.parametrize("name", ["pgd", "fgsm_rs", "trades", "mart"])
def test_an_input_gradient_of_the_training_pass_costs_its_backward_alone(name: str) -> None:
    recipe, _, _ = WALKS[name]
    outer = Engm(estimator="input", probe_bn="train")
    assert beyond(recipe, outer, 2) == [(0, 8, 0)] * 2


@pytest.mark.parametrize("name", WALKS)
def test_a_reused_input_gradient_and_the_loss_cost_nothing_between_fits(name: str) -> None:
    recipe, walks, nested = WALKS[name]
    fit = (8 * walks, 8 * nested, 8 * (walks + nested))
    assert beyond(recipe, Engm(estimator="input", gradient="reuse"), 2) == [(0, 0, 0)] * 2
    for fields in ({"gradient": "reuse"}, {"estimator": "loss"}):
        outer = Engm.model_validate({"tau": 2, **fields})
        assert beyond(recipe, outer, 3) == [fit, (0, 0, 0), fit]


def test_probes_are_all_that_a_fit_costs() -> None:
    outer = Engm(probes=3, gradient="reuse", chunk=2)
    assert beyond(Pgd(steps=1), outer, 2) == [(3, 0, 3), (0, 0, 0)]


def test_without_an_attack_there_is_nothing_to_reuse_and_a_fresh_gradient_is_taken() -> None:
    states = []
    for gradient in ("fresh", "reuse"):
        outer = Engm.model_validate({"alpha": 1.0, "gradient": gradient, "tau": 2})
        algorithm = Natural().build(ball_of("linf"), outer)
        states.append(state_of(tiny_net(), algorithm))
        for seed in range(3):
            algorithm.step(states[-1], batch_of(8, seed=seed))
    assert same(states[0].model, states[1].model)
    assert states[0].meter == states[1].meter


@pytest.mark.parametrize("name", ["free", "yopo", "jacobi", "together"])
def test_one_pass_algorithms_pay_for_the_loss_estimator_only_where_they_fit(name: str) -> None:
    recipe = {
        "free": Free(m=1),
        "yopo": Yopo(m=1),
        "jacobi": Ssds(order="jacobi"),
        "together": SiHg(mode="J"),
    }[name]
    outer = Engm(estimator="loss", tau=2)
    assert beyond(recipe, outer, 2) == [(8, 0, 8), (0, 0, 0)]


# --- nothing else changes ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("found", SOME)
def test_measuring_norms_changes_only_the_meter_and_its_own_memory(
    found: str, training: bool
) -> None:
    outer = Engm(alpha=1.0, **FOUND[found])
    state = ready(outer, tiny_net(batch_norm=True), lr=0.1)
    update(outer, state, batch_of(8, seed=3), delta=moved(batch_of(8)))
    memory_of(state).counts["updates"] = 0
    state.model.train(training)
    state.model.norm.eval()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    batch, delta = batch_of(8), moved(batch_of(8))
    before = dict(everything(state.model))
    grads = [p.grad.clone() for p in trainable(state.model) if p.grad is not None]
    flags = [m.training for m in state.model.modules()]
    momenta = copy.deepcopy(state.optimizer.state_dict())
    random, place = torch.get_rng_state(), (delta.clone(), batch.images.clone())
    oracle = state.oracle(batch, CE, "eval")
    weights = outer.weights(state, oracle, delta)
    if callable(weights):
        losses = CE.outer(state.model, batch, delta, ()).detach()
        weights = weights(losses, lambda: pretend(losses, batch))
    assert isinstance(weights, Tensor) and not weights.requires_grad and weights.shape == (8,)
    assert before.keys() == dict(everything(state.model)).keys()
    assert all(torch.equal(before[k], v) for k, v in everything(state.model))
    now = [p.grad for p in trainable(state.model)]
    assert all(
        torch.equal(one, two) for one, two in zip(grads, now, strict=True) if two is not None
    )
    assert [m.training for m in state.model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(delta, place[0]) and torch.equal(batch.images, place[1])
    assert not delta.requires_grad
    after = state.optimizer.state_dict()
    assert all(
        torch.equal(momenta["state"][k]["momentum_buffer"], after["state"][k]["momentum_buffer"])
        for k in after["state"]
    )


@pytest.mark.parametrize("found", SOME)
def test_running_statistics_are_those_of_plain_sgd_after_an_update(found: str) -> None:
    batch, buffers = batch_of(8), []
    for outer in (Plain(), Engm(alpha=0.1, **FOUND[found])):
        state = ready(outer, tiny_net(batch_norm=True))
        update(outer, state, batch)
        buffers.append(dict(state.model.named_buffers()))
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])


@pytest.mark.parametrize("found", [f for f in FOUND if not f.endswith("train")])
def test_norms_are_measured_without_dropout(found: str) -> None:
    outer = Engm(alpha=1.0, **FOUND[found])
    state, batch = ready(outer, tiny_net(dropout=0.5)), batch_of(8)
    random = torch.get_rng_state()
    oracle = state.oracle(batch, CE, "eval")
    weights = outer.weights(state, oracle, moved(batch))
    if callable(weights):
        weights(torch.ones(8, dtype=torch.float64), lambda: moved(batch))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("found", SOME)
def test_the_update_is_that_of_momentum_sgd_with_weight_decay_outside_the_norm(found: str) -> None:
    outer = Engm(alpha=0.5, tau=2, **FOUND[found])
    state = ready(outer, tiny_net(), lr=0.05, momentum=0.8, weight_decay=0.03)
    momentum = torch.zeros_like(weights_of(state.model))
    for seed in range(3):
        batch, before = batch_of(8, seed=seed), weights_of(state.model)
        update(outer, state, batch)
        momentum = 0.8 * momentum + applied(state.model) + 0.03 * before
        assert_near(weights_of(state.model), before - 0.05 * momentum, 1e-14)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("found", SOME)
def test_a_memory_that_was_saved_and_loaded_goes_on_bit_for_bit(
    found: str,
) -> None:
    outer = Engm(quantile=0.6, tau=2, mu=0.6, **FOUND[found])
    whole, first = (ready(outer, tiny_net()) for _ in range(2))
    second = ready(outer, tiny_net(seed=9))
    for number in range(5):
        batch = batch_of(8, seed=number)
        update(outer, whole, batch)
        if number == 3:
            second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
            second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
            kept = copy.deepcopy(memory_of(first).state_dict())
            memory_of(second).load_state_dict(kept)
            first = second
        update(outer, first, batch)
    assert same(whole.model, first.model)
    assert memory_of(whole).state_dict() == memory_of(first).state_dict()


def test_a_saved_memory_does_not_change_as_training_goes_on() -> None:
    outer = Engm(quantile=0.5, tau=1, mu=0.5)
    state = ready(outer, tiny_net())
    update(outer, state, batch_of(8))
    saved = memory_of(state).state_dict()
    copied = copy.deepcopy(saved)
    update(outer, state, batch_of(8, seed=1), delta=moved(batch_of(8)))
    assert saved == copied != memory_of(state).state_dict()


def test_the_share_of_clipped_samples_is_measured_over_an_epoch_and_starts_anew() -> None:
    outer = Engm(estimator="exact", alpha=6.0)
    state, clipped = ready(outer, tiny_net(), lr=0.0), 0
    for seed in range(3):
        batch = batch_of(8, seed=seed)
        norms = one_by_one(state.model, CE, batch, moved(batch)).norm(dim=1)
        clipped += int((norms > 6).sum())
        update(outer, state, batch)
    assert 0 < clipped < 24, clipped
    assert outer.measures(state) == {"engm/clipped": clipped / 24}
    assert outer.measures(state) == {"engm/clipped": 0}


# --- every algorithm --------------------------------------------------------------------------

EVERY: dict[str, AbstractRecipe] = {
    **INSTANCES,
    "l2l_trades": L2l(steps=2, loss="trades"),
    "si_hg_B": SiHg(mode="B"),
    "si_hg_N": SiHg(mode="N"),
    "ssds_w_first": Ssds(order="w_first"),
}
UPDATES = {"free": 2, "yopo": 2}
"""Passes with weights of their own in one step, where they are several."""


def algorithm_of(recipe: AbstractRecipe, outer: AbstractOuter) -> AbstractAlgorithm:
    return recipe.build(ball_of("linf"), outer)


@functools.cache
def plainly(name: str, steps: int = 2) -> nn.Module:
    """The network after a few steps of SGD."""
    return trained(EVERY[name], Plain(), steps).model


@pytest.mark.parametrize("found", ["exact", "affine_reuse", "loss"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.slow
def test_every_algorithm_runs_with_it_and_an_infinite_alpha_is_no_change(
    name: str, found: str
) -> None:
    unbounded = trained(EVERY[name], Engm(alpha=math.inf, **FOUND[found]))
    assert same(unbounded.model, plainly(name))
    bounded = Engm(alpha=0.01, **FOUND[found])
    state = trained(EVERY[name], bounded, steps=1)
    assert not same(state.model, plainly(name, steps=1))
    assert bool(torch.isfinite(weights_of(state.model)).all())
    told = algorithm_of(EVERY[name], bounded).measures(state, batch_of(8))
    assert 0 < told["engm/clipped"] <= 1
    if FOUND[found]["estimator"] in ("affine", "loss"):
        assert memory_of(state).counts["updates"] == UPDATES.get(name, 1)


@pytest.mark.parametrize(("mode", "reason"), [("C", "extrapolated"), ("T", "table")])
def test_algorithms_whose_gradient_is_no_mean_over_samples_refuse_it(
    mode: str, reason: str
) -> None:
    recipe = SiHg.model_validate({"mode": mode})
    with pytest.raises(ValueError, match=f"engm does not go with si_hg.*{reason}"):
        recipe.build(ball_of("linf"), Engm())


@pytest.mark.parametrize("name", ["free", "ssds_jacobi", "si_hg_J"])
def test_the_inner_maximisation_never_sees_the_weights(name: str) -> None:
    recipe = Free(m=1) if name == "free" else EVERY[name]
    found = []
    for outer in (Plain(), Engm(alpha=0.01, estimator="exact")):
        algorithm = algorithm_of(recipe, outer)
        state = state_of(tiny_net(), algorithm)
        algorithm.step(state, batch_of(8))
        key = "slots" if name == "free" else "delta"
        part = state.parts[key]
        values = part.values if isinstance(part, SlotStore) else part.state_dict()
        found.append(values)
    one, two = found
    if isinstance(one, Tensor):
        assert_near(one, two, 1e-12)
    else:
        assert one.keys() == two.keys()
        for key in one:
            assert_near(one[key].double(), two[key].double(), 1e-6)


def test_each_pass_of_yopo_is_bounded_on_its_own() -> None:
    alpha, batch, twin = 0.5, batch_of(8), tiny_net()
    outer = Engm(alpha=alpha, estimator="exact")
    algorithm = algorithm_of(Yopo(m=1, n=1, start=Zero()), outer)
    state = state_of(tiny_net(), algorithm)
    algorithm.step(state, batch)
    grads = one_by_one(twin, CE, batch, torch.zeros_like(batch.images))
    weights = (alpha / grads.norm(dim=1)).clamp(max=1)
    assert float(weights.min()) < 0.9
    stem = sum(p.numel() for p in twin.conv1.parameters())
    assert_near(applied(state.model)[stem:], mean_of(weights, grads)[stem:], 1e-11)


# --- other networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("found", SOME)
def test_weights_that_are_not_trained_neither_move_nor_count(found: str) -> None:
    model, batch = tiny_net(batch_norm=True), batch_of(8)
    model.conv1.weight.requires_grad_(False)
    model.linear.bias.requires_grad_(False)
    kept = [model.conv1.weight.clone(), model.linear.bias.detach().clone()]
    outer = Engm(alpha=0.5, **FOUND[found])
    state = ready(outer, model)
    alone = one_by_one(model, CE, batch, moved(batch))
    grads = through_the_batch(model, CE, batch, moved(batch))
    update(outer, state, batch)
    assert torch.equal(model.conv1.weight, kept[0]) and torch.equal(model.linear.bias, kept[1])
    assert model.conv1.weight.grad is None
    if found.startswith("exact"):
        norms = (grads if found == "exact_train" else alone).norm(dim=1)
        assert_near(applied(model), mean_of((0.5 / norms).clamp(max=1), grads), 1e-11)


class Tied(nn.Module):
    """One weight used twice, and one that is never used."""

    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64, dtype=torch.float64)
        self.two = nn.Linear(64, 64, dtype=torch.float64)
        self.two.weight = self.one.weight
        self.out = nn.Linear(64, 4, dtype=torch.float64)
        if spare:
            self.spare = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


@pytest.mark.parametrize("found", EXACT)
@pytest.mark.parametrize("spare", [False, True], ids=["tied", "unused"])
def test_shared_and_unused_weights_have_a_norm_too(spare: bool, found: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied(spare)
    batch = batch_of(6)
    grads = one_by_one(model, CE, batch, moved(batch))
    norms = grads.norm(dim=1)
    alpha = float(norms.median())
    got = direction(Engm(alpha=alpha, **FOUND[found]), model, batch)
    assert_near(got, mean_of((alpha / norms).clamp(max=1), grads), 1e-12)


def test_one_linear_layer_has_the_norm_of_the_image_times_that_of_the_error() -> None:
    # The closed form: f = log(1 + exp(<a, x>)) has the gradient sigmoid(<a, x>) x.
    batch = batch_of(8, classes=1)
    slope = torch.randn(1, 8, 8, generator=generator(2), dtype=torch.float64) / 8
    model = Affine(slope)
    at = batch.images + moved(batch)
    sure = (at * slope).flatten(1).sum(1).sigmoid()
    norms = sure * at.flatten(1).norm(dim=1)
    alpha = float(norms.median())
    got = direction(Engm(alpha=alpha, estimator="exact"), model, batch)
    weights = (alpha / norms).clamp(max=1)
    assert_near(got, mean_of(weights * sure, at.flatten(1)), 1e-13)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["no_bn", "bn"])
@pytest.mark.parametrize("found", ["exact", "exact_one_by_one", "loglog", "input_train", "loss"])
def test_in_bfloat16_norms_are_near_those_of_float32_and_kept_in_it(
    found: str, batch_norm: bool
) -> None:
    batch = batch_of(8, dtype=torch.float32)
    delta, got = moved(batch), []
    for precision in ("fp32", "bf16"):
        outer = Engm(alpha=1.0, **FOUND[found])
        state = ready(outer, tiny_net(torch.float32, batch_norm=batch_norm))
        state.precision = precision
        oracle = state.oracle(batch, CE, "eval")
        weights = outer.weights(state, oracle, delta)
        if callable(weights):
            losses, grads = oracle.outer_grad(delta, "batch_nostat")
            weights = weights(losses, lambda grads=grads: grads)
        assert isinstance(weights, Tensor) and weights.dtype == torch.float32
        got.append(weights)
    assert float((got[0] / got[1]).log().abs().max()) < 0.1
    # And the same training step as plain SGD in bfloat16, while nothing is clipped.
    nets = []
    for outer in (Plain(), Engm(alpha=math.inf, **FOUND[found])):
        state = ready(outer, tiny_net(torch.float32, batch_norm=batch_norm))
        state.precision = "bf16"
        update(outer, state, batch, delta=delta)
        nets.append(state.model)
    assert same(*nets)
