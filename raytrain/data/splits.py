"""Assignment of Parquet files to training and test images.

A file belongs to the split in its own name (`train`, `test`, `val`), or else the name
of the nearest folder: `data/test-00000-of-00001.parquet`, `train/part-0.parquet`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from raytrain.core.errors import RequestError
from raytrain.core.file_systems import is_url
from raytrain.data.images import Split
from raytrain.data.remote import SUFFIX, local_copy

SHARD = re.compile(r"-\d{5}-of-\d{5}")
WORDS = {
    "train": re.compile(r"train"),
    "test": re.compile(r"test"),
    "validation": re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)"),
}


def is_parquet(name: str) -> bool:
    """Whether this name is a path or URL: it ends in .parquet, has a scheme, or is an existing folder."""
    return name.endswith(SUFFIX) or is_url(name) or (name != "" and _home(name).is_dir())


def _home(path: str | Path, field: str = "data.name") -> Path:
    return local_copy(str(path), field) if is_url(path) else Path(os.path.expanduser(path))


def parquet_files(name: str, split: Split, test_path: str | Path | None) -> list[Path]:
    """Return the files of one split, sorted; those at `test_path` are never training images."""
    root = _home(name)
    own = None if test_path is None else _held_out(name, root, test_path)
    if split == "test":
        return _test_files(root, own)
    return training_files(name, held_out=_test_files(root, own) if own is not None else ())


def training_files(
    name: str, field: str = "data.name", held_out: Iterable[Path] = ()
) -> list[Path]:
    """Return the files of training images at a path or URL that `field` gives, sorted."""
    root = _home(name, field)
    files = _found(root, field)
    if root.is_dir():
        files = _of(files, root, "train") or _of(files, root, None)
    out = {file.resolve() for file in held_out}
    files = [file for file in files if file.resolve() not in out]
    if not files:
        raise RequestError(
            f"{field}: expected files of training images in {root}, "
            "found none but test or validation files"
        )
    return files


def _held_out(name: str, root: Path, test_path: str | Path) -> Path:
    """Where the test set is here: in the copy of the training images, if its URL is below theirs."""
    above, below = (str(url).partition("?")[0].rstrip("/") for url in (name, test_path))
    if is_url(name) and below.startswith(f"{above}/"):
        return root / below[len(above) + 1 :]
    return _home(test_path, "data.test_path")


def _test_files(root: Path, own: Path | None) -> list[Path]:
    if own is not None:
        files = _found(own, "data.test_path")
        return (_of(files, own, "test") or files) if own.is_dir() else files
    every = _found(root, "data.name")
    files = _of(every, root, "test") if root.is_dir() else []
    files = files or _beside(root)
    if not files:
        raise RequestError(
            f"data.test_path: expected a test file beside the training images in {root} "
            "(such as test.parquet), found none; name one with data.test_path"
        )
    return files


def _beside(root: Path) -> list[Path]:
    """Return the file or folder named with `test` for `train`, else all test files beside it."""
    siblings = sorted(path for path in root.parent.iterdir() if path != root)
    own = SHARD.sub("", root.name)
    twin_name = own.replace("train", "test")
    twins = [p for p in siblings if own != twin_name and SHARD.sub("", p.name) == twin_name]
    if root.is_dir():
        return [file for path in twins if path.is_dir() for file in _files_in(path)]
    twins = twins or [path for path in siblings if _split_in(path.name) == "test"]
    return [path for path in twins if path.name.endswith(SUFFIX) and path.is_file()]


def _found(path: Path, field: str) -> list[Path]:
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise RequestError(f"{field}: expected *{SUFFIX} files in folder {path}, found none")
        return files
    if not path.is_file():
        raise RequestError(f"{field}: expected a Parquet file or folder of them, found no {path}")
    return [path]


def _files_in(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob(f"*{SUFFIX}") if path.is_file()]
    return sorted(
        path
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _of(files: list[Path], root: Path, split: str | None) -> list[Path]:
    return [file for file in files if _split_of(file.relative_to(root)) == split]


def _split_of(path: Path) -> str | None:
    """Return the split named by the innermost part of the path that names one, else None."""
    splits = (_split_in(part) for part in reversed(path.parts))
    return next((split for split in splits if split is not None), None)


def _split_in(part: str) -> str | None:
    """Return the split in a name; None if there are none or two."""
    splits = [split for split, word in WORDS.items() if word.search(part.lower())]
    return splits[0] if len(splits) == 1 else None
