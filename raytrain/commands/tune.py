"""`raytrain tune`: a sweep, from its search space to its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml

from raytrain.commands.final import FinalRow, log_finals, train_finals
from raytrain.commands.results import ShownResult
from raytrain.commands.sweep_results import (
    TABLE,
    few_finished,
    log_sweep,
    what_mattered,
    write_run_ids,
)
from raytrain.config.names import RUN_NAME, check_folder_name
from raytrain.config.request import Overrides, with_keywords
from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.core.files import write_atomically
from raytrain.core.signals import continued_by, interruptible
from raytrain.core.storage import check, shown, tidy
from raytrain.data.loader import Splits
from raytrain.distributed.ray_metrics import DriverMetrics
from raytrain.distributed.ray_session import concurrent_trials, session, wanted_cluster
from raytrain.distributed.shared_storage import check_shared
from raytrain.tracking import Tracker, link, provenance, tracked
from raytrain.tracking.data_sets import training_inputs
from raytrain.tracking.results import BASE
from raytrain.training.run_folder import SPACE, resume_sweep, to_yaml
from raytrain.training.setup import preflight
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.choices import check_choices
from raytrain.tuning.descriptions import sweep_note, sweep_tags, sweep_view
from raytrain.tuning.executor import execute, trainable_for
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.importance import EqualCost, Importance, Method
from raytrain.tuning.initial_trials import plan_first
from raytrain.tuning.launch import launched, wait_until_free
from raytrain.tuning.mlflow_runs import PARENT
from raytrain.tuning.population import PopulationManager, check_population
from raytrain.tuning.published import publishing
from raytrain.tuning.requested_space import wanted_space
from raytrain.tuning.space.labels import describe
from raytrain.tuning.space.reading import changes_in
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.study import (
    check_name,
    check_study,
    is_begun,
    is_journal,
    new_name,
    open_study,
    stored_study,
)
from raytrain.tuning.sweep_storage import OUTBOX, SweepStorage, fetch_sweep
from raytrain.tuning.trial_manager import TrialManager

if TYPE_CHECKING:
    import pandas as pd

Watch = Callable[[SweepProgress], None]


@dataclass(frozen=True, repr=False)
class TuneResult(ShownResult):
    """A finished sweep."""

    name: str
    run_id: str | None  # of the parent run in MLflow; None if MLflow did not answer
    run_ids: dict[str, str]  # of all runs, by handle
    objectives: list[str]
    directions: list[int]  # 1: larger is better, -1: smaller
    best: TrialRow | None
    front: list[TrialRow]  # of several objectives; else empty
    trials: list[TrialRow]
    progress: SweepProgress
    importances: list[Importance]  # of finished trials
    importances_at_equal_cost: EqualCost | None  # of finished and stopped trials
    warning: str | None  # if an algorithm has too few finished trials to be ranked
    finals: list[FinalRow]
    best_file: Path | None  # the best configuration as a run file
    table: Path  # Parquet: every row of every trial
    folder: Path
    space_file: Path
    tracking_uri: str
    page: str  # of its trials in the MLflow UI: the address below that of its server
    storage: str  # that has it, as it was given
    again: str  # the command that continues it
    extensible: bool  # whether it goes on with a larger number of trials

    @property
    def failed(self) -> bool:
        """Whether no trial could be carried out."""
        return bool(self.trials) and all(trial.state == "failed" for trial in self.trials)

    def frame(self) -> pd.DataFrame:
        """A row per trial, by number: how it ended, objectives, what it varied by path, and its cost.

        `cost/fe_per_sample` is in forward-equivalents per image trained on. What a trial lacks is missing.
        """
        import pandas as pd

        rows = [
            {
                "trial": trial.number,
                "state": trial.state,
                **dict(zip(self.objectives, trial.values, strict=False)),
                **trial.params,
                **{name: trial.metrics.get(name) for name in ("cost/fe", "cost/fe_per_sample")},
                "epochs": trial.epochs,
                "run_id": self.run_ids.get(trial.handle),
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows, columns=None if rows else ["trial"]).set_index("trial")

    @property
    def weights(self) -> Path:
        """What `evaluate` and `export` take: the folder of the best trial's checkpoints.

        Raises:
            RequestError: if no trial has ended with a value.
        """
        if self.best is None:
            raise RequestError(
                f"{self.name}: this sweep has no best trial; expected one in which a trial was trained to "
                "its end"
            )
        return self.folder / "trials" / self.best.handle

    @property
    def recorded(self) -> str:
        """What `compare` takes: the id of the parent run, or the name, for all trials."""
        return self.run_id or self.name

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, how many trials ended how, and the best one."""
        outcomes = ", ".join(f"{count} {how}" for how, count in self.progress.outcomes.items())
        rows = {"trials": f"{self.progress.finished} ({outcomes})"}
        if self.best is not None:
            reached = zip(self.objectives, self.best.values, strict=False)
            values = ", ".join(f"{name} {value:.4g}" for name, value in reached)
            rows["best"] = f"{self.best.handle}: {values}"
            rows["with"] = describe(self.best.params)
        rows["cost"] = f"{self.progress.fe_per_image:,.0f} forward-equivalents per image"
        return self.name, {**rows, "folder": shown(self.folder)}

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        progress = {**asdict(self.progress), "budget": self.progress.budget.model_dump()}
        return {**asdict(self), "progress": progress}


def tune(
    space: SearchSpace | Mapping[str, Any] | str | Path | None = None,
    overrides: Overrides = (),
    *,
    resume: str | None = None,
    name: str | None = None,
    load_if_exists: bool = False,
    trials: int | None = None,
    final: int = 0,
    seeds: int = 3,
    importance: Method = "ped-anova",
    watch: Watch | None = None,
    **fields: Any,
) -> TuneResult:
    """Search `space` until its budget is spent; each trial is a child run in MLflow.

    `space` is a SearchSpace, a mapping or a YAML file, and may be left out with `resume`, the name of a
    sweep to continue: nothing that finished is repeated, what was under way goes on from its checkpoint.
    With `load_if_exists` the sweep `name` is continued if there is one, and begun otherwise.
    `overrides` are `key=value` words or a mapping of dotted paths, for the base run, or for `search` and
    `budget`; `fields` are such fields too. `trials` replaces the number in the file. With `final`, the best
    so many configurations are trained again on `seeds` seeds that the search did not use, and evaluated
    on the test set, once.

    Raises:
        RequestError: if something is wrong with the request; nothing was begun.

    >>> tune(overrides=["budget.trials=50"])
    Traceback (most recent call last):
    raytrain.core.errors.RequestError: SPACE.yaml: expected a search space, or --resume NAME
    """
    if load_if_exists and (name is None or resume is not None):
        raise RequestError("--load-if-exists: expected --name NAME, and no --resume")
    for option, given in (("--name", name), ("--resume", resume)):
        if given is not None:
            check_folder_name(option, given, RUN_NAME)
    changes = with_keywords(changes_in(overrides), fields) if fields else overrides
    space = wanted_space(space, changes, resume, trials)
    if resume is None and name is None:
        check_folder_name("name", space.name, RUN_NAME - len("-20261121-093000-999"))
    base = space.base_run
    splits = preflight(base)
    check_choices(space)
    if space.search.sampler == "pbt":
        check_population(space)
    check(base.root)
    if space.study is not None and is_journal(space.study):
        space = space.model_copy(update={"study": str(Path(space.study).expanduser().resolve())})
    check_study(base.storage, space.study)
    given = name if resume is None else resume
    stem, experiment = space.name, base.root / base.experiment
    with new_name(stem, experiment) if given is None else nullcontext(given) as name:
        folder = (experiment / name).resolve()
        if resume is not None or load_if_exists:
            fetch_sweep(folder)
        again = resume is not None or (load_if_exists and is_begun(name, folder, space.study))
        if again:
            wait_until_free(lambda: stored_study(name, folder, space.study), load_if_exists)
        return _tune(space, splits, name, again, final, seeds, importance, watch)


def _tune(
    space: SearchSpace,
    splits: Splits,
    name: str,
    resume: bool,
    final: int,
    seeds: int,
    importance: Method,
    watch: Watch | None,
) -> TuneResult:
    base = space.base_run
    folder = (base.root / base.experiment / name).resolve()
    check_name(name, folder, resume, space.study)
    fidelity = Fidelity.of(base, splits.train.num_images)
    outbox = folder / OUTBOX
    # The outbox is locked: a second driver would take the trials of the first for dead. MLflow is closed
    # before Ray, whose shutdown may outlast the time until a SIGKILL.
    with (
        interruptible(),
        continued_by() as offer,
        ExitStack() as stored,
        ExitStack() as cluster,
        tracked(base.tracking_uri, base.experiment, outbox) as tracker,
        ExitStack() as launch,
    ):
        stored.callback(SweepStorage(folder).save_all)
        space_file = folder / SPACE
        if not space_file.is_file():  # what --resume finds, also before there is a study
            write_atomically(space_file, _space_yaml(space))
        again = resume_sweep(name, base.experiment, base.storage)
        offer(again)
        cluster.enter_context(session(base, trials=space.budget.concurrent or 1))
        concurrent = _concurrent(base, space.budget.concurrent)
        check_shared(base)
        either = None if resume else False
        study = open_study(name, folder, space, space.hash(), either, fidelity.length, space.study)
        write_atomically(space_file, _space_yaml(space))
        if resume:
            tidy(folder)
        _open_parent(tracker, study, name, space, space_file)
        kind = PopulationManager if space.search.sampler == "pbt" else TrialManager
        published = publishing(DriverMetrics(name, base.experiment), tracker, watch)
        manager = kind(study, space, tracker, folder, fidelity, published)
        manager.recover()
        launch.enter_context(launched(study, manager.used_before))
        plan_first(manager, space, tracker.uri)
        execute(manager, trainable_for(base), concurrent)
        finals = train_finals(manager, space, tracker, final, seeds, concurrent, watch)
        cluster.close()
        weights = what_mattered(manager, importance)
        best_file = log_sweep(tracker, manager, splits, weights)
        log_finals(tracker, folder, finals)
        run_ids = write_run_ids(tracker, manager)
        best, progress = manager.best(), manager.progress()
        warning = few_finished(space, manager.history.rows())
        note = sweep_note(space, name, tracker.experiment_id, progress, best, run_ids, warning)
        tracker.note(PARENT, note)
    return TuneResult(
        name=name,
        run_id=run_ids.get(PARENT),
        run_ids=run_ids,
        objectives=[one.metric for one in space.objective],
        directions=[one.sign for one in space.objective],
        best=manager.best(),
        front=manager.history.front() if len(space.objective) > 1 else [],
        trials=manager.history.rows(),
        progress=manager.progress(),
        importances=weights.finished,
        importances_at_equal_cost=weights.equal,
        warning=warning,
        finals=finals,
        best_file=best_file,
        table=folder / TABLE,
        folder=folder,
        space_file=space_file,
        tracking_uri=tracker.uri,
        page=link(tracker.experiment_id, name),
        storage=str(base.storage),
        again=again,
        extensible=space.search.sampler not in ("grid", "pbt"),
    )


def _concurrent(base: RunConfig, wanted: int | None) -> int | None:
    """How many trials run at a time; None on a cluster that was joined, which may grow and shrink.

    Raises:
        RequestError: if there is no room for one.
    """
    room = concurrent_trials(base, wanted)
    return room if wanted_cluster() is None else wanted


def _open_parent(
    tracker: Tracker, study: optuna.Study, name: str, space: SearchSpace, space_file: Path
) -> None:
    """The sweep's own run in MLflow: a new one, or that of the launch being continued."""
    base = space.base_run
    if tracker.known(PARENT):
        tracker.reopen(PARENT)
    else:
        tracker.open(
            PARENT,
            name,
            {f"{BASE}{path}": value for path, value in provenance.parameters(base).items()},
            {**provenance.tags(base, "sweep"), **sweep_tags(space, study.study_name)},
            note=sweep_note(space, name, tracker.experiment_id),
        )
        tracker.text(PARENT, to_yaml(base), "base.yaml")
    tracker.view(PARENT, name, sweep_view(space, name))
    tracker.inputs(PARENT, training_inputs(base.data))
    tracker.artifact(PARENT, space_file)


def _space_yaml(space: SearchSpace) -> str:
    shown = space.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump({"name": space.name, **shown}, sort_keys=False)
