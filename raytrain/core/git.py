"""The state of a folder in git."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *words: str) -> str:
    """The output of a git command in a folder; empty outside a repository, and where git is missing."""
    try:
        found = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
