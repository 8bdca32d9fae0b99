"""One line on stderr, whether or not anybody reads it."""

from __future__ import annotations

import contextlib
import sys


def log_line(line: str) -> None:
    """Write a line on stderr; a closed pipe (`| head`) or a full log disk is no reason to end work."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
