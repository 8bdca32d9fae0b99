"""Answers to the questions of a study: yes, no or not decided, from runs of equal cost on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raytrain.evaluation.confidence import Difference, difference, holm
from raytrain.report.comparable import ComparableRuns
from raytrain.report.pairs import LEVEL, flags_by_seed
from raytrain.report.rows import ALIKE, Row

from .problem import Question

Verdict = Literal["yes", "no", "not decided"]


@dataclass(frozen=True)
class Comparison:
    """A method against another one at one budget, under the attack that the arena is ranked by."""

    question: Question
    other: str
    budget: float
    rows: tuple[Row | None, Row | None]  # of the method and of the other
    difference: Difference | None = None  # of robust accuracy; None: see `why_not`
    p: float = 1.0  # adjusted for all comparisons of the study
    why_not: str = ""  # why nothing can be decided; empty if something can

    @property
    def verdict(self) -> Verdict:
        """Whether the method is the more robust one, beyond chance of seeds and of images."""
        if self.difference is None or self.p >= LEVEL:
            return "not decided"
        return "yes" if self.difference.value > 0 else "no"


@dataclass(frozen=True)
class Answer:
    """The answer to a question at one budget: of all its comparisons together."""

    question: Question
    budget: float
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> Verdict:
        """`yes` if the method is ahead of all others, `no` if it is behind one of them."""
        found = {one.verdict for one in self.comparisons}
        if "no" in found:
            return "no"
        return "yes" if found == {"yes"} else "not decided"


def answers(
    questions: Sequence[Question],
    budgets: Sequence[float],
    comparable: ComparableRuns,
    rows: dict[tuple[str, float], Row],
    seeds: int,
) -> list[Answer]:
    """The answers on one test set; `rows` are those of the arena, by method and budget, and `seeds` is
    how many runs each has.

    The p of all comparisons together are adjusted by Holm.
    """
    made = [
        _compared(question, other, budget, comparable.attack, rows, seeds)
        for question in questions
        for budget in budgets
        for other in question.against
    ]
    tested = [one for one in made if one.difference is not None]
    adjusted = holm([one.difference.p for one in tested if one.difference is not None])
    p_of = {id(one): p for one, p in zip(tested, adjusted, strict=True)}
    final = [replace(one, p=p_of.get(id(one), 1.0)) for one in made]
    return [
        Answer(question, budget, tuple(c for c in final if (c.question, c.budget) == (question, budget)))
        for question in questions
        for budget in budgets
    ]  # fmt: skip


def _compared(
    question: Question,
    other: str,
    budget: float,
    attack: str,
    rows: dict[tuple[str, float], Row],
    seeds: int,
) -> Comparison:
    one, two = rows.get((question.method, budget)), rows.get((other, budget))
    made = Comparison(question, other, budget, (one, two))
    for name, row in ((question.method, one), (other, two)):
        if row is None or row.score(attack) is None:
            return replace(made, why_not=f"{name} was not measured")
        if not row.trusted:
            return replace(made, why_not=f"{name} failed a check ({row.failed[0]})")
    assert one is not None and two is not None
    if one.cost is None or two.cost is None or not 1 / ALIKE <= one.cost / two.cost <= ALIKE:
        return replace(made, why_not="the costs differ by more than a tenth")
    flags = flags_by_seed(one, two, attack)
    if len(flags) < seeds:
        return replace(made, why_not=f"{len(flags)} of {seeds} seeds were measured for both")
    return replace(made, difference=difference(flags))
