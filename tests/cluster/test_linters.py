"""The shell scripts and the Dockerfile of the project have no finding of shellcheck and hadolint."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sysconfig.get_path("scripts"))


@pytest.mark.parametrize(
    ("tool", "file"),
    [
        ("shellcheck", "cluster/slurm.sh"),
        ("shellcheck", ".ci/run"),
        ("hadolint", "cluster/Dockerfile"),
    ],
)
def test_no_finding(tool: str, file: str) -> None:
    found = subprocess.run([TOOLS / tool, ROOT / file], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_image_holds_what_it_is_built_from() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        word
        for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)
