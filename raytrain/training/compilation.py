"""What torch.compile does in this process: how much it compiled, loaded from disk, and for how long."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Compiled:
    """What torch.compile has done. The code of a graph's forward and backward pass counts apart."""

    graphs: int  # that Dynamo has traced
    recompilations: int  # of them: of a function that had been traced for another mode or shape
    made: int  # pieces of code that Inductor has compiled
    loaded: int  # pieces of code from the cache on disk
    seconds: float  # tracing, compiling and loading

    def __str__(self) -> str:
        return (
            f"graphs traced {self.graphs} (recompilations {self.recompilations}), "
            f"passes compiled {self.made}, loaded from disk {self.loaded}"
        )


class CompileCounter:
    """Counts what torch.compile does from the construction on."""

    def __init__(self) -> None:
        self._began = time.time_ns() // 1000  # microseconds, as Dynamo's
        self._before = _totals()

    def read(self) -> Compiled:
        """Return what has been done so far. At most 64 recompilations are counted: torch keeps no more."""
        now = _totals()
        more = {name: now[name] - self._before[name] for name in now}
        return Compiled(
            graphs=round(more["graphs"]),
            recompilations=_recompilations_since(self._began),
            made=round(more["made"]),
            loaded=round(more["loaded"]),
            seconds=float(more["seconds"]),
        )


def _totals() -> Mapping[str, float]:
    """Totals of this process, by torch's own counters (torch 2.11 and 2.15 have the same)."""
    if "torch._dynamo" not in sys.modules:  # whose import takes a second
        return dict.fromkeys(("graphs", "made", "loaded", "seconds"), 0.0)
    from torch._dynamo.utils import calculate_time_spent, counters

    inductor = counters["inductor"]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "made": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        "loaded": inductor["fxgraph_cache_hit"],
        "seconds": calculate_time_spent()["total_wall_time"],
    }


def _recompilations_since(began: int) -> int:
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import get_compilation_metrics

    return sum(
        one.recompile_reason is not None and (one.start_time_us or 0) >= began
        for one in get_compilation_metrics()
    )
