"""The output of `raytrain --version`, without an import of what it names."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raytrain.core.git import git

_PACKAGES = ("raytrain", "torch", "ray", "optuna", "mlflow")


def versions() -> str:
    """A line for each package and for Python; raytrain's with the commit, in a clone of its repository."""
    lines = {name: _version(name) for name in _PACKAGES}
    if commit := _commit(Path(__file__).parents[2]):
        lines["raytrain"] += f" ({commit})"
    lines["python"] = platform.python_version()
    return "\n".join(f"{name} {text}" for name, text in lines.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit(folder: Path) -> str:
    """The commit of a clone; a folder inside of another repository is none."""
    commit = git(folder, "rev-parse", "--short=12", "HEAD") if (folder / ".git").exists() else ""
    if not commit:
        return ""
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"commit {commit}, changed" if changed else f"commit {commit}"
