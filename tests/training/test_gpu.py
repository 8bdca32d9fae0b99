"""What only a CUDA device can show; skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.algorithms import RECIPES
from raytrain.attacks.autoattack import STAGES, survivors
from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.config.performance import Performance
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.recording import CudaGraphs
from raytrain.core.threat_models import Linf
from raytrain.core.types import BatchRandom
from raytrain.data.loader import open_splits
from raytrain.outer import OUTERS
from raytrain.training.checkpoint import LAST, load, save
from raytrain.training.device_peak import bf16_peak
from raytrain.training.preview import preview_run
from raytrain.training.setup import preflight
from raytrain.training.trainer import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = {
    "data": {"name": "digits", "train_size": 256, "pad": 0},
    "model": "small_cnn_nobn",
    "batch_size": 64,
    "epochs": 2,
    "evaluation": {"steps": 2},
}


def last(run: RunConfig, device: str) -> EpochMetrics:
    *_, (report, _) = fit(run, DistributedContext(torch.device(device)))
    return report


def test_a_gpu_trains_what_a_cpu_trains() -> None:
    # From zero: the generators of the two devices draw different noise.
    run = as_run({**SMALL, "precision": "fp64", "algorithm": {"name": "pgd", "start": "zero"}})
    found, wanted = last(run, "cuda"), last(run, "cpu")
    # 1e-9: sums over a batch run in another order.
    assert found.loss == pytest.approx(wanted.loss, rel=1e-9)
    assert found.fe == wanted.fe


def test_the_share_of_the_peak_is_recorded_on_gpus_whose_peak_is_known() -> None:
    share = last(as_run(SMALL), "cuda").bf16_peak_share
    if bf16_peak(torch.cuda.get_device_name()) is None:
        assert share is None
    else:
        assert share is not None and 0 < share < 1


@pytest.mark.parametrize("algorithm", [name for name in RECIPES if name != "nested"])
@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_a_recorded_step_is_the_step(algorithm: str, mode: str) -> None:
    run = as_run({**SMALL, "precision": "fp64", "algorithm": algorithm, "performance": mode})
    plain = run.model_copy(update={"performance": Performance(mode="eager")})
    found, wanted = last(run, "cuda"), last(plain, "cuda")
    # 1e-6: a GPU adds up in no fixed order.
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert (found.fe, found.samples) == (wanted.fe, wanted.samples)


@pytest.mark.parametrize("outer", OUTERS)
def test_a_recorded_outer_update_is_the_update(outer: str) -> None:
    run = as_run({**SMALL, "precision": "fp64", "outer": outer, "performance": "graph"})
    plain = run.model_copy(update={"performance": Performance(mode="eager")})
    assert last(run, "cuda").loss == pytest.approx(last(plain, "cuda").loss, rel=1e-6)


def test_recorded_passes_leave_the_flags_of_autoattack() -> None:
    device = torch.device("cuda")
    splits = open_splits(as_run(SMALL).data, DistributedContext(device))
    *_, (_, state) = fit(as_run(SMALL), DistributedContext(device))
    rows = torch.arange(64, device=device)
    batch = splits.valid.batch(rows, BatchRandom(0, 64, slice(None), device))
    flags = []
    for recorder in (None, CudaGraphs(device)):
        counted = CountedModel(state.model, Meter(), recorder, largest=64)
        right = counted.classes(batch.images) == batch.labels
        images, labels = batch.images[right], batch.labels[right]
        flags.append([survivors(s, counted, images, labels, Linf(eps=0.1), 0) for s in STAGES])
    assert all(map(torch.equal, *flags))


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
def test_a_dry_run_measures_steps_on_the_device(mode: str) -> None:
    run = as_run({**SMALL, "performance": mode})
    before = torch.cuda.get_rng_state()
    preview = preview_run(run, preflight(run), None)
    assert preview.execution.mode == mode and preview.measured is not None
    assert preview.measured.fe == 64 * 23
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", [name for name in RECIPES if name != "nested"])
def test_every_algorithm_trains_in_bf16(algorithm: str) -> None:
    report = last(as_run({**SMALL, "precision": "bf16", "algorithm": algorithm}), "cuda")
    assert 0 < report.loss < 10 and report.fe > 0


@pytest.mark.parametrize("outer", OUTERS)
def test_every_outer_update_trains_in_bf16(outer: str) -> None:
    report = last(as_run({**SMALL, "precision": "bf16", "outer": outer}), "cuda")
    assert 0 < report.loss < 10 and report.fe > 0


@pytest.mark.parametrize(
    "algorithm", ["si_hg", "ssds", "free", "l2l", {"name": "si_hg", "mode": "B"}], ids=str
)
def test_a_gpu_resumes_with_its_memories(algorithm: Any, tmp_path: Path) -> None:
    run, context = (
        as_run({**SMALL, "algorithm": algorithm}),
        DistributedContext(torch.device("cuda")),
    )
    rows = fit(run, context)
    _, state = next(rows)
    save(state, run, tmp_path / LAST, context)
    wanted, _ = next(rows)
    found, _ = next(fit(run, context, load(tmp_path / LAST)))
    # 1e-3: a GPU adds up in no fixed order.
    assert found.loss == pytest.approx(wanted.loss, rel=1e-3)
