"""Log lines on stderr."""

from __future__ import annotations

import contextlib
import sys


def log_line(line: str) -> None:
    """Write a line to stderr; ignore errors such as a closed pipe (`| head`) or a full disk."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
