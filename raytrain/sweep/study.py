"""The Optuna study of a sweep: its storage, its sampler and its pruner."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend

from raytrain.sweep.space import Search, SearchSpace
from raytrain.types import RequestError, mix


def open_study(name: str, folder: Path, space: SearchSpace, resume: bool) -> optuna.Study:
    """The study of a sweep in `folder`, new or (only if `resume`) an earlier one.

    Raises:
        RequestError: if it exists and was not to be resumed, or the space has changed since.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = folder / "study.log"
    if file.is_file() and not resume:
        raise RequestError(f"--name: a sweep {name} exists; continue it with --resume {name}")
    if not file.is_file() and resume:
        raise RequestError(f"--resume: there is no sweep {name} in {folder.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(file))
    study = optuna.create_study(
        study_name=name,
        storage=optuna.storages.JournalStorage(backend),
        direction="maximize" if space.objective.mode == "max" else "minimize",
        load_if_exists=True,
        pruner=_pruner(space.search),
    )
    stored = study.user_attrs.get("space")
    if stored is not None and stored != space.hash():
        raise RequestError(
            f"--resume: the search space of {name} has changed since it began; its trials would "
            "not be comparable"
        )
    study.set_user_attr("space", space.hash())
    # A restarted sampler must not repeat what it proposed before.
    study.sampler = _sampler(space.search, mix(space.search.seed, len(study.get_trials())))
    return study


def _sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    seed %= 2**32
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # `group` is marked experimental; without it conditional fields are sampled one by one.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=search.startup,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    if search.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=search.min_epochs, reduction_factor=search.reduction
    )
