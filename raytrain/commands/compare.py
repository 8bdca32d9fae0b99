"""`raytrain compare`: from words to a folder with a report, figures and data."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.commands.results import Result, ShownResult
from raytrain.report.answer import Answer, answer_of
from raytrain.report.comparable import ComparableRuns
from raytrain.report.content import content_of
from raytrain.report.evaluations import read_evaluations
from raytrain.report.folder import replace_report, report_folder
from raytrain.report.page import REPORT
from raytrain.report.pairs import Pair
from raytrain.report.rows import Row
from raytrain.report.runs import Trained, read
from raytrain.report.selection import Chosen, choose
from raytrain.tracking import reader, tracked, tracking_uri

if TYPE_CHECKING:
    import pandas as pd

Word = Result | str | Path

_ARENAS = 3  # that a representation has room for


@dataclass(frozen=True, repr=False)
class Comparison(ShownResult):
    """A comparison and the folder of its files."""

    title: str
    folder: Path
    report: Path
    comparables: list[ComparableRuns]
    pairs: dict[str, list[Pair]]  # by title of the arena
    notes: list[str]
    runs: int
    tracking_uri: str
    parent: str | None  # the run in MLflow that holds it too

    def frame(self) -> pd.DataFrame:
        """A row per configuration in each arena, in its order there.

        Scores are shares in [0, 1] with 95 % limits, `NAME`, `NAME_low` and `NAME_high`, for `clean`, every
        attack, and `valid/robust`; costs are forward-equivalents per training image.
        """
        import pandas as pd

        return pd.DataFrame([_flat_row(one, row) for one in self.comparables for row in one.rows])

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its title, and the leader of each of the first arenas."""
        leaders = {one.title: _leader(one) for one in self.comparables[:_ARENAS]}
        more = len(self.comparables) - len(leaders)
        rest = {"others": f"{more} more in the report"} if more else {}
        return self.title, {
            "runs": str(self.runs),
            **leaders,
            **rest,
            "report": str(self.report),
        }

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "title": self.title,
            "report": str(self.report),
            "folder": str(self.folder),
            "runs": self.runs,
            "parent": self.parent,
            "notes": self.notes,
            "arenas": [
                _arena_json(comparable, self.pairs[comparable.title], self.answer(comparable))
                for comparable in self.comparables
            ],
        }

    def answer(self, comparable: ComparableRuns) -> Answer:
        """Which configuration of an arena leads, and what to run next."""
        return answer_of(comparable, self.pairs[comparable.title])


def compare(
    words: Word | Sequence[Word] = (), *, to: str | Path | None = None, uri: str | None = None
) -> Comparison:
    """Lay recorded runs beside one another: a table, figures, a report, the data.

    `words` are results of other commands, ids of runs, or names of experiments, sweeps or runs; without
    any it is the experiment `raytrain`. They are read from the store `uri`, which is by default that of
    the first result. Everything is left in the folder `to` (default: `comparisons/` and the words); an
    earlier comparison there is replaced. The trials of one sweep leave it on the sweep's own run too.

    Raises:
        RequestError: if a word names nothing or several things, or the folder holds something else.
    """
    given = words if isinstance(words, Sequence) and not isinstance(words, str) else [words]
    results = [word for word in given if not isinstance(word, str | Path)]
    uri = uri or next((result.tracking_uri for result in results), None)
    client = reader(uri)
    chosen = choose(
        client, [str(word) if isinstance(word, str | Path) else word.recorded for word in given]
    )
    folder = _folder(to, chosen.title)
    notes: list[str] = []
    store = tracking_uri(uri)
    runs = _read(client, chosen, notes)
    content = content_of(chosen.title, store, runs, notes)
    page = replace_report(content, folder)
    parent = _leave(chosen, folder, store, client)
    return Comparison(
        title=chosen.title,
        folder=folder,
        report=page,
        comparables=content.comparables,
        pairs=content.pairs,
        notes=content.notes,
        runs=content.num_runs,
        tracking_uri=store,
        parent=parent,
    )


def _read(client: Any, chosen: Chosen, notes: list[str]) -> list[Trained]:
    with tempfile.TemporaryDirectory(prefix="raytrain-") as files:
        return [
            read(client, run, read_evaluations(client, run, Path(files), notes.append))
            for run in chosen.runs
        ]


def _folder(to: str | Path | None, title: str) -> Path:
    """The output folder: by default one that is named after the title."""
    name = re.sub(r"[^\w.-]+", "-", title)[:60].strip("-.") or "runs"
    return report_folder(Path("comparisons") / name if to is None else Path(to))


def _leave(chosen: Chosen, folder: Path, uri: str, client: Any) -> str | None:
    """The same files on the sweep's own run, under `comparison/`."""
    if chosen.parent is None:
        return None
    run_id = chosen.parent.info.run_id
    experiment = client.get_experiment(chosen.parent.info.experiment_id).name
    spools = folder / ".mlflow"
    outbox = spools / f"{time.time_ns():x}-{os.getpid()}.jsonl"
    with tracked(uri, experiment, outbox, spools) as tracker:
        tracker.adopt(run_id, run_id)
        tracker.artifact(run_id, folder / REPORT, "comparison")
        for name in ("figures", "data"):
            if (folder / name).is_dir():
                tracker.artifact(run_id, folder / name, f"comparison/{name}")
    return run_id


def _arena_json(comparable: ComparableRuns, pairs: list[Pair], answer: Answer) -> dict[str, Any]:
    leader = comparable.leader
    return {
        "title": comparable.title,
        "threat": comparable.threat,
        "test_images": comparable.images,
        "ranked_by": comparable.attack,
        "leader": None if leader is None else leader.letter,
        "answer": answer.text,
        "decided": answer.decided,
        "next": answer.command or None,
        "notes": list(comparable.notes),
        "rows": [_row_json(comparable, row) for row in comparable.rows],
        "pairs": [
            {
                "other": pair.other.letter,
                "difference": pair.difference,
                "p": pair.p,
                "p_holm": pair.holm,
            }
            for pair in pairs
        ],
    }


def _flat_row(comparable: ComparableRuns, row: Row) -> dict[str, Any]:
    """The same without nested records."""
    values = _row_json(comparable, row)
    scores = values.pop("scores")
    limits = {
        f"{name}{suffix}": cell[part]
        for name, cell in scores.items()
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    return {"arena": comparable.title, **values, **limits}


def _leader(comparable: ComparableRuns) -> str:
    """The best that can be trusted, in words."""
    leader = comparable.leader
    cell = None if leader is None else leader.ranking_cell(comparable.attack)
    if leader is None or cell is None:
        return "nothing to rank by"
    return f"{leader.letter} ({leader.label}): {cell.text} %, {comparable.judged_by}"


def _row_json(comparable: ComparableRuns, row: Row) -> dict[str, Any]:
    cells = {name: row.score(name) for name in ("clean", *comparable.attacks)}
    cells["valid/robust"] = row.valid()
    return {
        "letter": row.letter,
        "configuration": row.label,
        "names": row.setting.names,
        "run_ids": [run.id for run in row.setting.runs],
        "rank": row.rank,
        "band": row.band,
        "front": row.front,
        "trusted": row.trusted,
        "home": row.home,
        "fe_per_image": row.cost,
        "scores": {name: vars(cell) for name, cell in cells.items() if cell is not None},
    }
