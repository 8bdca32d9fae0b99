"""A sweep: Tune as the executor of what the ledger asks for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raytrain import provenance
from raytrain.api import leave_network
from raytrain.checkpoint import to_yaml
from raytrain.config import RunConfig
from raytrain.data.loader import Splits
from raytrain.loop import preflight
from raytrain.request import parse_overrides
from raytrain.session import interruptible, session, slots, worker_resources
from raytrain.sweep.ledger import Ledger, SweepProgress, TrialRow
from raytrain.sweep.slots import GroupSlot, SingleSlot
from raytrain.sweep.space import SearchSpace, read_space
from raytrain.sweep.study import open_study
from raytrain.tracking import Tracker, tracked
from raytrain.types import RequestError

Watch = Callable[[SweepProgress], None]


@dataclass(frozen=True)
class TuneResult:
    """A finished sweep."""

    name: str
    run_id: str  # of the parent run in MLflow
    metric: str
    direction: int  # 1: larger is better, -1: smaller
    best: TrialRow | None
    trials: list[TrialRow]
    best_file: Path | None  # the best configuration as a run file
    space_file: Path
    tracking_uri: str

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return asdict(self)


def tune(
    space: SearchSpace | str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    name: str | None = None,
    trials: int | None = None,
    watch: Watch | None = None,
) -> TuneResult:
    """Search `space` until its budget is spent; each trial is a child run in MLflow.

    `space` is a SearchSpace or a YAML file, and may be left out with `resume`, the name of a sweep to
    continue: nothing that finished is repeated, what was under way goes on from its checkpoint.
    `overrides` are `key=value` words for the base run; `trials` replaces the budget of the file.

    Raises:
        RequestError: if something is wrong with the request; nothing was begun.
    """
    space = _space(space, overrides, resume, trials)
    base = space.base_run
    splits = preflight(base)
    name = resume or name or f"{space.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (base.storage / base.experiment / name).resolve()
    space_file = folder / "space.yaml"
    with interruptible(), tracked(base.tracking_uri, base.experiment) as tracker:
        with session(base, trials=space.budget.concurrent or 1):
            concurrent = slots(base, space.budget.concurrent)
            study = open_study(name, folder, space, resume=resume is not None)
            space_file.write_text(_space_yaml(space))
            parent = _open_parent(tracker, study, name, space, space_file)
            ledger = Ledger(study, space, tracker, parent, folder, watch)
            ledger.recover()
            try:
                _execute(ledger, base, folder, concurrent)
            finally:
                shutil.rmtree(folder / "ray", ignore_errors=True)  # Tune's notes: never read again
        best_file = _leave(tracker, ledger, parent, folder, splits)
    return TuneResult(
        name=name,
        run_id=parent,
        metric=space.objective.metric,
        direction=1 if space.objective.mode == "max" else -1,
        best=ledger.best(),
        trials=ledger.rows(),
        best_file=best_file,
        space_file=space_file,
        tracking_uri=tracker.uri,
    )


def _space(
    space: SearchSpace | str | Path | None,
    overrides: Iterable[str],
    resume: str | None,
    trials: int | None,
) -> SearchSpace:
    if space is None and resume is None:
        raise RequestError("SPACE.yaml: expected a search space, or --resume NAME")
    if space is None:
        storage = Path(parse_overrides(overrides).get("storage", "runs"))
        found = sorted(storage.glob(f"*/{resume}/space.yaml"))
        if not found:
            raise RequestError(f"--resume: there is no sweep {resume} below {storage}")
        space = found[0]
    if not isinstance(space, SearchSpace):
        space = read_space(Path(space), overrides)
    if trials is not None:
        budget = space.budget.model_copy(update={"trials": trials})
        space = space.model_copy(update={"budget": budget})
    return space


def _open_parent(
    tracker: Tracker, study: Any, name: str, space: SearchSpace, space_file: Path
) -> str:
    """The sweep's own run in MLflow: a new one, or that of the launch being continued."""
    known = study.user_attrs.get("parent_run_id")
    if known is not None:
        tracker.reopen(known)
        return known
    base = space.base_run
    parent = tracker.open(
        name,
        provenance.parameters(base),
        {
            **provenance.tags(base),
            "sweep": name,
            "sampler": space.search.sampler,
            "pruner": space.search.pruner,
            "mlflow.note.content": space.description,
        },
    )
    study.set_user_attr("parent_run_id", parent)
    tracker.artifact(parent, space_file)
    tracker.text(parent, to_yaml(base), "base.yaml")
    return parent


def _execute(ledger: Ledger, base: RunConfig, folder: Path, concurrent: int) -> None:
    if base.workers == 1:
        resources = worker_resources(base)
        trainable: Any = ray_tune.with_resources(
            SingleSlot, ray_tune.PlacementGroupFactory([{k: v for k, v in resources.items() if v}])
        )
    else:
        # The workers are Ray Train's; the slot only passes rows on, and must not take their place.
        trainable = ray_tune.with_resources(
            GroupSlot, ray_tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
        )
    ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            num_samples=-1,
            metric="epoch",
            mode="max",
            search_alg=_Search(ledger),
            scheduler=_Pruning(ledger),
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name=f"launch-{time.time_ns():x}",
            storage_path=str(folder / "ray"),
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=0),
        ),
    ).fit()


class _Search(Searcher):
    """Tune's searcher interface over the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(metric="epoch", mode="max")
        self._ledger = ledger

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        del metric, mode, config, spec
        return True

    def suggest(self, trial_id: str) -> Any:
        try:
            return self._ledger.begin(trial_id)
        except StopIteration:
            return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._ledger.end(trial_id, result, lost=error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # the study is the state

    def restore(self, checkpoint_path: str) -> None:
        del checkpoint_path

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher; the ledger holds files and threads


class _Pruning(FIFOScheduler):
    """Early stopping by Optuna's pruner, whose state is in the study and survives a restart."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @property
    def metric(self) -> str:
        return "epoch"

    def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
        del metric, mode, spec
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        del tune_controller
        stop = self._ledger.row(trial.trial_id, dict(result))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _leave(
    tracker: Tracker, ledger: Ledger, parent: str, folder: Path, splits: Splits
) -> Path | None:
    """What a sweep leaves on its parent run and beside its study."""
    best = ledger.best()
    progress = ledger.progress()
    tracker.log(
        parent,
        {"sweep/trials": float(progress.finished), "sweep/stopped_early": float(progress.pruned)},
    )
    if best is None or best.value is None:
        return None
    tracker.log(parent, {**best.metrics, "sweep/best": best.value})
    tracker.tag(parent, {"best_trial": str(best.number), "best_run_id": best.run_id})
    run = ledger.run_of(best.number)
    best_file = folder / "best.yaml"
    best_file.write_text(to_yaml(run))
    tracker.artifact(parent, best_file)
    leave_network(tracker, best.run_id, folder / "trials" / best.run_id, splits.valid)
    return best_file


def _space_yaml(space: SearchSpace) -> str:
    shown = space.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump({"name": space.name, **shown}, sort_keys=False)
