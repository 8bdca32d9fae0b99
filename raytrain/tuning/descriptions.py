"""A sweep in the MLflow UI: its description, its tags, and its parallel coordinates behind a link."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote

from raytrain.core.epoch_metrics import IN_EPS
from raytrain.tracking import View, fitting, link, run_link
from raytrain.training.run_folder import option, resume_sweep
from raytrain.tuning.budget import SweepProgress, TrialRow
from raytrain.tuning.space.labels import describe
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.space.settings import pruner_of


def searched(space: SearchSpace, always: bool = False) -> list[str]:
    """The parameters that vary, as MLflow has them, each once; step sizes as multiples of the radius.

    With `always`, those that every trial has: a chart leaves out trials without one of its axes.
    """
    paths = [
        path
        for path, _, condition in space.rows()
        if not path.startswith("$") and not (always and condition)
    ]
    in_eps = [
        path + IN_EPS if path.startswith("algorithm.") and path.endswith("step_size") else path
        for path in paths
    ]
    return list(dict.fromkeys(in_eps))


def sweep_tags(space: SearchSpace, name: str) -> dict[str, str]:
    """What a sweep's own run is searched by."""
    return {
        "sweep": name,
        "searched": ", ".join(searched(space)),
        "sampler": space.search.sampler,
        "pruner": pruner_of(space.search, space.objective),
        "objective": ", ".join(one.metric for one in space.objective),
    }


def sweep_view(space: SearchSpace, name: str) -> View:
    """The trials of a sweep over what it searched, the best first."""
    first = space.objective[0]
    own = [one.metric for one in space.objective]
    scores = [f"metrics.{metric}" for metric in dict.fromkeys((*own, *_OTHERS))]
    varied = [f"params.{path}" for path in searched(space)]
    mark = '"' if "'" in name else "'"
    return View(
        columns=[
            *scores,
            "tags.outcome",
            *fitting(varied, [*scores, "tags.outcome"], _NAME_WIDTH),
        ],
        params=searched(space, always=True)[:_AXES],
        metrics=[*own[1:], own[0]],
        curves=list(dict.fromkeys((*own, "valid/robust", "valid/clean", "train/loss"))),
        search=f"tags.sweep = {mark}{name}{mark} and tags.kind = 'trial'",
        order=f"metrics.{first.metric}",
        down=first.mode == "max",
        name_width=_NAME_WIDTH,
    )


_OTHERS = ("valid/robust", "valid/clean", "cost/fe_per_sample")
_AXES = 12  # parameters that parallel coordinates have room for
_NAME_WIDTH = 120  # pixels: the handle of a trial; what it varies has columns of its own


def sweep_note(
    space: SearchSpace,
    name: str,
    experiment_id: str,
    progress: SweepProgress | None = None,
    best: TrialRow | None = None,
    ids: Mapping[str, str] | None = None,
    warning: str | None = None,
) -> str:
    """What a sweep searches and what it has found, in Markdown; `ids` are runs of MLflow by handle."""
    goal = ", ".join(f"{one.mode} `{one.metric}`" for one in space.objective)
    how = f"{space.search.sampler}, pruner {pruner_of(space.search, space.objective)}"
    charts, table = (link(experiment_id, name, charts) for charts in (True, False))
    rows = "\n".join(
        f"| `{path}` | {_cell(words)} | {_cell(when)} |" for path, words, when in space.rows()
    )
    base = space.base_run
    again = resume_sweep(name, base.experiment, base.storage)
    said = [
        _best(space, experiment_id, best, ids or {}),
        f"[Trials]({table}), [their curves and parallel coordinates]({charts}). "
        + _next(f"{quote(name)}{option(base.storage)}", again, best),
        f"**Warning:** {warning}." if warning else "",
        _spent(progress),
        space.description.strip(),
        f"{goal}; {how}; budget {_budget(space)}.",
        f"```sh\n{again}  # what is missing of the budget\n"
        f"{again} --final 3  # the best three on new seeds, then the test set\n"
        f"raytrain compare {quote(f'sweep:{name}')}\n```",
        f"| searched | range | when |\n|---|---|---|\n{rows}",
        _constraints(space),
    ]
    return "\n\n".join(part for part in said if part) + "\n"


def _best(
    space: SearchSpace, experiment_id: str, best: TrialRow | None, ids: Mapping[str, str]
) -> str:
    if best is None or best.value is None:
        return ""
    run_id = ids.get(best.handle)
    trial = f"[{best.handle}]({run_link(experiment_id, run_id)})" if run_id else best.handle
    values = f"`{describe(best.params)}`" if best.params else "nothing varied"
    return f"**Best: {trial}**, {space.objective[0].metric} {best.value:.4g}: {values}."


def _next(where: str, again: str, best: TrialRow | None) -> str:
    if best is None or best.value is None:
        return f"After an interruption: `{again}`"
    return f"Next, the best trial on the test set: `raytrain evaluate {where}`"


def _spent(progress: SweepProgress | None) -> str:
    if progress is None:
        return ""
    ends = ", ".join(f"{count} {outcome}" for outcome, count in progress.outcomes.items())
    return f"Trials: {ends or 'none'}; {progress.fe_per_image:,.0f} FE per image spent."


def _budget(space: SearchSpace) -> str:
    limits = {k: v for k, v in space.budget.model_dump().items() if v is not None}
    return ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "none"


def _constraints(space: SearchSpace) -> str:
    return (
        "Constraints: " + ", ".join(f"`{c}`" for c in space.constraints)
        if space.constraints
        else ""
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
