"""Acts that are due at a later time of a benchmark that polls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Agenda:
    """Acts with the time at which each is due."""

    def __init__(self) -> None:
        self._acts: list[tuple[float, Callable[[], Any]]] = []

    def later(self, seconds: float, act: Callable[[], Any]) -> None:
        """Add an act that is due in so many seconds."""
        self._acts.append((time.monotonic() + seconds, act))

    def do_due(self) -> None:
        """Carry out what is due now."""
        now = time.monotonic()
        due = [act for at, act in self._acts if at <= now]
        self._acts = [one for one in self._acts if one[0] > now]
        for act in due:
            act()

    def do_all(self) -> None:
        """Carry out the rest at once, in its order."""
        acts, self._acts = sorted(self._acts, key=lambda one: one[0]), []
        for _, act in acts:
            act()
