"""The Optuna study of a sweep: its storage, its sampler and its pruner."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend

from raytrain.spaces.plan import Search, pruner_of
from raytrain.sweep.history import Proposes
from raytrain.sweep.pruners import pruner_for
from raytrain.types import RequestError, mix

JOURNAL = "study.log"


def check_name(name: str, folder: Path, resume: bool, url: str | None) -> None:
    """Whether a sweep of this name is or is not there, as far as that is told by its folder.

    Raises:
        RequestError: if it is the other way round.
    """
    if url is None and resume and not (folder / JOURNAL).is_file():
        raise RequestError(f"--resume: there is no sweep {name} in {folder.parent}")
    if url is None and not resume and (folder / JOURNAL).is_file():
        raise RequestError(f"--name: a sweep {name} exists; continue it with --resume {name}")


def open_study(
    name: str,
    folder: Path,
    space: Proposes,
    fingerprint: str,
    resume: bool | None,
    length: float,
    url: str | None = None,
) -> optuna.Study:
    """The study of a sweep in `folder`: a new one, an earlier one if `resume`, either if that is None.

    Runs are `length` long: epochs, or forward-equivalents per image. Without the `url` of a database,
    the study is a journal file: five to ten times faster than SQLite, and sound on NFS.

    Raises:
        RequestError: if it exists and was not to be resumed, or has another `fingerprint`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if resume is not None:
        check_name(name, folder, resume, url)
    folder.mkdir(parents=True, exist_ok=True)
    storage = _storage(url, folder)
    full = name if url is None else f"{folder.parent.name}/{name}"
    exists = full in optuna.get_all_study_names(storage)
    if exists and resume is False:
        raise RequestError(f"--name: a sweep {name} exists; continue it with --resume {name}")
    if not exists and resume:
        raise RequestError(f"--resume: there is no sweep {full} in {_without_password(url or '')}")
    study = optuna.create_study(
        study_name=full,
        storage=storage,
        directions=["maximize" if one.mode == "max" else "minimize" for one in space.objective],
        load_if_exists=True,
        pruner=pruner_for(pruner_of(space.search, space.objective), space.search, length),
    )
    stored = study.user_attrs.get("space")
    if stored is not None and stored != fingerprint:
        raise RequestError(
            f"--resume: the search space of {name} has changed since it began; its trials would "
            "not be comparable"
        )
    # A restarted sampler must not repeat what it proposed before.
    seed = mix(space.search.seed, len(study.get_trials(deepcopy=False)))
    study.sampler = _sampler(space.search, seed % 2**32)
    if stored is None:
        study.set_user_attr("space", fingerprint)
    return study


def _storage(url: str | None, folder: Path) -> BaseStorage:
    if url is None:
        return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except Exception as error:
        # sqlalchemy's own kinds, or a driver that is not installed: all mean the same to the user.
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"study: {_without_password(url)} cannot be used ({problem[:200]}); expected a database "
            "URL such as postgresql://host/name, its driver installed"
        ) from None


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `group` and some samplers are marked experimental; their behaviour is tested here.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=search.startup, deterministic_objective=False
            )
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, search.startup))
        if search.sampler == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=search.startup,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        return optuna.samplers.RandomSampler(seed=seed)
