"""The checkpoint of the run that a user means, here or in MLflow."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from raytrain.core.errors import RequestError
from raytrain.tracking import fetch
from raytrain.tracking.run_names import run_of
from raytrain.training.checkpoint import BEST, find
from raytrain.training.run_folder import fetch_checkpoints, folder_of, is_run_id

Which = Literal["best", "last"]


def checkpoint_file(name: str, which: str | None, root: Path, uri: str | None) -> Path:
    """The file of the run that `name` means (see `run_of`), found here or in MLflow.

    Where `which` is None it is best.pt, or else last.pt.

    Raises:
        RequestError: if there is none.
    """
    if which not in (None, *get_args(Which)):
        raise RequestError(f"--which: expected best or last, found {which}")
    wanted = BEST if which is None else f"{which}.pt"
    name = run_of(name, root, uri)
    try:
        folder = folder_of(name, root)
    except RequestError:
        if not is_run_id(name):
            raise
        file = fetch(uri, name, f"checkpoints/{wanted}", root / "fetched" / name)
        with suppress(RequestError):  # only for the paths as they were given
            fetch(uri, name, "run.yaml", file.parent)
        return file
    fetch_checkpoints(folder)
    if which is None or folder.is_file():
        return find(folder)
    if not (folder / wanted).is_file():
        raise RequestError(f"--which: {folder} has no {wanted}")
    return folder / wanted
