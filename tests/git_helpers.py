"""Small repositories of git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_FILE = "kept.txt"


def repository(folder: Path, changed: bool = False) -> str:
    """Make a repository with one commit, whose id is returned, and perhaps a change after it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text("kept\n")
    _git(folder, "init", "--quiet")
    _git(folder, "add", _FILE)
    author = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    _git(folder, *author, "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "first")
    if changed:
        (folder / _FILE).write_text("changed\n")
    return _git(folder, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str:
    # Not in the repository of a hook that runs the tests.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    found = subprocess.run(
        ["git", *words], cwd=folder, env=own, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()
