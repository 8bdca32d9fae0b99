"""The table of all rows: nothing torn, nothing twice, every column of its type and explained."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytrain.core.epoch_metrics import METRICS
from raytrain.tuning import trial_rows as rows_module
from raytrain.tuning.trial_rows import SCHEMA, RowLog


def add(log: RowLog, trial: int, epoch: int, robust: float = 0.5, attempt: int = 0) -> None:
    log.add(trial, attempt, epoch, epoch / 4, {"optimizer.lr": 0.1}, {"valid/robust": robust})


def test_a_table_has_every_row_in_the_order_it_came(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    for trial, epoch in ((0, 1), (1, 1), (0, 2)):
        add(log, trial, epoch, robust=trial + epoch / 10)
    assert log.write_parquet(tmp_path / "t.parquet") == 3
    table = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [(row["trial"], row["epoch"], row["valid/robust"]) for row in table] == [
        (0, 1, 0.1),
        (1, 1, 1.1),
        (0, 2, 0.2),
    ]
    assert json.loads(table[0]["params"]) == {"optimizer.lr": 0.1}
    assert table[0]["progress"] == 0.25 and table[0]["valid/clean"] is None
    assert table[0]["time"].tzinfo is not None


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_costs_no_other(tmp_path: Path, cut: int) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    add(log, 0, 1)
    add(log, 0, 2)
    whole = log.file.read_bytes()
    log.file.write_bytes(whole[:-cut])
    again = RowLog(log.file)
    add(again, 0, 3)
    add(again, 0, 4)
    # Without its newline alone, a line is still whole.
    expected = [1, 2, 3, 4] if cut == 1 else [1, 3, 4]
    assert [row["epoch"] for row in again.rows()] == expected
    assert again.write_parquet(tmp_path / "t.parquet") == len(expected)


def test_an_epoch_that_came_twice_is_there_once_as_it_came_first(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    add(log, 0, 1, 0.1)
    add(log, 0, 2, 0.2)
    add(log, 0, 2, 0.9, attempt=3)
    add(log, 0, 3, 0.3, attempt=3)
    add(log, 1, 2, 0.4)
    assert log.write_parquet(tmp_path / "t.parquet") == 4
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column("valid/robust").to_pylist() == [0.1, 0.2, 0.3, 0.4]
    assert table.column("attempt").to_pylist() == [0, 0, 3, 0]


def test_an_empty_sweep_is_an_empty_table_with_all_columns(tmp_path: Path) -> None:
    assert RowLog(tmp_path / "none.jsonl").write_parquet(tmp_path / "t.parquet") == 0
    table = pq.read_table(tmp_path / "t.parquet")
    assert (table.num_rows, table.schema) == (0, SCHEMA)


def test_every_column_has_its_type_and_says_what_it_is(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "rows.jsonl")
    log.add(0, 0, 1, 1.0, {}, {name: float("nan") for name in METRICS} | {"cost/fe": 3})
    log.write_parquet(tmp_path / "t.parquet")
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert set(METRICS) < set(schema.names) and schema.equals(SCHEMA)
    for field in schema:
        assert field.metadata[b"about"].decode().strip()
        if field.name in METRICS:
            assert field.type == pa.float64()
            assert field.metadata[b"about"].decode() == METRICS[field.name]
    assert pq.read_table(tmp_path / "t.parquet").column("cost/fe").to_pylist() == [3.0]


def test_a_long_journal_is_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "CHUNK", 3)
    log = RowLog(tmp_path / "rows.jsonl")
    for epoch in range(1, 8):
        add(log, 0, epoch)
        add(log, 0, epoch)
    assert log.write_parquet(tmp_path / "t.parquet") == 7
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column("epoch").to_pylist() == list(range(1, 8))
    assert list(tmp_path.glob(".t*")) == []
