"""What the page shows of one arena, as plain words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrain.evaluation.names import attack_title
from raytrain.report.cells import Cell
from raytrain.report.comparable import ComparableRuns
from raytrain.report.cost_figures import p_text
from raytrain.report.pairs import Pair
from raytrain.report.rows import VALID, Row

_ROWS, _FIRST = 40, 24  # a longer table shows about so many at once and folds the others away
_COLUMNS = ("aa", "apgd", "pgd20")  # attacks with a column beside the one that is ranked by


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    kind: str
    name: str  # of its files
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Section:
    """One arena on the page."""

    title: str
    threat: str
    judged_by: str
    notes: tuple[str, ...]
    heads: list[str]
    rows: list[dict[str, Any]]
    more: list[dict[str, Any]]
    legend: str
    failed: list[str]
    hint: dict[str, str] | None
    leader: str
    pairs: list[dict[str, Any]]
    figures: list[Drawn] = field(default_factory=list)


def section_of(comparable: ComparableRuns, pairs: list[Pair], figures: list[Drawn]) -> Section:
    """An arena with its figures."""
    columns = columns_of(comparable)
    near, far = _split(comparable)
    heads = _heads(comparable, columns)
    tables = [[_row(comparable, row, columns) for row in some] for some in (near, far)]
    _drop_empty(heads, [row for table in tables for row in table])
    for some, table in zip((near, far), tables, strict=True):
        _say_bands(some, table)
    leader = comparable.leader
    return Section(
        title=comparable.title,
        threat=comparable.threat,
        judged_by=comparable.judged_by,
        notes=comparable.notes,
        heads=heads,
        rows=tables[0],
        more=tables[1],
        legend=_legend(comparable),
        failed=[f"{row.letter}: {said}" for row in comparable.rows for said in row.failed if said],
        hint=_hint(comparable),
        leader=leader.letter if leader else "",
        pairs=[_pair(pair) for pair in pairs],
        figures=figures,
    )


def columns_of(comparable: ComparableRuns) -> list[str]:
    """Clean, what is ranked by, and the other strong attacks of any row."""
    if not comparable.attacks:
        return []
    first = [] if comparable.attack == VALID else [comparable.attack]
    others = [a for a in comparable.attacks if a in _COLUMNS]
    return ["clean", *dict.fromkeys([*first, *others])]


def _heads(comparable: ComparableRuns, columns: list[str]) -> list[str]:
    tests = [f"{attack_title(name)}, %" for name in columns]
    if comparable.attack != VALID:
        tests.append(f"{attack_title(comparable.attack)} at the last epoch")
    valid = ["validation, clean", "validation, robust", "the same, last epoch"]
    costs = ["best / last epoch", "FE per image", "seconds", "seeds"]
    return [*tests, *valid, *costs]


def _row(comparable: ComparableRuns, row: Row, columns: list[str]) -> dict[str, Any]:
    cells = [_cell(row.score(name), row.marks) for name in columns]
    if comparable.attack != VALID:
        cells.append(_cell(row.score(comparable.attack, last=True), row.marks))
    cells += [
        _cell(row.valid("valid/clean"), row.marks),
        _cell(row.valid(), row.marks),
        _cell(row.valid(last=True), row.marks),
        {"value": epochs_of(row)},
        {"value": "-" if row.cost is None else f"{row.cost:,.0f}"},
        {"value": seconds_of(row)},
        {"value": seeds_of(row, comparable.attack)},
    ]
    states = dict.fromkeys(run.state for run in row.setting.runs)
    kinds = ["" if row.trusted else "distrusted", "leader" if row is comparable.leader else ""]
    return {
        "letter": row.letter,
        "marks": row.marks,
        "label": row.label,
        "front": row.front,
        "cells": cells,
        "state": ", ".join(states),
        "kind": " ".join(filter(None, kinds)),
    }


def _cell(cell: Cell | None, marks: str) -> dict[str, str]:
    if cell is None:
        return {"value": "-"}
    value, _, interval = cell.text.partition(" ")
    return {"value": value, "interval": interval, "marks": marks}


def epochs_of(row: Row) -> str:
    """`7 / 10`, or the ranges over seeds."""
    best = sorted(run.best_epoch for run in row.setting.runs if run.best_epoch is not None)
    last = sorted(run.epochs for run in row.setting.runs)
    return f"{_range(best)} / {_range(last)}"


def seeds_of(row: Row, attack: str) -> str:
    """How many seeds there are, and how many have what is ranked by if not all."""
    seeds, cell = len(row.setting.runs), row.ranking_cell(attack)
    return str(seeds) if cell is None or cell.seeds == seeds else f"{cell.seeds} of {seeds}"


def _range(values: list[int]) -> str:
    if not values:
        return "-"
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def seconds_of(row: Row) -> str:
    """Of training, mean over seeds."""
    known = [s for run in row.setting.runs if (s := run.metrics.get("cost/seconds")) is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def _split(comparable: ComparableRuns) -> tuple[list[Row], list[Row]]:
    """Rows that are shown at once (what was evaluated, and the best of every band), and the others."""
    if len(comparable.rows) <= _ROWS:
        return list(comparable.rows), []
    most = max(1, _FIRST // len({row.band for row in comparable.rows}))
    seen: dict[int, int] = {}
    near, far = [], []
    for row in comparable.rows:
        seen[row.band] = seen.get(row.band, 0) + 1
        (near if row.best or row.front or seen[row.band] <= most else far).append(row)
    return near, far


def _drop_empty(heads: list[str], rows: list[dict[str, Any]]) -> None:
    """Drop empty columns."""
    for place in reversed(range(len(heads))):
        if all(row["cells"][place]["value"] == "-" for row in rows):
            del heads[place]
            for row in rows:
                del row["cells"][place]


def _say_bands(some: list[Row], rows: list[dict[str, Any]]) -> None:
    """A line above the first row of each band."""
    for band in dict.fromkeys(row.band for row in some):
        costs = [row.cost for row in some if row.band == band]
        first = next(k for k, row in enumerate(some) if row.band == band)
        known = [cost for cost in costs if cost is not None]
        if not known:
            rows[first]["band"] = "cost not recorded"
            continue
        low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
        span = low if low == high else f"{low} to {high}"
        rows[first]["band"] = f"{span} FE per training image"


def _legend(comparable: ComparableRuns) -> str:
    said = (
        "Means ± standard deviations over seeds; a single seed is followed by the 95 % interval of "
        "its images. Bold: the leader. ◆: on the Pareto front of cost and accuracy."
    )
    if any(not row.trusted for row in comparable.rows):
        said += " ⚠: a check failed, not to be believed."
    return said


def _hint(comparable: ComparableRuns) -> dict[str, str] | None:
    """What to run for a number that is missing."""
    lacking = [row for row in comparable.rows if not row.best and row.home]
    if not lacking:
        return None
    run = max(lacking, key=lambda row: cell.value if (cell := row.valid()) else -1.0).setting
    count = len(lacking)
    text = f"{count} configuration{' was' if count == 1 else 's were'} not evaluated. For the best"
    return {
        "text": f"{text} of them in validation:",
        "command": f"raytrain evaluate {run.first.id}",
    }


def _pair(pair: Pair) -> dict[str, Any]:
    limits = "-"
    if pair.low is not None and pair.high is not None:
        limits = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    one, other = pair.leader.cost, pair.other.cost
    return {
        "letter": pair.other.letter,
        "marks": pair.other.marks,
        "label": pair.other.label,
        "cells": [
            f"{100 * pair.difference:+.1f}",
            limits,
            f"{pair.only_leader:,}",
            f"{pair.only_other:,}",
            f"{pair.ahead} of {pair.seeds}",
            p_text(pair.p).removeprefix("p ").removeprefix("= "),
            p_text(pair.holm).removeprefix("p ").removeprefix("= "),
        ],
        "verdict": pair.relation,
        "cost": f"{other / one:.2f}" if one and other else "-",
    }


def in_short(comparable: ComparableRuns, pairs: list[Pair]) -> str:
    """One or two sentences about an arena."""
    leader = comparable.leader
    cell = None if leader is None else leader.ranking_cell(comparable.attack)
    if leader is None or cell is None:
        return f"{comparable.title}: nothing here can be ranked."
    cost = "" if leader.cost is None else f" at {leader.cost:,.0f} FE per image"
    marks = f" {leader.marks}" if leader.marks else ""
    what = (
        "in validation"
        if comparable.attack == VALID
        else f"under {attack_title(comparable.attack)}"
    )
    named = f"{leader.letter} ({leader.label}){marks}"
    said = f"{comparable.title}: {named} leads with {cell.text} % {what}{cost}."
    behind, alike = (
        [pair.other.letter for pair in pairs if pair.relation == word]
        for word in ("behind", "not told apart")
    )
    if pairs and not alike and not behind:
        others = sum(row.trusted for row in comparable.rows) - 1
        of = f"all {others} others" if len(pairs) == others else f"the {len(pairs)} with flags"
        said += f" On the same images it is ahead of {of} beyond chance."
    if alike:
        said += f" On the same images it cannot be told from {_some(alike)}."
    if behind:
        said += f" On the seeds and images that they share it is behind {_some(behind)}."
    return said


def _some(letters: list[str]) -> str:
    return ", ".join(letters[:8]) + (" and others" if len(letters) > 8 else "")
