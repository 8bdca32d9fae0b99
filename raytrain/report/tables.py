"""The data of a comparison as Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.report.comparable import ComparableRuns
from raytrain.report.configurations import ConfigurationGroup
from raytrain.report.pairs import Pair
from raytrain.report.rows import Row
from raytrain.report.runs import Trained

_RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("configuration", pa.string()),
        ("name", pa.string()),
        ("seed", pa.string()),
        ("state", pa.string()),
        ("contract", pa.string()),
        ("checks", pa.string()),
        ("epochs", pa.int64()),
        ("best_epoch", pa.int64()),
        ("fe_per_image", pa.float64()),
        ("params", pa.string()),
        ("metrics", pa.string()),
        ("tags", pa.string()),
    ]
)
_SCORES = pa.schema(
    [
        ("arena", pa.string()),
        ("letter", pa.string()),
        ("configuration", pa.string()),
        ("attack", pa.string()),
        ("checkpoint", pa.string()),
        ("value", pa.float64()),
        ("std", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("seeds", pa.int64()),
        ("trusted", pa.bool_()),
        ("home", pa.bool_()),
        ("fe_per_image", pa.float64()),
        ("rank", pa.int64()),
        ("band", pa.int64()),
        ("front", pa.bool_()),
    ]
)
_CURVES = pa.schema(
    [
        ("run_id", pa.string()),
        ("metric", pa.string()),
        ("epoch", pa.int64()),
        ("value", pa.float64()),
    ]
)
_PAIRS = pa.schema(
    [
        ("arena", pa.string()),
        ("leader", pa.string()),
        ("other", pa.string()),
        ("attack", pa.string()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("only_leader", pa.int64()),
        ("only_other", pa.int64()),
        ("pairs_of_seeds", pa.int64()),
        ("p", pa.float64()),
        ("p_holm", pa.float64()),
    ]
)


def write_tables(
    folder: Path,
    settings: Iterable[ConfigurationGroup],
    comparables: Iterable[ComparableRuns],
    pairs: dict[str, list[Pair]],
) -> list[Path]:
    """`runs`, `scores`, `curves`, `pairs`, and in `flags/` a file per evaluation."""
    settings, comparables = list(settings), list(comparables)
    runs = [(run, one) for one in settings for run in one.every]
    curves = [
        (run.id, metric, epoch, value)
        for run, _ in runs
        for metric, curve in run.curves.items()
        for epoch, value in sorted(curve.items())
    ]
    scores = [
        line
        for comparable in comparables
        for row in comparable.rows
        for line in _scores(comparable, row)
    ]
    tables = {
        "runs": _table([_run(run, one) for run, one in runs], _RUNS),
        "scores": _table(scores, _SCORES),
        "curves": _table(curves, _CURVES),
        "pairs": _table([(t, *_pair(pair)) for t in pairs for pair in pairs[t]], _PAIRS),
        **{f"flags/{run.id}-{scope}": flags for run, _ in runs for scope, flags in _flags(run)},
    }
    files = []
    for name, table in tables.items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        files.append(file)
    return files


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [() for _ in schema]
    return pa.table([list(column) for column in columns], schema=schema)


def _run(run: Trained, setting: ConfigurationGroup) -> tuple[Any, ...]:
    return (
        run.id,
        setting.label,
        run.name,
        run.seed,
        run.state,
        run.contract_text,
        run.tags.get("checks"),
        run.epochs,
        run.best_epoch,
        run.per_image(run.metrics.get("cost/fe")),
        json.dumps(dict(run.params)),
        json.dumps(dict(run.metrics)),
        json.dumps(dict(run.tags)),
    )


def _scores(comparable: ComparableRuns, row: Row) -> Iterable[tuple[Any, ...]]:
    """One line per number of the table."""
    cells = {(attack, "best"): row.score(attack) for attack in ("clean", *comparable.attacks)}
    cells |= {(a, "last"): row.score(a, last=True) for a in ("clean", *comparable.attacks)}
    for metric in ("valid/clean", "valid/robust"):
        cells |= {(metric, "best"): row.valid(metric), (metric, "last"): row.valid(metric, True)}
    ranks = (row.cost, row.rank, row.band, row.front)
    for (attack, checkpoint), cell in cells.items():
        if cell is not None:
            numbers = (
                cell.value,
                cell.std,
                cell.low,
                cell.high,
                cell.seeds,
                row.trusted,
                row.home,
            )
            yield comparable.title, row.letter, row.label, attack, checkpoint, *numbers, *ranks


def _flags(run: Trained) -> Iterable[tuple[str, pa.Table]]:
    return ((one.scope, one.flags) for one in run.evaluations if one.flags is not None)


def _pair(pair: Pair) -> tuple[Any, ...]:
    return (
        pair.leader.letter,
        pair.other.letter,
        pair.attack,
        pair.difference,
        pair.low,
        pair.high,
        pair.only_leader,
        pair.only_other,
        pair.seeds,
        pair.p,
        pair.holm,
    )
