"""The cost at which trials are compared, and importances over finished and stopped ones there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from raytrain.tuning.cost_curves import CostCurve, common_cost, read_curves
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.importance import (
    EqualCost,
    Importance,
    importances,
    importances_at_equal_cost,
    most_telling,
)
from raytrain.tuning.trial_rows import RowLog

ENDS = st.tuples(st.integers(1, 20), st.integers(0, 20))


@given(st.lists(ENDS, min_size=1, max_size=12))
def test_no_cost_is_reached_by_more_curves_and_no_higher_one_by_as_many(
    ends: list[tuple[int, int]],
) -> None:
    curves = [CostCurve((first, first + more), (0.0, 1.0)) for first, more in ends]
    cost = common_cost(curves)
    assert cost is not None

    def reached(at: float) -> int:
        return sum(curve.reaches(at) for curve in curves)

    every = [half / 2 for half in range(100)]
    assert reached(cost) == max(map(reached, every))
    assert all(reached(at) < reached(cost) for at in every if at > cost)


def test_without_curves_there_is_no_cost() -> None:
    assert common_cost([]) is None


def test_a_curve_is_exact_at_its_rows_and_straight_between_them() -> None:
    curve = CostCurve((10.0, 20.0, 40.0), (0.1, 0.5, 0.3))
    assert [curve.at(cost) for cost in (10, 15, 20, 30, 40)] == pytest.approx(
        [0.1, 0.3, 0.5, 0.4, 0.3]
    )
    assert [curve.reaches(cost) for cost in (9.9, 10, 40, 40.1)] == [False, True, True, False]


def test_curves_are_read_once_per_cost_and_without_what_is_no_number(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"trial": 3, "cost/fe": 100.0, "valid/robust": 0.2},
        {"trial": 3, "cost/fe": 200.0, "valid/robust": float("nan")},
        {"trial": 4, "cost/fe": 100.0},
        {"trial": 3, "cost/fe": 300.0, "valid/robust": 0.4},
        {"trial": 3, "cost/fe": 300.0, "valid/robust": 0.9},  # an epoch that was trained again
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_curves(RowLog(file), Fidelity(True, 10.0, 100), "valid/robust")
    assert found == {3: CostCurve((1.0, 3.0), (0.2, 0.4))}


def sweep(count: int) -> tuple[optuna.Study, dict[int, CostCurve]]:
    """Trials whose robustness is a matter of x at every cost; a third is finished, the others stopped."""
    rng = np.random.default_rng(0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, unit = optuna.create_study(direction="maximize"), FloatDistribution(0, 1)
    curves = {}
    for number in range(count):
        x, y = (float(value) for value in rng.uniform(0, 1, 2))
        whole = number % 3 == 0
        ends = 9.0 if whole else 3.0
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if whole else TrialState.PRUNED,
                params={"x": x, "y": y},
                distributions={"x": unit, "y": unit},
                value=x if whole else None,
                user_attrs={"outcome": "complete" if whole else "stopped", "origin": number},
            )
        )
        curves[number] = CostCurve((1.0, ends), (x / ends, x))
    return study, curves


def test_stopped_trials_count_at_equal_cost() -> None:
    study, curves = sweep(60)
    found = importances_at_equal_cost(study, curves)
    assert found is not None and (found.cost, found.trials) == (3.0, 60)
    assert found.importances[0].key == "x" and {one.trials for one in found.importances} == {60}
    assert {one.trials for one in importances(study)} == {20}
    assert sum(one.value for one in found.importances) == pytest.approx(1, rel=1e-12)


def test_values_at_equal_cost_are_those_of_the_curves() -> None:
    """A study that finished with the values at that cost has the same importances."""
    study, curves = sweep(60)
    same = optuna.create_study(direction="maximize")
    for number, trial in enumerate(study.get_trials()):
        params: Any = {"params": trial.params, "distributions": trial.distributions}
        done = {"outcome": "complete", "origin": number}
        same.add_trial(create_trial(value=curves[number].at(3.0), user_attrs=done, **params))
    found = importances_at_equal_cost(study, curves)
    assert found is not None and found.importances == importances(same)


def test_a_trial_without_a_curve_or_that_diverged_does_not_count() -> None:
    study, curves = sweep(30)
    lost = {"outcome": "diverged", "origin": 30}
    trial = study.get_trials()[0]
    params: Any = {"params": trial.params, "distributions": trial.distributions}
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=lost, **params))
    del curves[1]
    found = importances_at_equal_cost(study, {**curves, 30: CostCurve((1.0, 50.0), (0.0, 1.0))})
    assert found is not None and found.trials == 29
    finished = {number: curve for number, curve in curves.items() if number % 3 == 0}
    assert (
        importances_at_equal_cost(study, finished) is None is importances_at_equal_cost(study, {})
    )


def test_the_importances_of_more_trials_are_told() -> None:
    few, many = [Importance("a", 1.0, 5)], [Importance("b", 1.0, 20)]
    assert most_telling(few, EqualCost(3.0, 20, many)) is many
    assert most_telling(many, EqualCost(3.0, 5, few)) is many
    assert most_telling(few, EqualCost(3.0, 20, [])) is few and most_telling(few, None) is few
