"""Which configuration leads, whether that is decided, and what to run next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain.config.names import STORAGE
from raytrain.evaluation.names import attack_title, words_for
from raytrain.report.cells import Cell
from raytrain.report.comparable import ComparableRuns
from raytrain.report.pairs import Pair
from raytrain.report.rows import VALID, Row, order
from raytrain.report.runs import Trained
from raytrain.training.run_folder import option, short_id

_NAMED = 4  # configurations in a sentence
_PART = re.compile(r"test(?:_last)?_(\d+)")  # scope of an evaluation on some of the test images


@dataclass(frozen=True)
class Answer:
    """The answer of a comparison."""

    text: str
    decided: bool  # a test or intervals separate the leader from all others
    next: str = ""  # what is missing, in words; empty if nothing is
    command: str = ""  # that measures it


def answer_of(comparable: ComparableRuns, pairs: Sequence[Pair]) -> Answer:
    """The leader in a sentence, and the command for what was not measured."""
    lacking, command = _next(comparable)
    leader = comparable.leader
    cell = None if leader is None else leader.ranking_cell(comparable.attack)
    if leader is None or cell is None:
        return Answer(f"{comparable.title}: nothing here can be ranked.", False, lacking, command)
    others = [row for row in _ranked(comparable) if row is not leader]
    near = [row for row in others if not _apart(row, comparable, cell, pairs)]
    behind = [pair.other for pair in pairs if pair.relation == "behind"]
    who = f"{_named(leader)} ({leader.label}){f' {leader.marks}' if leader.marks else ''},"
    has = _measured(comparable, leader, cell)
    if not others:
        said = f"{who} is the only configuration that can be ranked: {has}."
    elif not near:
        said = f"{who} leads: {has}. {_why(others, pairs)}"
    else:
        alike = [row for row in near if row not in behind]
        said = f"Not decided. {who} has the highest robust accuracy, {has}"
        said += f"; {_some(alike)} cannot be told from it{_how(alike, pairs)}." if alike else "."
        if behind:
            said += f" On the seeds and images that they share it is behind {_some(behind)}."
    return Answer(f"{comparable.title}: {said}", not near, lacking, command)


def _ranked(comparable: ComparableRuns) -> list[Row]:
    known = [r for r in comparable.rows if r.trusted and r.ranking_cell(comparable.attack)]
    return sorted(known, key=lambda row: order(row, comparable.attack))


def _apart(row: Row, comparable: ComparableRuns, leading: Cell, pairs: Sequence[Pair]) -> bool:
    """Whether the leader is ahead of a row beyond chance: by the paired test, else by intervals."""
    tested = next((pair for pair in pairs if pair.other is row), None)
    if tested is not None:
        return tested.relation == "ahead"
    cell = row.ranking_cell(comparable.attack)
    if cell is None or cell.high is None or leading.low is None:
        return False
    return cell.high < leading.low


def _measured(comparable: ComparableRuns, leader: Row, cell: Cell) -> str:
    """`45.3 % [40.1, 50.5] under PGD-20, at 70 FE per training image`."""
    where = f"under {attack_title(comparable.attack)}"
    if comparable.attack == VALID:
        attack = leader.setting.first.valid_attack
        where = "in validation" + (f" under {attack_title(attack)}" if attack else "")
    seeds = f" over {cell.seeds} seeds" if cell.seeds > 1 else ""
    cost = "" if leader.cost is None else f", at {leader.cost:,.0f} FE per training image"
    limits = f" {cell.limits}" if cell.limits else ""
    return f"{100 * cell.value:.1f} %{limits}{seeds} {where}{cost}"


def _why(others: Sequence[Row], pairs: Sequence[Pair]) -> str:
    few = {1: "the other one", 2: "both others"}
    of = few.get(len(others), f"all {len(others)} others")
    if len(pairs) == len(others):
        return f"On the same images it is ahead of {of} beyond chance (p < 0.05)."
    if pairs:
        return f"It is ahead of {of} beyond chance: on the same images, or by its interval."
    return f"Its interval is above that of {of}."


def _how(alike: Sequence[Row], pairs: Sequence[Pair]) -> str:
    tested = sum(any(pair.other is row for pair in pairs) for row in alike)
    if tested == len(alike):
        return " on the same images"
    return " by their intervals" if not tested else " on the same images or by their intervals"


def _named(row: Row) -> str:
    """`A, run t0008`."""
    several = len(row.setting.runs) > 1
    return f"{row.letter}, run{'s' if several else ''} {row.setting.names}"


def _some(rows: Sequence[Row]) -> str:
    words = [f"{row.letter} ({row.setting.short_names})" for row in rows[:_NAMED]]
    more = len(rows) - _NAMED
    if more > 0:
        words.append(f"{more} others")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _next(comparable: ComparableRuns) -> tuple[str, str]:
    """What was not measured on the test set, the best of it first, and the command for that."""
    attack = comparable.attack
    ended = [
        row for row in comparable.rows if not row.stopped
    ]  # others cost test data for nothing
    missing = [(row, run) for row in ended if (run := _unmeasured(row, attack))]
    if not missing:
        return "", ""
    row, run = min(missing, key=lambda one: _worth(one[0], attack))
    count, total = len(missing), len(ended)
    where = "on the test set" if attack == VALID else f"under {attack_title(attack)}"
    unranked = "" if attack == VALID else ", and not ranked"
    part = " with all seeds" if attack != VALID and row.score(attack) is not None else unranked
    who = f"{count} of {total} configurations {'was' if count == 1 else 'were'} not"
    if count == total:
        who = "the configuration was not" if total == 1 else f"none of {total} configurations was"
    name = row.setting.run_names[row.setting.runs.index(run)]
    said = f"{who} evaluated {where}{part}; the next is {row.letter} (run {name})"
    words = [] if attack == VALID else words_for(attack)
    sizes = [m[1] for one in comparable.rows for e in one.best if (m := _PART.fullmatch(e.scope))]
    words += [f"images={sizes[0]}"] if sizes and attack != VALID else []
    where = option(run.tags.get("storage", STORAGE))
    return said, " ".join([f"raytrain evaluate {short_id(run.id)}{where}", *words])


def _unmeasured(row: Row, attack: str) -> Trained | None:
    """The first run of a row that has not what rows are ranked by."""
    if not row.home:
        return None
    mine = {id(one) for one in row.best if attack in one.accuracies}
    runs = row.setting.runs
    return next((run for run in runs if not any(id(e) in mine for e in run.evaluations)), None)


def _worth(row: Row, attack: str) -> tuple[bool, float]:
    """What is measured first: no seed measured, by validation; then the other seeds of what was."""
    valid = row.valid()
    measured = attack != VALID and row.score(attack) is not None
    return measured, 0.0 if valid is None else -valid.value
