"""Two workers with half a batch each are one worker with the whole batch: gloo, CPU, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near, tensors
from rank_helpers import one_of_two, run_both
from torch import Tensor, nn

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import TIMED, EpochMetrics
from raytrain.core.errors import TrainingFailed
from raytrain.core.file_systems import StorageError
from raytrain.core.train_state import TrainState
from raytrain.data.loader import iter_train, open_splits
from raytrain.testing.recorded import RecordedOperations
from raytrain.training import trainer
from raytrain.training.checkpoint import LAST, load, save
from raytrain.training.part_epoch import WithinEpoch
from raytrain.training.replay import ReplayedWherePossible, eager_steps
from raytrain.training.setup import start
from raytrain.training.trainer import fit

pytestmark = pytest.mark.slow  # several processes

ALGORITHMS: dict[str, Any] = {
    "natural": "natural",
    "fgsm_rs": "fgsm_rs",
    "pgd": {"name": "pgd", "steps": 2},
    "dynamic": {"name": "dynamic", "steps": 6, "c_max": 0.012, "decay": "constant"},
    "official": {"name": "dynamic", "preset": "official", "steps": 3},
    "remembered": {"name": "pgd", "steps": 1, "start": "remembered"},
    "free": {"name": "free", "m": 3},
    "yopo": {"name": "yopo", "m": 2, "n": 1},
    "trades": {"name": "trades", "steps": 2},
    "mart": {"name": "mart", "steps": 2},
    "gradalign": "gradalign",
    "si_hg": "si_hg",
    "si_hg_b": {"name": "si_hg", "mode": "B", "bank_dtype": "int8"},
    "si_hg_c": {"name": "si_hg", "mode": "C", "store": "none"},
    "si_hg_j": {"name": "si_hg", "mode": "J", "store": "batch_slot"},
    "si_hg_t": {"name": "si_hg", "mode": "T", "chunk": 8},
    "ssds": "ssds",
    "released": {"name": "ssds", "preset": "released"},
    "l2l": {"name": "l2l", "steps": 3, "hidden": 4},
    "l2l_trades": {"name": "l2l", "steps": 2, "cell": "gru", "hidden": 3, "loss": "trades"},
}

STEP: dict[str, Any] = {"name": "pgd", "steps": 1}
WITH_OUTER: dict[str, tuple[Any, Any]] = {
    "clip": (STEP, {"name": "clip", "max_norm": 0.5}),
    "awp": ({"name": "trades", "steps": 1}, {"name": "awp", "gamma": 0.01}),
    "engm_exact": (STEP, {"name": "engm", "estimator": "exact", "alpha": 1.0}),
    "engm_affine": (STEP, {"name": "engm", "tau": 2, "alpha": 1.0, "renorm": True}),
    "engm_loss": (STEP, {"name": "engm", "estimator": "loss", "quantile": 0.5, "tau": 3}),
    "engm_free": ({"name": "free", "m": 2}, {"name": "engm", "estimator": "input", "alpha": 1.0}),
    "engm_yopo": ({"name": "yopo", "m": 2, "n": 1}, {"name": "engm", "tau": 2, "probes": 8}),
    "awp_engm": (STEP, {"name": "awp", "then": {"name": "engm", "estimator": "input"}}),
}
NETWORKS: dict[str, tuple[str, Any]] = {
    "unused": ("unused_net", "sgd"),
    "unused_awp": ("unused_net", {"name": "awp", "gamma": 0.01, "then": "clip"}),
    "unused_engm": ("unused_net", {"name": "engm", "estimator": "exact", "alpha": 1.0}),
    "frozen": ("frozen_net", "sgd"),
    "in_training": ("in_training_net", "sgd"),
}
"""Networks of a user, whose passes do not reach all of their weights."""

CASES = [*ALGORITHMS, *WITH_OUTER, *NETWORKS]

WITH_MEMORY = ["remembered", "free", "si_hg_b", "si_hg_t", "released", "l2l", "engm_affine"]
"""One of each kind: per image, per slot, int8 in two stores, gradients, multipliers, an optimiser,
a fit."""


class UserNet(nn.Module):
    """Two layers, and a third that is used or not."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.last = nn.Linear(32, num_classes)
        self.extra = nn.Linear(num_classes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.flatten(1))))


class InTraining(UserNet):
    """The third layer is used in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + self.extra(logits) if self.training else logits


class Dropping(UserNet):
    """Half of all passes in training mode use the third layer, others on each worker."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return self.extra(logits) if self.training and float(torch.rand(())) < 0.5 else logits


unused_net, in_training_net = UserNet, InTraining


def frozen_net(num_classes: int) -> nn.Module:
    """The first layer is not trained."""
    network = UserNet(num_classes)
    network.first.requires_grad_(False)
    return network


def dropping_net(num_classes: int) -> nn.Module:
    """Each worker makes it with other weights."""
    torch.seed()
    return Dropping(num_classes)


def run_of(name: str, **changes: Any) -> RunConfig:
    network, outer = NETWORKS.get(name, ("", "sgd"))
    values = {
        # 99 images: the ranks own 50 and 49, the validation split of 61 is shared unevenly too.
        "data": {"name": "digits", "train_size": 99, "validation": 61},
        "model": f"{__name__}:{network}" if network else "small_cnn_nobn",
        "algorithm": ALGORITHMS.get(name, STEP),
        "outer": outer,
        "batch_size": 32,
        "epochs": 2,
        "precision": "fp64",
        "evaluation": {"steps": 2, "batch_size": 20},
        "optimizer": {"lr": 0.2, "schedule": "constant"},
        "device": "cpu",
    }
    if name in WITH_OUTER:
        values["algorithm"], values["outer"] = WITH_OUTER[name]
    return RunConfig.model_validate({**values, **changes})


def outcome(reports: list[EpochMetrics], state: TrainState) -> dict[str, Any]:
    """What two ways of computing the same run must agree on, and what each worker did."""
    return {
        "metrics": [{k: v for k, v in r.metrics().items() if k not in TIMED} for r in reports],
        "model": {name: value.clone() for name, value in state.model.state_dict().items()},
        "parts": dict(tensors({n: part.state_dict() for n, part in state.parts.items()})),
        "own_gradients": state.meter.input_backwards,
    }


def trained(
    run: RunConfig, context: DistributedContext, at: Path, resume: Path | None = None
) -> dict[str, Any]:
    """Train to the end; leave a checkpoint of the first epoch at `at`."""
    reports: list[EpochMetrics] = []
    state = None
    for report, state in fit(run, context, None if resume is None else load(resume)):
        reports.append(report)
        if report.epoch == 1:
            save(state, run, at, context)
    assert state is not None
    return outcome(reports, state)


def work(rank: int, folder: Path) -> None:
    """Everything one of two workers does; its findings go to a file."""
    with one_of_two(rank, folder) as context:
        found: dict[str, Any] = {
            name: trained(run_of(name), context, folder / f"{name}-2" / LAST) for name in CASES
        }
        unused = folder / "unused" / LAST
        for name in WITH_MEMORY:
            found[f"{name} resumed"] = trained(
                run_of(name), context, unused, folder / f"{name}-1" / LAST
            )
            found[f"{name} back"] = trained(
                run_of(name), context, unused, folder / f"{name}-2" / LAST
            )
        found["averaged"] = averages(context)
        found["recorded"] = stepwise(context, recorded=True)
        dropping = run_of("natural", model=f"{__name__}:dropping_net", ema=0.5)
        found["dropping"] = trained(dropping, context, unused)
        found["within"] = within_an_epoch(context, folder / "within" / LAST)
        found["failed"] = failure(context, folder / "full")
        found["left"] = [leaving(context, folder / "left", fails) for fails in (True, False)]
        torch.save(found, folder / f"found-{rank}.pt")


def within_an_epoch(context: DistributedContext, at: Path) -> tuple[dict[str, Tensor], ...]:
    """Weights and statistics after a run, and after one that goes on from a checkpoint within an epoch."""
    run = run_of("natural", model="small_cnn", ema=0.5)

    trainer._CHECK_EVERY["cpu"] = 1
    states = []
    for resume in (False, True):
        within = None if resume else WithinEpoch(1e-9, lambda state: save(state, run, at, context))
        rows = list(fit(run, context, load(at) if resume else None, within=within))
        states.append(
            {**rows[-1][1].model.state_dict(), **rows[-1][1].eval_model.state_dict(prefix="ema.")}
        )
    return tuple(states)


def stepwise(context: DistributedContext, *, recorded: bool) -> dict[str, Tensor]:
    """The weights after six steps of PGD whose attack's passes are recorded, or not."""
    run = run_of("pgd", model="small_cnn_nobn")
    splits = open_splits(run.data, context, torch.float64)
    state = start(run, splits, context)
    steps = ReplayedWherePossible(state, RecordedOperations) if recorded else eager_steps(state)
    batches = [
        batch for epoch in range(2) for batch in iter_train(splits.train, 32, 0, epoch, 0, False)
    ]
    for batch in batches:
        steps(run.algorithm_with({}), batch, {})
        state.step += 1
    if recorded:
        assert state.frozen is not None and state.frozen.predict.replayed > 0  # pyright: ignore
        assert state.execution.endswith("not steps: collectives are not recorded")
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def averages(context: DistributedContext) -> dict[str, dict[str, Tensor]]:
    """Networks after an epoch with BatchNorm, whose statistics every worker gathers alone."""
    run = run_of("natural", model="small_cnn", ema=0.5, epochs=1)
    _, state = next(fit(run, context))
    assert state.ema is not None
    return {
        name: {key: value.clone() for key, value in module.state_dict().items()}
        for name, module in (("model", state.model), ("ema", state.ema.module))
    }


def failure(context: DistributedContext, folder: Path) -> str:
    """What this worker learns when the leading one cannot write."""
    run = run_of("natural", epochs=1)
    _, state = next(fit(run, context))
    if context.leads:
        folder.write_text("a file where the folder should be")
    context.barrier()
    try:
        save(state, run, folder / LAST, context)
    except TrainingFailed as error:
        return str(error)
    return "nothing"


def leaving(context: DistributedContext, folder: Path, fails: bool) -> str:
    """What this worker learns at the end of a run if the leading one cannot reach the storage."""

    def away(path: Path) -> None:
        raise StorageError(None, "s3://bucket does not answer")

    actual = trainer.push
    trainer.push = away if fails and context.leads else actual
    try:
        trainer._leave(folder, context)
    except TrainingFailed as error:
        return str(error)
    finally:
        trainer.push = actual
    return "nothing"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One worker's findings, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    context = DistributedContext()
    return folder, {
        name: trained(run_of(name), context, folder / f"{name}-1" / LAST) for name in CASES
    }


@pytest.fixture(scope="module")
def together(alone: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """The findings of both workers."""
    folder, _ = alone
    run_both(work, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal to rounding: float64 sums over the batch are taken in another order."""
    assert found["model"].keys() == wanted["model"].keys()
    for name, value in wanted["model"].items():
        assert_near(found["model"][name], value, 1e-12)
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        # 1e-10: FOSC is a difference of larger numbers.
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-12)
    assert found["parts"].keys() == wanted["parts"].keys()
    for name, value in wanted["parts"].items():
        # 1e-10: Adam's and ENGM's numbers are ratios of small sums.
        assert_near(found["parts"][name], value, 1e-10)


@pytest.mark.parametrize("name", CASES)
class TestTwoRanks:
    def test_equal_one_rank_with_double_batch(
        self, name: str, alone: tuple[Path, dict[str, Any]], together: list[dict[str, Any]]
    ) -> None:
        for found in together:
            assert_same_run(found[name], alone[1][name])

    def test_agree_with_each_other_to_the_last_bit(
        self, name: str, together: list[dict[str, Any]]
    ) -> None:
        one, other = (found[name] for found in together)
        assert one["metrics"] == other["metrics"]
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])

    def test_share_the_gradients_of_one_rank(
        self, name: str, alone: tuple[Path, dict[str, Any]], together: list[dict[str, Any]]
    ) -> None:
        shares = [found[name]["own_gradients"] for found in together]
        assert sum(shares) == alone[1][name]["own_gradients"]
        if name == "dynamic":
            # Different numbers of inner passes on the two ranks, and nobody waited for ever.
            assert shares[0] != shares[1]
            assert 2 * 192 < sum(shares) < 6 * 192

    def test_leave_a_checkpoint_that_one_rank_goes_on_from(
        self,
        name: str,
        alone: tuple[Path, dict[str, Any]],
        together: list[dict[str, Any]],
        tmp_path: Path,
    ) -> None:
        del together  # has written it
        folder, wanted = alone
        found = trained(
            run_of(name), DistributedContext(), tmp_path / LAST, resume=folder / f"{name}-2" / LAST
        )
        last = {**wanted[name], "metrics": wanted[name]["metrics"][1:]}
        assert_same_run(found, last)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_two_ranks_go_on_from_the_checkpoint_of_one(
    name: str, alone: tuple[Path, dict[str, Any]], together: list[dict[str, Any]]
) -> None:
    wanted = alone[1][name]
    for found in together:
        later = {**wanted, "metrics": wanted["metrics"][1:]}
        assert_same_run(found[f"{name} resumed"], later)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_two_ranks_go_on_from_their_own_checkpoint(
    name: str, together: list[dict[str, Any]]
) -> None:
    for found in together:
        wanted = found[name]
        assert_same_run(found[f"{name} back"], {**wanted, "metrics": wanted["metrics"][1:]})


def test_two_ranks_go_on_from_a_checkpoint_within_an_epoch_bit_by_bit(
    together: list[dict[str, Any]],
) -> None:
    for found in together:
        whole, resumed = found["within"]
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_recorded_passes_of_two_ranks_are_the_passes_of_one(
    together: list[dict[str, Any]],
) -> None:
    wanted = stepwise(DistributedContext(), recorded=False)
    for found in together:
        for name, value in wanted.items():
            assert_near(found["recorded"][name], value, 1e-12)


def test_layers_that_are_used_now_and_then_stay_the_same_on_all_ranks(
    together: list[dict[str, Any]],
) -> None:
    one, other = (found["dropping"] for found in together)
    assert one["metrics"] == other["metrics"]
    assert [
        key for key in one["model"] if not torch.equal(one["model"][key], other["model"][key])
    ] == []


def test_a_weight_that_no_pass_reaches_keeps_its_first_value(
    together: list[dict[str, Any]],
) -> None:
    run = run_of("unused")
    untouched = start(
        run, open_splits(run.data, DistributedContext(), torch.float64), DistributedContext()
    ).model.state_dict()
    for found in together:
        for name in ("unused", "unused_awp"):
            for key in ("backbone.extra.weight", "backbone.extra.bias"):
                assert torch.equal(found[name]["model"][key], untouched[key])


@pytest.mark.parametrize("network", ["model", "ema"])
def test_networks_with_batch_statistics_are_the_same_on_all_ranks_after_an_epoch(
    network: str, together: list[dict[str, Any]]
) -> None:
    # The averaged network too: it is the one that all ranks judge, each on its own images.
    one, other = (found["averaged"][network] for found in together)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_storage_that_is_away_at_the_end_fails_all_ranks_and_names_where_the_run_is(
    together: list[dict[str, Any]],
) -> None:
    one, other = (found["left"] for found in together)
    assert one[0].startswith("storage: s3://bucket does not answer; the run is whole in /")
    assert other[0].startswith("storage: see the leading worker; the run is whole in /")
    assert one[1] == other[1] == "nothing"


def test_a_failed_write_of_the_leading_rank_is_told_on_all_ranks(
    together: list[dict[str, Any]],
) -> None:
    for found in together:
        assert found["failed"].startswith("storage: ")
