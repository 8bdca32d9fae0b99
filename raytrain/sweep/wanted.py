"""The search space that a command means."""

from __future__ import annotations

from collections.abc import Iterable
from glob import escape
from pathlib import Path

from raytrain.names import EXPERIMENT_NAME, check_folder_name
from raytrain.request import parse_overrides
from raytrain.spaces.plan import Budget
from raytrain.spaces.reading import read_space
from raytrain.spaces.space import SearchSpace
from raytrain.types import RequestError

_TRIALS = 20  # where no budget of any kind is given


def wanted_space(
    space: SearchSpace | str | Path | None,
    overrides: Iterable[str] = (),
    resume: str | None = None,
    trials: int | None = None,
) -> SearchSpace:
    """The space that a command means, its budget filled in.

    Raises:
        RequestError: naming file, line and path.
    """
    words = list(overrides)
    if space is None and resume is None:
        raise RequestError("SPACE.yaml: expected a search space, or --resume NAME")
    if resume is not None:
        check_folder_name("--resume", resume, EXPERIMENT_NAME)
    if space is None:
        storage = Path(parse_overrides(words).get("storage", "runs"))
        file = f"{escape(str(resume))}/space.yaml"
        # Deeper where the name of an experiment has slashes.
        found = sorted(storage.glob(f"*/{file}")) or sorted(storage.rglob(file))
        if not found:
            raise RequestError(f"--resume: there is no sweep {resume} below {storage}")
        space = found[0]
    if not isinstance(space, SearchSpace):
        space = read_space(Path(space), words)
    budget = space.budget if trials is None else space.budget.model_copy(update={"trials": trials})
    return space.model_copy(update={"budget": _filled(budget, space)})


def _filled(budget: Budget, space: SearchSpace) -> Budget:
    """A number of trials, where nothing says when to end; a population is as many as it has members."""
    if space.search.sampler == "pbt":
        return budget.model_copy(update={"trials": space.search.population.size})
    unlimited = budget.trials is None and budget.fe_per_image is None and budget.hours is None
    if unlimited and space.search.sampler != "grid":
        return budget.model_copy(update={"trials": _TRIALS})
    return budget
