"""`raytrain train --profile`: what it leaves, and that its table counts the passes of a step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from raytrain.cli.app import app

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

STEPS = 2  # of PGD: each a pass of the network, as is the update


def test_a_profile_counts_the_passes_of_a_step_and_leaves_validation_out(here: Path) -> None:
    words = ("data.train_size=128", "batch_size=16", f"algorithm.steps={STEPS}", "epochs=1")
    result = CliRunner().invoke(
        app, ["train", "--profile", "--json", "model=small_cnn", "device=cpu", *words]
    )
    assert result.exit_code == 0, result.output
    folder = Path(json.loads(result.stdout)["profile"])
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    text = (folder / "profile.md").read_text()
    # Eight steps an epoch: the sixth to the eighth; three convolutions a pass.
    assert "mean of 3" in text
    assert f"| aten::convolution_backward | {3 * (STEPS + 1):.1f} |" in text
    parts = text.partition("\n\n")[0]
    shares = [float(share) for share in re.findall(r"(-?[\d.]+)% \|$", parts, re.MULTILINE)]
    assert len(shares) == 5 and min(shares) >= 0 and 99 < sum(shares) < 101


def test_without_the_option_nothing_is_profiled(here: Path) -> None:
    words = ("data.train_size=128", "batch_size=64", "algorithm.steps=1", "epochs=1")
    result = CliRunner().invoke(app, ["train", "--json", *words])
    found = json.loads(result.stdout)
    assert "profile" not in found and not (Path(found["checkpoints"]) / "profile").exists()


@pytest.mark.parametrize("images", [64, 160])  # two steps, and exactly as many as are left out
def test_a_training_too_short_for_a_profile_says_so(here: Path, images: int) -> None:
    words = (f"data.train_size={images}", "batch_size=32", "algorithm.steps=1", "epochs=1")
    for more in ((), ("--json",)):
        result = CliRunner().invoke(app, ["train", "--profile", *words, *more])
        assert result.exit_code == 0 and "nothing was profiled" in result.stderr, result.output
    assert "profile" not in json.loads(result.stdout)
    assert not torch.autograd.profiler._is_profiler_enabled


def test_only_a_training_in_this_process_is_profiled(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--profile", "workers=2"])
    assert result.exit_code == 2 and "--profile: " in result.stderr
    assert not (here / "mlflow.db").exists()
