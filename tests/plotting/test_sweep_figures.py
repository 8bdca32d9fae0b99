"""Importances and pictures of studies that are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from raytrain.config.run import RunConfig
from raytrain.plotting import sweep_figures
from raytrain.plotting.sheet import COLOURS, GREY, MANY, colours_of, label, shown, some
from raytrain.plotting.sweep_figures import draw, in_order
from raytrain.plotting.sweep_slices import ALWAYS, panels
from raytrain.tuning.cost_curves import read_curves
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.history import History
from raytrain.tuning.importance import (
    Importance,
    Method,
    best_share,
    importances,
    importances_at_equal_cost,
)
from raytrain.tuning.space.settings import Budget, Objective, Search
from raytrain.tuning.trial_rows import RowLog

LR: BaseDistribution = FloatDistribution(1e-3, 1.0, log=True)
STEPS: BaseDistribution = IntDistribution(1, 10)
KIND: BaseDistribution = CategoricalDistribution(["pgd", "trades", "natural"])
BETA: BaseDistribution = FloatDistribution(1, 20)
FAR = 690.0  # FE per image of a whole run
IMAGES = 100


class MadeUp:
    """A space that leaves everything as it is."""

    def __init__(self, objectives: int) -> None:
        metrics = ["valid/robust", "valid/clean", "cost/seconds"][:objectives]
        modes: list[Any] = ["max", "max", "min"]
        pairs = zip(metrics, modes, strict=False)
        self.objective = tuple(Objective(metric=metric, mode=mode) for metric, mode in pairs)
        self.feasible: dict[str, Any] = {}
        self.search, self.budget, self.base_run = Search(), Budget(), RunConfig.model_validate({})

    def values(self, params: Any) -> dict[str, Any]:
        return dict(params)

    def sample(self, trial: Any) -> dict[str, Any]:
        return dict(trial.params)

    def violations(self, values: Any) -> dict[str, float]:
        del values
        return {}

    def run(self, values: Any) -> RunConfig:
        del values
        return self.base_run


def study_of(count: int, objectives: int = 1, seed: int = 0) -> optuna.Study:
    """Random trials of all outcomes; robustness is a matter of the learning rate and little else."""
    rng = np.random.default_rng(seed)
    directions: list[Any] = ["maximize", "maximize", "minimize"][:objectives]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=directions)
    study.add_trials([trial_of(number, rng, objectives) for number in range(count)])
    return study


def trial_of(number: int, rng: np.random.Generator, objectives: int) -> optuna.trial.FrozenTrial:
    lr, steps = float(10 ** rng.uniform(-3, 0)), int(rng.integers(1, 11))
    kind = str(rng.choice(["pgd", "trades", "natural"]))
    params: dict[str, Any] = {"optimizer.lr": lr, "algorithm.name": kind, "algorithm.steps": steps}
    dists = {"optimizer.lr": LR, "algorithm.name": KIND, "algorithm.steps": STEPS}
    if kind == "trades":
        params["algorithm.beta [name=trades]"] = float(rng.uniform(1, 20))
        dists["algorithm.beta [name=trades]"] = BETA
    top = 0.8 - 0.1 * (math.log10(lr) + 1.2) ** 2 + 0.005 * steps + 0.02 * rng.normal()
    draws = rng.random()
    outcome = "complete" if draws < 0.4 else "stopped" if draws < 0.88 else "diverged"
    outcome = "infeasible" if draws > 0.96 else outcome
    share = 1.0 if outcome in ("complete", "infeasible") else float(rng.choice([1 / 9, 1 / 3]))
    metrics = {"cost/fe": share * FAR * IMAGES, "cost/seconds": 20 + steps * 3 + rng.normal()}
    if outcome != "diverged":
        metrics |= {"valid/robust": top * share**0.15, "valid/clean": min(1.0, 1.5 - top)}
    metrics = {name: float(value) for name, value in metrics.items()}
    names = ["valid/robust", "valid/clean", "cost/seconds"][:objectives]
    done = outcome in ("complete", "infeasible")
    return create_trial(
        state=TrialState.COMPLETE if done else TrialState.PRUNED,
        params=params,
        distributions=dists,
        values=[metrics[name] for name in names] if done else None,
        user_attrs={
            "outcome": outcome,
            "origin": number,
            "last": {"metrics": metrics, "epoch": 9},
        },
    )


def history_of(study: optuna.Study) -> History:
    return History(study, MadeUp(len(study.directions)))


def journal(study: optuna.Study, folder: Path) -> None:
    """Nine rows of every finished trial, three or one of others."""
    with (folder / "rows.jsonl").open("w") as file:
        for trial in study.get_trials(deepcopy=False):
            metrics = trial.user_attrs["last"]["metrics"]
            rows = round(9 * metrics["cost/fe"] / (FAR * IMAGES))
            for row in range(1, rows + 1):
                value = metrics.get("valid/robust", 0.3) * (1 - math.exp(-row)) ** 0.5
                file.write(
                    json.dumps(
                        {
                            "trial": trial.number,
                            "epoch": row,
                            "cost/fe": FAR * IMAGES * row / 9,
                            "valid/robust": value,
                        }
                    )
                    + "\n"
                )


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def both(*stems: str) -> list[str]:
    return [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]


BY_COST = Fidelity(True, FAR, IMAGES)


def drawn(study: optuna.Study, folder: Path, method: Method = "ped-anova") -> list[Path]:
    curves = read_curves(RowLog(folder.parent / "rows.jsonl"), BY_COST, "valid/robust")
    equal = importances_at_equal_cost(study, curves, method)
    return draw(history_of(study), BY_COST, folder, curves, importances(study, method), equal, {})


@pytest.mark.parametrize("method", ["ped-anova", "fanova"])
def test_importances_are_shares_and_the_parameter_that_decides_comes_first(method: Any) -> None:
    found = importances(study_of(150), method)
    assert found[0].key == "optimizer.lr"
    assert found[0].value > 0.5 and all(type(one.value) is float for one in found)
    assert sum(one.value for one in found) == pytest.approx(1, rel=1e-12)
    assert [one.value for one in found] == sorted((one.value for one in found), reverse=True)


def test_where_all_trials_share_all_parameters_it_is_what_optuna_says() -> None:
    study = optuna.create_study(direction="maximize")
    rng = np.random.default_rng(3)
    for _ in range(40):
        x, y = (float(value) for value in rng.uniform(0, 1, 2))
        params, unit = {"x": x, "y": y}, FloatDistribution(0, 1)
        done = {"outcome": "complete", "origin": 0}
        study.add_trial(
            create_trial(
                params=params,
                distributions={"x": unit, "y": unit},
                value=x + 0.1 * y,
                user_attrs=done,
            )
        )
    pairs: list[tuple[Any, Any]] = [
        (
            "ped-anova",
            optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best_share(40)),
        ),
        ("fanova", optuna.importance.FanovaImportanceEvaluator(seed=0)),
    ]
    for method, evaluator in pairs:
        wanted = optuna.importance.get_param_importances(study, evaluator=evaluator)
        found = {one.key: one.value for one in importances(study, method)}
        assert found == pytest.approx(wanted, rel=1e-9)


def test_only_trials_that_were_trained_to_the_end_and_are_feasible_count() -> None:
    study = study_of(80)
    wanted = importances(study)
    lone = [t for t in study.get_trials() if t.user_attrs["outcome"] == "complete"]
    assert wanted[0].trials == len(lone) < 80
    clean = optuna.create_study(direction="maximize")
    clean.add_trials(lone)
    assert importances(clean) == wanted
    penalised = create_trial(  # told as the worst, which it never measured
        params={"optimizer.lr": 0.05},
        distributions={"optimizer.lr": LR},
        value=-1e9,
        user_attrs={"outcome": "diverged", "origin": 99},
    )
    clean.add_trials([penalised] * 50)
    assert importances(clean) == wanted


@pytest.mark.parametrize("method", ["ped-anova", "fanova"])
def test_a_conditional_parameter_says_how_many_trials_had_it(method: Any) -> None:
    study = study_of(150)
    done = [t for t in study.get_trials() if t.user_attrs["outcome"] == "complete"]
    had = [t for t in done if "algorithm.beta [name=trades]" in t.params]
    found = {one.key: one.trials for one in importances(study, method)}
    assert found["algorithm.beta [name=trades]"] == len(had) < found["optimizer.lr"] == len(done)


@pytest.mark.parametrize("method", ["ped-anova", "fanova"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_trials_tell_nothing(method: Any, count: int) -> None:
    study = optuna.create_study(direction="maximize")
    lone = [t for t in study_of(30).get_trials() if t.user_attrs["outcome"] == "complete"]
    study.add_trials(lone[:count])
    assert importances(study, method) == []


@pytest.mark.parametrize("method", ["ped-anova", "fanova"])
def test_a_parameter_or_an_objective_that_never_varies_tells_nothing(method: Any) -> None:
    def trial(x: float, value: float) -> optuna.trial.FrozenTrial:
        return create_trial(
            params={"x": x, "one": 1},
            distributions={"x": FloatDistribution(0, 1), "one": IntDistribution(1, 1)},
            value=value,
            user_attrs={"outcome": "complete", "origin": 0},
        )

    flat = optuna.create_study(direction="maximize")
    flat.add_trials([trial(k / 10, 0.5) for k in range(10)])
    assert importances(flat, method) == []
    varied = optuna.create_study(direction="maximize")
    varied.add_trials([trial(k / 10, k / 10) for k in range(10)])
    assert importances(varied, method) == [Importance("x", 1.0, 10)]


def test_of_several_objectives_the_first_counts() -> None:
    assert importances(study_of(200, objectives=3))[0].key == "optimizer.lr"


@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.slow
def test_a_sweep_has_the_pictures_that_show_something(
    tmp_path: Path, count: int, objectives: int
) -> None:
    study = study_of(count, objectives)
    journal(study, tmp_path)
    found = drawn(study, tmp_path / "figures", "ped-anova")
    stems = ["history", "importances", "slices", "front", "curves"]
    if count == 3:
        stems.remove("importances")
    if objectives == 1:
        stems.remove("front")
    assert names(found) == both(*stems)
    for path in found:
        text = path.read_bytes()
        assert text.startswith(b"\x89PNG") if path.suffix == ".png" else b"</svg>" in text


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert drawn(study_of(0), tmp_path / "figures", "ped-anova") == []
    assert not (tmp_path / "figures").exists()


def test_trials_without_a_value_or_a_journal_are_no_obstacle(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    lost = {"origin": 0, "outcome": "diverged", "last": {"metrics": {}, "epoch": 0}}
    params: Any = {"params": {"optimizer.lr": 0.1}, "distributions": {"optimizer.lr": LR}}
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=lost, **params))
    found = drawn(study, tmp_path / "figures", "fanova")
    assert names(found) == both("history")


@pytest.mark.slow
def test_pictures_do_not_depend_on_anything_but_the_sweep(tmp_path: Path) -> None:
    study = study_of(40)
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        journal(study, folder)
        drawn(study, folder / "figures", "ped-anova")
    for stem in ("history", "importances", "slices", "curves"):
        one, other = (tmp_path / name / "figures" / f"{stem}.png" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_no_more_is_drawn_than_can_be_seen() -> None:
    assert list(some(MANY)) == list(range(MANY))
    drawn = list(some(10 * MANY))
    assert len(drawn) == MANY == len(set(drawn)) and drawn == sorted(drawn)


def test_a_trial_stands_where_the_sweep_stood_when_it_ended() -> None:
    study = study_of(25)
    ended = in_order(history_of(study), BY_COST)
    costs = [one.row.metrics["cost/fe"] / IMAGES for one in ended]
    assert [one.spent for one in ended] == pytest.approx(list(np.cumsum(costs)), rel=1e-12)
    assert [one.row.number for one in ended] == list(range(25))


def test_units_are_named_and_shares_are_per_cent() -> None:
    assert label("valid/robust") == "valid/robust, %" and shown("valid/robust", 0.5) == 50
    assert label("train/fosc") == "train/fosc, nats" and shown("train/fosc", 0.5) == 0.5
    assert label("cost/seconds") == "cost/seconds, s" and label("cost/fe") == "cost/fe, FE"
    assert label("train/inner_steps") == "train/inner_steps"


def test_panels_are_by_importance_and_never_without_the_algorithm_and_the_learning_rate() -> None:
    varied = [f"p{k:02d}" for k in range(20)] + ["optimizer.lr", "algorithm.name"]
    order = ["p07", "optimizer.lr", "p03"]
    shown_keys = panels(order, varied)
    assert shown_keys[:4] == ["p07", "optimizer.lr", "p03", "algorithm.name"]
    assert len(shown_keys) == 12 == len(set(shown_keys))
    last = panels(varied[:20] + list(ALWAYS), varied)
    assert last == [*varied[:10], "algorithm.name", "optimizer.lr"]
    assert panels([], ["b", "a"]) == ["a", "b"] and panels(["a"], []) == []


def test_a_colour_belongs_to_one_algorithm_and_none_to_the_only_one() -> None:
    names = [f"a{k}" for k in range(9)]
    colours = colours_of([*names, *names])
    assert list(colours) == names and [*colours.values()] == [*COLOURS, GREY, GREY]
    assert colours_of(["pgd", "pgd"]) == {} == colours_of([])


def test_stopped_trials_and_no_others_are_hollow() -> None:
    study = study_of(60)
    trials = in_order(history_of(study), BY_COST)
    figure = sweep_figures._history(trials, history_of(study).space.objective[0])
    (axes,) = figure.axes
    points: list[Any] = [one for one in axes.collections if len(np.asarray(one.get_offsets()))]
    hollow = sum(len(one.get_offsets()) for one in points if not len(one.get_facecolors()))
    stopped = sum(trial.stopped for trial in trials)
    assert 0 < hollow == stopped < sum(len(one.get_offsets()) for one in points) == len(trials)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert f"stopped early ({stopped})" in legend and {"pgd", "trades", "natural"} <= set(legend)
