"""What a report shows, of runs from any store: configurations, what is comparable, pairs, notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raytrain.report.comparable import ComparableRuns, comparable_runs
from raytrain.report.configurations import ConfigurationGroup, settings_of
from raytrain.report.pairs import Pair, pairs_of
from raytrain.report.runs import Trained

_NAMED = 5  # runs in a note


@dataclass(frozen=True)
class ReportContent:
    """The content of a report."""

    title: str
    uri: str  # of the store
    settings: list[ConfigurationGroup]
    comparables: list[ComparableRuns]
    pairs: dict[str, list[Pair]]  # by title of the arena
    notes: list[str]  # what concerns all arenas

    @property
    def num_runs(self) -> int:
        """Runs of all configurations, also those that are not averaged."""
        return sum(len(one.every) for one in self.settings)


def content_of(
    title: str, uri: str, runs: Iterable[Trained], notes: Sequence[str] = ()
) -> ReportContent:
    """Join seeds, separate what may not be ranked together, and compare the leaders with the others.

    `notes` are what was noted while the runs were read; notes about all arenas are appended.
    """
    settings = settings_of(runs)
    comparables = comparable_runs(settings)
    pairs = {comparable.title: pairs_of(comparable) for comparable in comparables}
    return ReportContent(
        title, uri, settings, comparables, pairs, [*notes, *_notes(settings, comparables)]
    )


def _notes(settings: list[ConfigurationGroup], comparables: list[ComparableRuns]) -> list[str]:
    """What concerns all arenas."""
    notes = []
    if len(comparables) > 1:
        notes.append(
            f"These runs are of {len(comparables)} kinds that must not be ranked against each other: "
            "another data set, test set, threat model or way of validation. Each has a part of its "
            "own below."
        )
    repeats = [run.name for one in settings for run in one.repeats]
    if repeats:
        named = ", ".join(repeats[:_NAMED]) + (", ..." if len(repeats) > _NAMED else "")
        notes.append(
            f"The configuration and seed of {named} are those of another run: listed among the runs, "
            "in no table and not averaged."
        )
    unfinished = sum(len(one.unfinished) for one in settings)
    if unfinished:
        notes.append(
            f"{unfinished} runs did not end (interrupted, failed, diverged or running) while other "
            "seeds of their configuration did: they are listed among the runs, but are not averaged."
        )
    alive = [run for one in settings for run in one.runs if run.status == "RUNNING"]
    if alive:
        notes.append(
            f"{len(alive)} runs have not ended: they are running, or their driver died. Their numbers are "
            "those of their last row."
        )
    return notes
