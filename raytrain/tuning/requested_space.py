"""The search space that a command means."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from raytrain.config.request import Overrides, as_run
from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.storage import shown
from raytrain.training.run_folder import SPACE, fetch_names
from raytrain.tuning.space.reading import changed_space, changes_of, read_space
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import Budget

_TRIALS = 20  # where no budget of any kind is given


def wanted_space(
    space: SearchSpace | Mapping[str, Any] | str | Path | None,
    overrides: Overrides = (),
    resume: str | None = None,
    trials: int | None = None,
) -> SearchSpace:
    """The space that a command means, its budget filled in.

    Raises:
        RequestError: naming file, line and path.
    """
    changes = overrides if isinstance(overrides, Mapping | str) else list(overrides)
    if space is None and resume is None:
        raise RequestError("SPACE.yaml: expected a search space, or --resume NAME")
    if space is None:
        space = _earlier(str(resume), changes)
    if isinstance(space, str | Path):
        space = read_space(Path(space), changes)
    elif changes or not isinstance(space, SearchSpace):
        space = changed_space(space, changes)
    budget = space.budget if trials is None else space.budget.model_copy(update={"trials": trials})
    return space.model_copy(update={"budget": _filled(budget, space)})


def _earlier(name: str, changes: Overrides) -> Path:
    """The file of the sweep to be continued."""
    of_run, _ = changes_of(changes)
    own = as_run(None, {path: of_run[path] for path in of_run.keys() & {"storage", "experiment"}})
    experiment = escape(own.experiment) if "experiment" in of_run else "*"
    pattern = f"{experiment}/{escape(name)}/{SPACE}"
    fetch_names(own.root)
    found = sorted(own.root.glob(pattern))
    if not found:
        known = [file.parent.name for file in own.root.glob(f"{experiment}/*/space.yaml")]
        raise RequestError(
            f"--resume: there is no sweep {name} below {shown(own.root)}{nearest(name, known)}"
        )
    if len(found) > 1:
        several = " and ".join(file.parent.parent.name for file in found)
        raise RequestError(
            f"--resume: {name} is the name of sweeps in {several}; expected experiment= as well"
        )
    return found[0]


def _filled(budget: Budget, space: SearchSpace) -> Budget:
    """A number of trials, where the budget has no limit; a population is as many as it has members."""
    if space.search.sampler == "pbt":
        return budget.model_copy(update={"trials": space.search.population.size})
    unlimited = budget.trials is None and budget.fe_per_image is None and budget.hours is None
    if unlimited and space.search.sampler != "grid":
        return budget.model_copy(update={"trials": _TRIALS})
    return budget
