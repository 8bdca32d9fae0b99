"""What the page shows of one arena, as plain words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrain.evaluation.names import attack_title
from raytrain.report.bands import bands_of
from raytrain.report.cells import Cell
from raytrain.report.comparable import ComparableRuns
from raytrain.report.cost_figures import p_text, signed
from raytrain.report.pairs import Pair
from raytrain.report.rows import VALID, Row

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
class Band:
    """Rows of equal cost, the best first; those that are folded away, and a line about them."""

    title: str
    rows: list[dict[str, Any]]
    folded: list[dict[str, Any]]
    summary: str


@dataclass(frozen=True)
class Section:
    """One arena on the page."""

    title: str
    threat: str
    judged_by: str
    notes: tuple[str, ...]
    heads: list[str]
    bands: list[Band]  # the highest cost first
    legend: str
    failed: list[str]
    leader: str
    pairs: list[dict[str, Any]]
    figures: list[Drawn] = field(default_factory=list)


def section_of(comparable: ComparableRuns, pairs: list[Pair], figures: list[Drawn]) -> Section:
    """An arena with its figures."""
    columns = columns_of(comparable)
    heads = _heads(comparable, columns)
    bands = bands_of(comparable)
    tables = [
        [[_row(comparable, row, columns) for row in some] for some in (band.shown, band.folded)]
        for band in bands
    ]
    _drop_empty(heads, [row for band in tables for table in band for row in table])
    leader = comparable.leader
    return Section(
        title=comparable.title,
        threat=comparable.threat,
        judged_by=comparable.judged_by,
        notes=comparable.notes,
        heads=heads,
        bands=[
            Band(band.title, shown, folded, band.summary)
            for band, (shown, folded) in zip(bands, tables, strict=True)
        ],
        legend=_legend(comparable),
        failed=[f"{row.letter}: {said}" for row in comparable.rows for said in row.failed if said],
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
    only = comparable.attack == VALID  # the interval of what is ranked by
    cells += [
        _cell(row.valid("valid/clean"), row.marks, of_images=False),
        _cell(row.valid(), row.marks, of_images=only),
        _cell(row.valid(last=True), row.marks, of_images=False),
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
        "names": row.setting.names,
        "label": row.label,
        "front": row.front,
        "cells": cells,
        "state": ", ".join(states),
        "kind": " ".join(filter(None, kinds)),
    }


def _cell(cell: Cell | None, marks: str, of_images: bool = True) -> dict[str, str]:
    """A number and its spread over seeds, or of a single seed the interval of its images."""
    if cell is None:
        return {"value": "-"}
    value, _, interval = cell.text.partition(" ")
    shown = of_images or cell.std is not None
    return {"value": value, "interval": interval if shown else "", "marks": marks}


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


def _drop_empty(heads: list[str], rows: list[dict[str, Any]]) -> None:
    """Drop empty columns."""
    for place in reversed(range(len(heads))):
        if all(row["cells"][place]["value"] == "-" for row in rows):
            del heads[place]
            for row in rows:
                del row["cells"][place]


def _legend(comparable: ComparableRuns) -> str:
    said = (
        "Means ± standard deviations over seeds; a single seed is followed by the 95 % interval of "
        "its images. Bold: the leader. ◆: on the Pareto front of cost and accuracy."
    )
    if any(not row.trusted for row in comparable.rows):
        said += " ⚠: a check failed, not to be believed."
    return said


def _pair(pair: Pair) -> dict[str, Any]:
    limits = f"{signed(100 * pair.low)} to {signed(100 * pair.high)}"
    one, other = pair.leader.cost, pair.other.cost
    return {
        "letter": pair.other.letter,
        "marks": pair.other.marks,
        "names": pair.other.setting.names,
        "label": pair.other.label,
        "cells": [
            signed(100 * pair.difference),
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
