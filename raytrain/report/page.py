"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raytrain.report.answer import answer_of
from raytrain.report.comparable import ComparableRuns
from raytrain.report.configurations import ConfigurationGroup
from raytrain.report.content import ReportContent
from raytrain.report.figures import draw_comparable
from raytrain.report.runs import Trained
from raytrain.report.sections import Section, section_of
from raytrain.report.tables import write_tables

_HERE = Path(__file__).parent


REPORT = "report.html"
OURS = (REPORT, "figures", "data")
"""What a comparison leaves in its folder."""
GENERATOR = '<meta name="generator" content="raytrain compare">'
"""By which a report is known."""

_DRAWN = 6  # arenas with figures


def write_report(content: ReportContent, folder: Path) -> None:
    """Report, figures and data into an empty folder."""
    parts = []
    for number, comparable in enumerate(content.comparables, start=1):
        prefix = f"{number}-" if len(content.comparables) > 1 else ""
        pairs, figures = content.pairs[comparable.title], []
        if number <= _DRAWN:
            figures = draw_comparable(comparable, pairs, folder / "figures", prefix)
        parts.append(section_of(comparable, pairs, figures))
    files = write_tables(folder / "data", content.settings, content.comparables, content.pairs)
    names = [file.name for file in files if file.parent.name == "data"]
    (folder / REPORT).write_text(_page(content, parts, names), encoding="utf-8")


def _page(content: ReportContent, parts: Sequence[Section], files: Sequence[str]) -> str:
    """The HTML; nothing in it is taken as such but the figures."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=content.title,
        generator=GENERATOR,
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        count=f"{_some(content.num_runs, 'run')} of {_some(len(content.settings), 'configuration')}",
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=version("raytrain"),
        uri=without_password(content.uri),
        answers=[
            answer_of(comparable, content.pairs[comparable.title])
            for comparable in content.comparables
        ],
        notes=content.notes,
        parts=parts,
        runs=_runs(content.settings, content.comparables),
        files=", ".join(files),
    )


def without_password(uri: str) -> str:
    """The address of a store as it may be shown."""
    split = urlsplit(uri)
    return uri.replace(f"{split.netloc}", split.netloc.rpartition("@")[2]) if split.netloc else uri


def _some(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _runs(
    settings: Sequence[ConfigurationGroup], comparables: Sequence[ComparableRuns]
) -> list[dict[str, Any]]:
    letters = {
        id(row.setting): row.letter for comparable in comparables for row in comparable.rows
    }
    rows = [_run(run, letters.get(id(one), ""), one) for one in settings for run in one.every]
    return sorted(rows, key=lambda run: (len(run["letter"]), run["letter"]))


def _run(run: Trained, letter: str, setting: ConfigurationGroup) -> dict[str, Any]:
    note = " (repeats a seed; not averaged)" if run in setting.repeats else ""
    note += " (did not end as the others; not averaged)" if run in setting.unfinished else ""
    dirty = " (changed)" if run.tags.get("git_dirty") else ""
    return {
        "letter": letter,
        "name": run.name,
        "note": note,
        "id": run.id,
        "seed": run.seed,
        "epochs": run.epochs,
        "state": run.state,
        "failed": run.failed_checks,
        "checks": run.tags.get("checks", "not run"),
        "commit": run.tags.get("git_commit", "-")[:10] + dirty,
        "hardware": run.tags.get("hardware", "-"),
    }
