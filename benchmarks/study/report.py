"""From records to the report of `raytrain compare`, and to a page with tables and answers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from raytrain.evaluation.names import attack_title
from raytrain.plotting.sheet import COLOURS, SMALL, paper, save
from raytrain.report.comparable import ComparableRuns
from raytrain.report.content import ReportContent, content_of
from raytrain.report.cost_figures import p_text, signed
from raytrain.report.evaluations import EvaluatedRun
from raytrain.report.folder import replace_report, report_folder
from raytrain.report.rows import Row
from raytrain.report.runs import Trained
from raytrain.report.sections import seconds_of, seeds_of

from .answers import Answer, Comparison, answers
from .problem import Problem
from .records import Record, iter_flags
from .schedule import Schedule

FIGURE = "robust_vs_cost"

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def content(schedule: Schedule) -> ReportContent:
    """What `raytrain compare` shows of the runs of a study; trials of searches are left out."""
    by_training: dict[str, list[Record]] = {}
    for record in schedule.records:
        if record.phase == "run":
            by_training.setdefault(record.task.training, []).append(record)
    runs = [_trained(records) for records in by_training.values()]
    return content_of(schedule.problem.title, f"results/{schedule.problem.name}", runs)


def _trained(records: Sequence[Record]) -> Trained:
    """A training with its evaluations, as if it had been read from MLflow."""
    first = records[0]
    return Trained(
        id=first.task.training,
        name=f"{first.method} {first.budget:g} FE, seed {first.seed}",
        began=first.began,
        status="FINISHED" if first.finished else "FAILED",
        params=first.params,
        tags={**first.tags, "method": first.method, "budget": f"{first.budget:g}"},
        metrics=first.metrics,
        curves=first.curves,
        evaluations=tuple(_evaluated(one) for one in records if one.result is not None),
        split_size=first.train_images,
        valid_size=first.valid_images,
    )


def _evaluated(record: Record) -> EvaluatedRun:
    found = EvaluatedRun.model_validate(record.result)
    return found.model_copy(update={"flags": pa.table(dict(iter_flags(record)))})


def rows_of(comparable: ComparableRuns) -> dict[tuple[str, float], Row]:
    """The rows of an arena by method and budget."""
    tags = [(row, row.setting.first.tags) for row in comparable.rows]
    return {(of["method"], float(of["budget"])): row for row, of in tags}


def write(schedule: Schedule, results: Path, folder: Path) -> list[Path]:
    """Write a page and the figure to `results`, and the report of `raytrain compare` to `folder`."""
    folder = report_folder(folder)
    shown = content(schedule)
    report = replace_report(shown, folder)
    arenas = [one for one in shown.comparables if one.images]
    figure = cost_figure(arenas[-1], schedule.problem) if arenas else None
    drawn = [] if figure is None else save(figure, results / FIGURE)
    page = results / "README.md"
    page.write_text(page_of(schedule, shown, bool(drawn)))
    return [report, page, *drawn]


def page_of(schedule: Schedule, shown: ReportContent, has_figure: bool) -> str:
    """Markdown: what was measured, answers, a table per test set, hyperparameters, what is missing."""
    problem = schedule.problem
    lines = [f"# {problem.title}", "", *_setting(schedule), ""]
    lines += [f"![Robust accuracy against cost]({FIGURE}.svg)", ""] if has_figure else []
    for comparable in (one for one in shown.comparables if one.images):
        rows = rows_of(comparable)
        found = answers(problem.questions, problem.budgets, comparable, rows, problem.seeds)
        attack = attack_title(comparable.attack)
        lines += [f"## {comparable.images:,} test images, {attack}", ""]
        lines += [*_answers(found), "", *_table(problem, comparable), ""]
    if problem.tuning is not None:
        lines += ["## Hyperparameters", "", *_hyperparameters(schedule), ""]
    lines += ["## What is missing", "", *_missing(schedule, shown), ""]
    return "\n".join(lines)


def _setting(schedule: Schedule) -> list[str]:
    problem, records = schedule.problem, schedule.records
    any_run = problem.trial(next(iter(problem.methods)), 0)
    seeds = "one seed" if problem.seeds == 1 else f"{problem.seeds} seeds"
    searched = "Nothing was searched here."
    if (tuning := problem.tuning) is not None:
        searched = (
            f"Hyperparameters of every method: the best of {tuning.trials} trials of "
            f"{tuning.fe_per_image:g} FE on validation (the first has the published defaults, the others "
            "are random in its search space)."
        )
    budgets = " and ".join(f"{budget:g}" for budget in problem.budgets)
    said = (
        f"{any_run.data.name}, {any_run.model.name}, {any_run.threat.norm} eps "
        f"{any_run.threat.eps:.4g}; runs of {budgets} forward-equivalents (FE) per training image, "
        f"{seeds} each. {searched} The test set was used once per run and evaluation."
    )
    machines = sorted({record.tags.get("hardware", "?") for record in records})
    commits = sorted({record.tags.get("git_commit", "?")[:10] for record in records})
    torch = sorted({record.tags.get("torch_version", "?") for record in records})
    spent = sum(r.seconds + (r.evaluation_seconds or 0) for r in records) / 3600
    return [
        said,
        "",
        f"`python -m benchmarks.study run {problem.name} --minutes N`, "
        f"`python -m benchmarks.study report {problem.name}`  ",
        f"{len(records)} of {schedule.count} records; {spent:.1f} hours of training and evaluation on "
        f"{', '.join(machines)}; torch {', '.join(torch)}; commit {', '.join(commits)}",
    ]


def _answers(found: Sequence[Answer]) -> list[str]:
    if not found:
        return []
    lines = [
        "| question | FE | answer | against | difference, points | 95 % | p | cost, FE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for answer in found:
        for number, one in enumerate(answer.comparisons):
            head = ["", "", ""]
            if number == 0:
                claim = f"{answer.question.claim} ({answer.question.source})"
                head = [claim, f"{answer.budget:g}", f"**{answer.verdict}**"]
            lines.append(f"| {' | '.join([*head, *_compared(one)])} |")
    return lines


def _compared(one: Comparison) -> list[str]:
    who = f"{one.other}: {one.verdict}" if len(one.question.against) > 1 else one.other
    if one.difference is None:
        return [who, one.why_not, "", "", ""]
    costs = " and ".join(f"{row.cost:,.0f}" for row in one.rows if row is not None and row.cost)
    found = one.difference
    return [
        who,
        signed(100 * found.value),
        f"{signed(100 * found.low)} to {signed(100 * found.high)}",
        p_text(one.p).removeprefix("p ").removeprefix("= "),
        costs,
    ]


def _table(problem: Problem, comparable: ComparableRuns) -> list[str]:
    """All methods, the most robust first, by budget."""
    attacks = ["clean", *reversed(comparable.attacks)]
    heads = ["method", *(f"{attack_title(name)}, %" for name in attacks)]
    heads += ["validation, %", "FE per image", "seconds", "seeds"]
    lines = []
    for budget in problem.budgets:
        rows = {m: row for (m, b), row in rows_of(comparable).items() if b == budget}
        order = sorted(rows, key=lambda m: -_value(rows[m], comparable.attack))
        lines += ["", f"{budget:g} FE per image:", ""]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for method in order:
            row = rows[method]
            cells = [row.score(name) for name in attacks] + [row.valid()]
            said = ["-" if cell is None else cell.text for cell in cells]
            cost = "-" if row.cost is None else f"{row.cost:,.0f}"
            seeds = seeds_of(row, comparable.attack)
            name = method + ("" if row.trusted else " (a check failed)")
            lines.append(f"| {' | '.join([name, *said, cost, seconds_of(row), seeds])} |")
    return lines


def _value(row: Row, attack: str) -> float:
    cell = row.score(attack)
    return -1.0 if cell is None else cell.value


def _hyperparameters(schedule: Schedule) -> list[str]:
    lines = [
        "| method | space | trial | what it varies | validation of the trials, %: best, median, defaults |",
        "|---|---|---|---|---|",
    ]
    for name, method in schedule.problem.methods.items():
        trials = [r for r in schedule.records if r.phase == "tune" and r.method == name]
        known = {r.trial: 100 * r.valid_robust for r in trials if r.valid_robust is not None}
        values = sorted(known.values())
        spread = (
            f"{values[-1]:.1f}, {statistics.median(values):.1f}, {known.get(0, float('nan')):.1f}"
            if values
            else "-"
        )
        trial = schedule.chosen(name)
        varied = {} if trial is None else schedule.problem.hyperparameters(name, trial)
        said = ", ".join(f"{path}={_short(value)}" for path, value in varied.items())
        space = f"[{method.space}](../../../../search_spaces/{method.space}.yaml)"
        shown = "not chosen yet" if trial is None else str(trial)
        lines.append(f"| {name} | {space} | {shown} | {said or 'published defaults'} | {spread} |")
    return lines


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _missing(schedule: Schedule, shown: ReportContent) -> list[str]:
    """What is not there or not to be believed, a line each."""
    lines = []
    left = schedule.count - len(schedule.records)
    if left:
        lines.append(f"- {left} of {schedule.count} tasks have no record yet.")
    failed: dict[str, int] = {}
    for record in schedule.records:
        if not record.finished:
            said = f"{record.method} ({record.phase}): {record.state}"
            failed[said] = failed.get(said, 0) + 1
    lines += [f"- {count} x {said}" for said, count in failed.items()]
    distrusted = {
        row.setting.first.tags["method"]: row.failed
        for comparable in shown.comparables
        for row in comparable.rows
        if row.failed
    }
    lines += [f"- {method} failed a check: {why[0]}" for method, why in distrusted.items()]
    return lines or ["- Nothing: all tasks have records, no training failed, no check failed."]


def cost_figure(comparable: ComparableRuns, problem: Problem) -> Figure | None:
    """Robust accuracy against cost: a line per method, with the standard deviation over seeds."""
    rows = rows_of(comparable)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for (method, _), row in sorted(rows.items(), key=lambda item: item[0][1]):
        cell = row.score(comparable.attack)
        if cell is not None and row.cost is not None:
            spread = 0.0 if cell.std is None else 100 * cell.std
            points.setdefault(method, []).append((row.cost, 100 * cell.value, spread))
    if not points:
        return None
    order = sorted(points, key=lambda method: -points[method][-1][1])
    figure, axes = paper(7.6, 5.2)
    for number, method in enumerate(order):
        costs, values, spreads = zip(*points[method], strict=True)
        colour = COLOURS[number % len(COLOURS)]
        style = ["-", "--", ":"][number // len(COLOURS) % 3]
        shift = [cost * (1 + 0.006 * (number - len(order) / 2)) for cost in costs]
        axes.errorbar(
            shift, values, yerr=spreads, color=colour, linestyle=style, marker="o", markersize=4,
            linewidth=1.2, elinewidth=0.8, label=f"{method} {values[-1]:.1f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(problem.budgets, [f"{budget:g}" for budget in problem.budgets])
    axes.minorticks_off()
    axes.set_xlabel("training cost, forward-equivalents per training image")
    axes.set_ylabel(f"accuracy under {attack_title(comparable.attack)}, %")
    figure.legend(loc="outside right upper", frameon=False, fontsize=SMALL)
    return figure
