"""The end of a sweep: other seeds, the same runs after a relaunch, one verdict of the test set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from sweep_helpers import FakeTracker, Store, row, space_of

from raytrain.commands import final
from raytrain.commands.final import Finals, summarised
from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.evaluation.confidence import wilson
from raytrain.tuning.budget import TrialRow
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.space.settings import Objective
from raytrain.tuning.study import open_study
from raytrain.tuning.trial_manager import TrialManager

BASE = {"epochs": 4, "threat": {"norm": "linf", "eps": 0.2}}


def trained(number: int, params: dict[str, Any], cost: float = 3.0) -> TrialRow:
    metrics = {"cost/fe_per_sample": cost}
    return TrialRow(number, "complete", (0.5,), params, metrics, 4, f"t{number:04d}")


def finals_of(seeds: int = 2) -> Finals:
    space = space_of()
    best = [
        (trained(7, {}), as_run({**BASE, "seed": 5}, {"optimizer.lr": 0.2})),
        (trained(3, {}), as_run({**BASE, "seed": 5}, {"optimizer.lr": 0.1})),
    ]
    return Finals.of(space.base_run, (Objective(),), best, seeds)


def ledger_of(folder: Path, store: Store, finals: Finals, resume: bool | None) -> TrialManager:
    study = open_study("final", folder, finals, finals.hash(), resume, 4.0)
    fidelity = Fidelity.of(finals.base_run, 10)
    return TrialManager(study, finals, FakeTracker(store), folder, fidelity, prefix="final")


def test_each_of_the_best_is_trained_on_seeds_that_the_search_did_not_use() -> None:
    finals = finals_of()
    assert finals.labels == (
        {"rank": 1, "trial": 7, "seed": 6},
        {"rank": 1, "trial": 7, "seed": 7},
        {"rank": 2, "trial": 3, "seed": 6},
        {"rank": 2, "trial": 3, "seed": 7},
    )
    assert [(run.optimizer.lr, run.seed) for run in finals.runs] == [
        (0.2, 6),
        (0.2, 7),
        (0.1, 6),
        (0.1, 7),
    ]
    assert finals.budget.trials == 4
    for label, run in zip(finals.labels, finals.runs, strict=True):
        assert finals.run(label) == run
    assert finals.hash() == finals_of().hash() != finals_of(3).hash()


def test_the_study_of_the_finals_goes_on_after_a_dead_driver(tmp_path: Path) -> None:
    finals, store = finals_of(), Store()
    manager = ledger_of(tmp_path / "final", store, finals, None)
    manager.recover()
    for number in range(4):
        manager.enqueue({"run": number})
    assert manager.begin("a") and manager.begin("b")
    manager.end("a", row(1, 0.5, final=True), lost=False)

    later = ledger_of(tmp_path / "final", store, finals, True)
    assert later.recover() == 1
    for name in "cde":
        assert later.begin(name)
        later.end(name, row(1, 0.5, final=True), lost=False)
    with pytest.raises(StopIteration):
        later.begin("f")
    told = later.history.rows()
    assert sorted((r.params["rank"], r.params["seed"]) for r in told) == [
        (1, 6),
        (1, 7),
        (2, 6),
        (2, 7),
    ]
    assert {r.handle for r in told} == set(store.status)
    assert all(handle.startswith("final") for handle in store.status)
    assert set(store.status.values()) == {"FINISHED"}
    assert len(later.study.get_trials(states=(TrialState.COMPLETE,))) == 4
    with pytest.raises(RequestError, match="has changed"):
        ledger_of(tmp_path / "final", store, finals_of(3), True)


@pytest.mark.parametrize("files", [("last.pt",), ("last.pt", "best.pt")])
def test_the_test_set_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    asked: list[Path] = []

    def evaluate(checkpoint: Path, storage: Path) -> Any:
        assert storage == tmp_path
        asked.append(checkpoint)
        shares = {"clean": wilson(8, 10), "pgd20": wilson(6, 10), "aa": wilson(5, 10)}
        return SimpleNamespace(accuracies=shares, strongest="aa", images=10, fe=420, trusted=True)

    monkeypatch.setattr(final, "evaluate", evaluate)
    for name in files:
        (tmp_path / name).touch()
    verdicts = [final.test_once(tmp_path, tmp_path) for _ in range(3)]
    assert asked == [tmp_path / files[-1]]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert verdicts[0] == {
        "clean": 0.8,
        "robust": 0.5,
        "images": 10,
        "attack": "aa",
        "fe": 420,
        "which": files[-1].removesuffix(".pt"),
        "trusted": True,
    }


def test_seeds_of_a_configuration_are_summarised_by_mean_and_deviation() -> None:
    def one(rank: int, seed: int, clean: float, robust: float, cost: float) -> Any:
        params = {"rank": rank, "trial": 10 * rank, "seed": seed}
        verdict = {"clean": clean, "robust": robust, "attack": "aa"}
        return trained(seed, params, cost), verdict

    second, first = summarised(
        [one(2, 1, 0.7, 0.3, 2.0), one(1, 1, 0.8, 0.4, 3.0), one(1, 2, 0.9, 0.6, 5.0)]
    )[::-1]
    assert (first.rank, first.trial, first.seeds, first.attack) == (1, 10, 2, "aa")
    assert (first.clean, first.robust) == pytest.approx((0.85, 0.5))
    assert (first.clean_std, first.robust_std) == pytest.approx((0.005**0.5, 0.02**0.5))
    assert first.fe_per_sample == 4.0
    assert (second.rank, second.seeds, second.robust_std) == (2, 1, 0.0)
