"""What only a CUDA device can show; skipped without one."""

import pytest
import torch

from raytrain.config import RunConfig
from raytrain.loop import fit
from raytrain.place import Place
from raytrain.record import Report
from raytrain.request import as_run

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


def last(run: RunConfig, device: str) -> Report:
    *_, (report, _) = fit(run, Place(torch.device(device)))
    return report


def test_a_gpu_trains_what_a_cpu_trains() -> None:
    # From zero: the generators of the two devices draw different noise.
    run = as_run({**SMALL, "precision": "fp64", "algorithm": {"name": "pgd", "start": "zero"}})
    found, wanted = last(run, "cuda"), last(run, "cpu")
    # 1e-9: sums over a batch run in another order.
    assert found.loss == pytest.approx(wanted.loss, rel=1e-9)
    assert found.fe == wanted.fe


@pytest.mark.parametrize("algorithm", ["natural", "fgsm_rs", "n_fgsm", "pgd", "dynamic"])
def test_every_algorithm_trains_in_bf16(algorithm: str) -> None:
    report = last(as_run({**SMALL, "precision": "bf16", "algorithm": algorithm}), "cuda")
    assert 0 < report.loss < 3 and report.fe > 0
