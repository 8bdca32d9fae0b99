"""Training by several workers, end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ray_helpers import ended, ended_here, runs_of

from raytrain.core.epoch_metrics import TIMED

pytestmark = [
    pytest.mark.ray,
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

RAISES_LATER = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear, self.calls = nn.Linear(64, classes), 0

    def forward(self, x):
        self.calls += self.training and len(x) > 2
        if self.calls > 1:
            raise ValueError("too late")
        return self.linear(x.flatten(1))

def net(num_classes):
    return Net(num_classes)
"""


def test_two_workers_train_what_one_worker_trains(tmp_path: Path, ray_folder: str) -> None:
    words = (
        "data.train_size=128",
        "epochs=2",
        "evaluation.steps=1",
        "batch_size=64",
        "algorithm.steps=2",
        "model=small_cnn_nobn",
        "device=cpu",
    )
    alone = ended_here(tmp_path, "train", *words, "workers=1", "--json")
    done = ended(tmp_path, ray_folder, "train", *words, "workers=2", "--json")
    assert (alone.exit_code, done.returncode) == (0, 0), alone.output + done.stderr
    one, two = (json.loads(result.stdout) for result in (alone, done))
    assert one["signature"] == two["signature"]
    for name in set(one["metrics"]) - set(TIMED):
        # float32: the sum over a batch is taken in another order.
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3, abs=1e-3), (
            name
        )
    runs, _ = runs_of(tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_what_the_users_network_raises_in_a_worker_is_on_the_screen_at_once(
    tmp_path: Path, ray_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tired.py").write_text(RAISES_LATER)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("data.train_size=128", "evaluation.steps=1", "device=cpu", "model=tired:net")
    alone = ended_here(tmp_path, "train", *words, "workers=1")
    done = ended(tmp_path, ray_folder, "train", *words, "workers=2")
    assert (alone.exit_code, done.returncode) == (1, 1)
    last = (result.stderr.splitlines()[-1] for result in (alone, done))
    one, two = (re.sub(r"\d+ images", "images", line) for line in last)
    assert one == two and "tired.py:" in one and "ValueError" in one and "too late" in one
    runs, _ = runs_of(tmp_path)
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
