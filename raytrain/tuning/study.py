"""The Optuna study of a sweep: its storage, its sampler and its pruner."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend

from raytrain.core.errors import RequestError
from raytrain.core.file_systems import is_url, without_secrets
from raytrain.core.nearest import nearest
from raytrain.core.seeds import mix
from raytrain.core.storage import shown
from raytrain.tracking import sqlite_file, sqlite_uri
from raytrain.training.run_folder import SPACE
from raytrain.tuning.history import Proposes
from raytrain.tuning.pruners import pruner_for
from raytrain.tuning.space.settings import Search, pruner_of

JOURNAL = "study.log"

_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
}
"""Dialects whose driver is an extra of this package, wherever the URL names none itself."""
_EXTRAS = {"postgresql+psycopg": "postgresql", "mysql+pymysql": "mysql"}
_PATIENCE = "10"  # seconds that psycopg waits for a server, unless the URL sets it
_BUSY = 60.0  # seconds that SQLite waits for other processes, unless the URL sets it
_LONGEST = 512  # characters of the name of a study, that of a sweep's last trainings included
_TRIES = 10  # at tables that other processes are making


@contextmanager
def new_name(stem: str, experiment: Path) -> Iterator[str]:
    """A name that no other process gives to a sweep of `experiment`, a folder.

    It is reserved by making the sweep's folder, which is removed again if it stays empty.
    """
    stamp = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = chain([stamp], (f"{stamp}-{number}" for number in count(2)))
    name = next(name for name in names if _is_made(experiment / name))
    try:
        yield name
    finally:
        with suppress(OSError):  # in use
            (experiment / name).rmdir()


def _is_made(folder: Path) -> bool:
    """Make a folder; False if it is there."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError:
        pass  # for the first file in it to say
    return True


def check_study(storage: Path | str, url: str | None) -> None:
    """Check that the study of a sweep has a place: a journal cannot be appended to behind a URL.

    Raises:
        RequestError: naming `study`.
    """
    if url is None and is_url(storage):
        raise RequestError(
            f"study: storage is {without_secrets(str(storage))}, where no journal can be appended to; "
            "expected the URL of a database (study=postgresql://HOST/NAME), or a journal file on a file "
            "system that every driver sees (study=/shared/study.log)"
        )


def check_name(name: str, folder: Path, resume: bool, url: str | None) -> None:
    """Whether a sweep of this name is or is not there, before anything of a new one is left behind.

    One that was interrupted before its study was made is continued from its search space.

    Raises:
        RequestError: if it is the other way round, or the database at `url` cannot be used.
    """
    place = shown(folder.parent) if url is None else _shown(url)
    exists = _has_study(name, folder, url)
    if resume and not exists and not (folder / SPACE).is_file():
        known = [file.parent.name for file in folder.parent.glob(f"*/{SPACE}")]
        raise RequestError(f"--resume: there is no sweep {name} in {place}{nearest(name, known)}")
    if exists and not resume:
        raise _exists(name)
    longest = len(_name_in(url, f"{name}/{name}-final-000000", folder))
    if not resume and url is not None and not is_journal(url) and longest > _LONGEST:
        raise RequestError(
            f"--name: a name of {len(name)} characters is too long for the experiment "
            f"{folder.parent.name} in a database; expected {(longest - _LONGEST + 1) // 2} fewer"
        )


def is_begun(name: str, folder: Path, url: str | None) -> bool:
    """Whether `--resume` finds a sweep of this name: its study, or the search space it was begun with.

    Raises:
        RequestError: if the database at `url` cannot be used.
    """
    return (folder / SPACE).is_file() or _has_study(name, folder, url)


def _has_study(name: str, folder: Path, url: str | None) -> bool:
    if url is None:
        return (folder / JOURNAL).is_file()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(url, folder)
    exists = _name_in(url, name, folder) in optuna.get_all_study_names(storage)
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    return exists


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
    try:
        study = optuna.create_study(
            study_name=_name_in(url, name, folder),
            storage=_storage(url, folder),
            directions=["maximize" if o.mode == "max" else "minimize" for o in space.objective],
            load_if_exists=resume is not False,
            pruner=pruner_for(pruner_of(space.search, space.objective), space.search, length),
        )
    except optuna.exceptions.DuplicatedStudyError:  # since a moment ago
        raise _exists(name) from None
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


def stored_study(name: str, folder: Path, url: str | None) -> optuna.Study | None:
    """The study of a sweep, to be read only: nothing is made where there is none, and None returned.

    Raises:
        RequestError: naming `study`, if its database does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = _study_file(folder, url)
    if file is not None and not file.is_file():
        return None
    if url is None or is_journal(url):
        storage: BaseStorage = _storage(url, folder)
    else:
        storage = open_database(url, makes_tables=False)
    try:
        return optuna.load_study(study_name=_name_in(url, name, folder), storage=storage)
    except KeyError:
        return None


def _study_file(folder: Path, url: str | None) -> Path | None:
    """The file of a study; None in a database that is a server's."""
    if url is None:
        return folder / JOURNAL
    return Path(url) if is_journal(url) else sqlite_file(sqlite_uri(url, "study"))


def _name_in(url: str | None, name: str, folder: Path) -> str:
    """What a sweep is called in its storage: a database holds those of several experiments."""
    return name if url is None else f"{folder.parent.name}/{name}"


def _exists(name: str) -> RequestError:
    return RequestError(f"--name: a sweep {name} exists; continue it with --resume {name}")


def _storage(url: str | None, folder: Path) -> BaseStorage:
    if url is None or is_journal(url):
        file = folder / JOURNAL if url is None else Path(url)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        except OSError as error:
            raise RequestError(
                f"study: {file} cannot be used ({error.strerror}); expected a file that can be written"
            ) from None
    return open_database(url)


def is_journal(url: str) -> bool:
    """Whether a `study` is the path of a journal file and not the URL of a database."""
    return "://" not in url and url.endswith(".log")


def open_database(url: str, makes_tables: bool = True) -> optuna.storages.RDBStorage:
    """The storage of studies at `url`, its tables made if there are none, unless not `makes_tables`.

    Raises:
        RequestError: naming `study`, if it cannot be used.
    """
    try:
        return _opened(_with_driver(url), makes_tables)
    except RequestError:
        raise
    except ImportError:
        raise RequestError(
            f"study: {_shown(url)} needs a database driver that is not installed; {_remedy(url)}"
        ) from None
    except Exception as error:
        # sqlalchemy's own kinds, Optuna's and those of each driver: the reason is theirs.
        raise RequestError(
            f"study: {_shown(url)} cannot be used ({_reason(error)}); expected the URL of a database "
            "that answers, such as postgresql://host/name"
        ) from None


def _opened(url: str, makes_tables: bool) -> optuna.storages.RDBStorage:
    """The storage, its tables made. Processes that begin together make them together.

    Each table is made by the fastest; Optuna goes on with what is missing when it is called again.
    """
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if sqlite_file(url) is not None and "timeout=" not in url:
        arguments["connect_args"] = {"timeout": _BUSY}
    tries = 0
    while True:
        tries += 1
        try:
            # Braces are marks of a template for Optuna.
            return optuna.storages.RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),
                engine_kwargs=arguments,
                skip_table_creation=not makes_tables,
            )
        except (OperationalError, ProgrammingError, IntegrityError) as error:
            # None: it did not even connect.
            if not makes_tables or tries == _TRIES or error.statement is None:
                raise
        time.sleep(random.uniform(0.05, 0.3))  # so that they do not go on in step


def _with_driver(url: str) -> str:
    """The URL with the driver that is meant where it names none, and an end to its waiting."""
    from sqlalchemy import make_url

    url = sqlite_uri(url, "study")
    made = make_url(url)
    if made.get_backend_name() == "sqlite":
        return url
    made = made.set(drivername=_DRIVERS.get(made.drivername, made.drivername))
    if made.drivername == "postgresql+psycopg" and "connect_timeout" not in made.query:
        made = made.update_query_dict({"connect_timeout": _PATIENCE})
    return made.render_as_string(hide_password=False)


def _remedy(url: str) -> str:
    scheme = url.partition("://")[0]
    extra = _EXTRAS.get(_DRIVERS.get(scheme, scheme))
    if extra is None:
        return f"expected the package that SQLAlchemy uses for {scheme}"
    return f"expected the extra {extra}: uv pip install -e '.[{extra}]'"


def _reason(error: Exception) -> str:
    """A driver's message without sqlalchemy's wrapping."""
    said = getattr(error, "orig", None) or error
    text = str(said.args[-1] if isinstance(said.args[-1:], tuple) and said.args else said)
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _shown(url: str) -> str:
    """The URL without what may be secret: its user and its settings."""
    if is_journal(url):
        return url
    file = sqlite_file(sqlite_uri(url, "study"))
    if file is not None:
        return f"sqlite:///{file}"
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2].partition("?")[0]


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
