"""Sentinels in what the commands tell, in MLflow and in sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState
from sweep_helpers import SPACE, Launch, space_of
from sweep_helpers import row as told
from test_sentinels import DROP, GAP, Ending, ended, run_of
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.config.cost_estimate import is_bound
from raytrain.config.request import as_run
from raytrain.distributed.jobs import Job
from raytrain.tuning.space.reading import read_space
from raytrain.tuning.space.settings import CATASTROPHIC, Limit
from raytrain.tuning.trainable import SingleTrainable

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


@pytest.fixture(scope="module")
def ending() -> Ending:
    return ended()


@pytest.mark.slow
def test_terminal_and_mlflow_say_why(ending: Ending, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of(sentinels=ending[1])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["train", "run.yaml", "--json"])
    assert result.exit_code == 0, result.output
    told_of = json.loads(result.stdout)
    found = MlflowClient(told_of["tracking_uri"]).get_run(told_of["run_id"])
    why = found.data.tags["stopped_by"]
    assert why.startswith(f"sentinels.stop.fgsm_gap: {GAP} is ")
    epoch = len(ending[0])
    assert f"stopped early after epoch {epoch}/5: {why}" in result.stderr
    assert found.info.status == "FINISHED" and found.data.metrics[GAP] == told_of["metrics"][GAP]
    again = CliRunner().invoke(app, ["train", "--resume", told_of["run_id"]])
    assert again.exit_code == 2 and why in again.stderr


def stopped_row(epoch: int, value: float, gap: float) -> dict[str, Any]:
    """What a slot hands over when a sentinel ends a trial."""
    result = told(epoch, value, final=True)
    metrics = {**json.loads(result["metrics"]), GAP: gap}
    return {
        **result,
        "metrics": json.dumps(metrics),
        "tags": json.dumps({"stopped_by": "sentinels.stop.fgsm_gap: x"}),
    }


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_trial_that_a_sentinel_ended_is_finished_and_infeasible(
    tmp_path: Path, sampler: str
) -> None:
    base = {**SPACE["base"], "sentinels": {"stop": {"fgsm_gap": 0.3}}}
    space = space_of(base=base, search={"sampler": sampler, "pruner": "none"})
    launch = Launch(tmp_path / "s", space=space)
    launch.complete("a", 0.2, 0.3)
    launch.begin("b")
    launch.manager.end("b", stopped_row(1, 0.9, gap=0.45), lost=False)
    good, bad = launch.trials()
    assert list(bad.constraints) == [*CATASTROPHIC, GAP, "trained"] == list(good.constraints)
    assert bad.constraints[GAP] == pytest.approx(0.15)
    assert (bad.state, bad.values) == (TrialState.COMPLETE, [0.9])
    assert bad.user_attrs["outcome"] == "infeasible"
    assert launch.manager.study.best_trial.number == good.number
    best = launch.manager.best()
    assert best is not None and best.value == 0.3
    tags = launch.store.tags["t0001"]
    assert tags["stopped_by"] == "sentinels.stop.fgsm_gap: x" and tags["outcome"] == "infeasible"
    assert "stopped_by" not in launch.store.tags["t0000"]


def test_levels_bound_what_feasible_does_not_bound_itself() -> None:
    base = {**SPACE["base"], "sentinels": {"stop": {"fgsm_gap": 0.3, "robust_drop": 0.2}}}
    assert space_of(base=base).feasible == {DROP: Limit(max=0.2), GAP: Limit(max=0.3)}
    own = space_of(base=base, feasible={GAP: {"max": 0.6}}).feasible
    assert own == {DROP: Limit(max=0.2), GAP: Limit(max=0.6)}
    assert space_of().feasible == CATASTROPHIC
    again = space_of(base=base)
    assert (
        type(again).model_validate(again.model_dump(mode="json", by_alias=True)).hash()
        == again.hash()
    )
    with pytest.raises(ValueError, match="fgsm_gap"):
        _ = space_of(base={"sentinels": {"stop": {"fgsm_gap": 3}}}).base_run


@pytest.mark.slow
def test_a_slot_hands_over_why_a_trial_ended(ending: Ending, tmp_path: Path) -> None:
    job = Job.of(run_of(sentinels=ending[1]), tmp_path / "trial", False)
    slot = SingleTrainable({"job": job})
    rows = [slot.step() for _ in ending[0]]
    assert [row["final"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert json.loads(rows[-1]["tags"])["stopped_by"].startswith("sentinels.stop.fgsm_gap: ")
    # Told once more to a driver that died before it learned of it.
    slot.reset_config({"job": Job.of(run_of(sentinels=ending[1]), tmp_path / "trial", True)})
    again = slot.step()
    while not again["done"]:
        again = slot.step()
    assert again["final"] and again["tags"] == rows[-1]["tags"]
    slot.cleanup()


@pytest.mark.parametrize("name", ["fgsm_rs", "n_fgsm"])
def test_shipped_spaces_that_single_steps_threaten_bound_the_gap(name: str) -> None:
    space = read_space(Path(__file__).parents[2] / "search_spaces" / f"{name}.yaml")
    assert space.feasible == {GAP: Limit(max=0.3), DROP: Limit(max=0.5)}


def test_a_rule_makes_the_price_of_a_run_a_bound() -> None:
    assert is_bound(as_run({"sentinels": {"stop": {"zero_grad": 0.5}}}))
    assert not is_bound(as_run(None)) and not is_bound(as_run({"sentinels": None}))
