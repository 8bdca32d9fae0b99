"""The folder of a sweep or a training, found by its name in a storage; imports neither torch nor MLflow."""

from __future__ import annotations

from glob import escape
from pathlib import Path, PurePosixPath

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.storage import changed_at, pull, shown
from raytrain.training.run_folder import RUN_FILE, SPACE, TRIALS

LAST = "last"
_SHORTEST = 4  # characters of an id
_NEAR = 3  # names that a refusal proposes


def named_folder(name: str, root: Path, experiment: str | None) -> Path | None:
    """The folder of a sweep or training below `root`; None if there is none of this name.

    `name` is the path of the folder, the name of a sweep, the id of a run or its beginning, or `last`:
    the one that was begun or continued last. The folder of a trial stands for its sweep.

    Raises:
        RequestError: if there are several, none at all, or the storage does not answer.
    """
    if name != LAST and is_begun(path := Path(name)):
        return _sweep_of(path.resolve())
    where = "*" if experiment is None else escape(experiment)
    found = _matching(name, _begun(root, where))
    if not found or name == LAST:
        _fetch(root)
        found = _matching(name, _begun(root, where))
    if len(found) > 1:
        several = " and ".join(sorted(f"{one.parent.name}/{one.name}" for one in found))
        raise RequestError(f"{name}: means {several}; expected experiment= as well, or a path")
    if not found and name == LAST:
        raise RequestError(f"last: there is no sweep or training below {shown(root)}")
    return found[0].resolve() if found else None


def unknown(name: str, root: Path, more: str = "") -> RequestError:
    """The refusal of a name that no sweep or training has."""
    known = [one.name for one in _begun(root, "*")]
    return RequestError(
        f"{name}: no sweep or training below {shown(root)}{more}{nearest(name, known, _NEAR)}"
    )


def is_begun(folder: Path) -> bool:
    """Whether a folder is that of a sweep, a training or a trial."""
    return (folder / SPACE).is_file() or (folder / RUN_FILE).is_file()


def _sweep_of(folder: Path) -> Path:
    return folder.parent.parent if folder.parent.name == TRIALS else folder


def _begun(root: Path, experiment: str) -> list[Path]:
    return [
        file.parent for mark in (SPACE, RUN_FILE) for file in root.glob(f"{experiment}/*/{mark}")
    ]


def _matching(name: str, known: list[Path]) -> list[Path]:
    """Of several folders `last` is one; a name is before the beginning of an id."""
    if name == LAST:
        return sorted(known, key=_launched)[-1:]
    exact = [one for one in known if one.name == name]
    if exact or len(name) < _SHORTEST:
        return exact
    return [one for one in known if (one / RUN_FILE).is_file() and one.name.startswith(name)]


def _launched(folder: Path) -> float:
    """When it was begun or continued: every launch writes this file anew."""
    file = folder / SPACE
    return changed_at(file if file.is_file() else folder / RUN_FILE) or 0.0


def _fetch(root: Path) -> None:
    """Bring the files by which sweeps and trainings are found from a storage behind a URL."""

    def wanted(file: PurePosixPath) -> bool:
        return file.name in (SPACE, RUN_FILE) and TRIALS not in file.parts

    try:
        pull(root, wanted)
    except OSError as error:
        raise RequestError(f"storage: {error.strerror or error}") from None
