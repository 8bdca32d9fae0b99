"""What a sweep could not train, found before it begins: every data set read, every network built."""

from __future__ import annotations

from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.training.setup import preflight
from raytrain.tuning.space.checks import corners, placed
from raytrain.tuning.space.search_space import SearchSpace


def check_choices(space: SearchSpace) -> None:
    """Build what each option of each choice, and each end of each range, would train.

    What is built depends on few fields of a run: each of their combinations is built once.

    Raises:
        RequestError: for the first that cannot be built, naming its dimension.
    """
    built = {_what_is_built(space.base_run)}
    preflight(space.base_run)
    for values in corners(space):
        run = space.run(values)
        if (key := _what_is_built(run)) in built:
            continue
        built.add(key)
        try:
            preflight(run)
        except RequestError as error:
            raise placed(space, values, error) from None


def _what_is_built(run: RunConfig) -> str:
    """All fields that `preflight` looks at, but for numbers of the algorithm and the outer update."""
    fields = {"data", "model", "threat", "precision", "batch_size", "workers"}
    return f"{run.algorithm.name} {run.outer.name} {run.model_dump_json(include=fields)}"
