"""Records of a study in Parquet: one row per training and evaluation, with a flag per test image."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytrain.core.errors import RequestError
from raytrain.core.files import atomic_writer

from .problem import Task

_ALL = "records.parquet"  # of those that were joined; others are beside it, a file each
_FLAGS = pa.map_(pa.string(), pa.list_(pa.bool_()))
_KINDS: dict[str, pa.DataType] = {
    "trial": pa.int64(),
    "seed": pa.int64(),
    "evaluation": pa.int64(),
    "began": pa.int64(),
    "epochs": pa.int64(),
    "train_images": pa.int64(),
    "valid_images": pa.int64(),
    "budget": pa.float64(),
    "fe_per_image": pa.float64(),
    "seconds": pa.float64(),
    "evaluation_seconds": pa.float64(),
    "valid_clean": pa.float64(),
    "valid_robust": pa.float64(),
    "image": pa.list_(pa.int64()),
    "label": pa.list_(pa.int64()),
    "predicted": pa.list_(pa.int64()),
    "flags": _FLAGS,
}
"""Types of the columns that are not text."""


@dataclass(frozen=True)
class Record:
    """What came of a task. The last fields are empty in the phase `tune`, and where training failed."""

    problem: str
    phase: str
    method: str
    trial: int
    budget: float
    seed: int
    evaluation: int | None
    signature: str  # of the run's configuration
    state: str  # `finished`, or why training failed
    began: int  # milliseconds since 1970
    epochs: int
    train_images: int
    valid_images: int
    fe_per_image: float  # spent
    seconds: float  # of training
    valid_clean: float | None  # at the last epoch, shares in [0, 1]
    valid_robust: float | None
    metrics: Mapping[str, float]  # of the last epoch
    curves: Mapping[str, dict[int, float]]  # by epoch
    params: Mapping[str, str]  # the configuration, by dotted path
    tags: Mapping[str, str]  # threat model, hardware, versions, commit
    evaluation_seconds: float | None = None
    result: Mapping[str, Any] | None = None  # the evaluation record
    image: list[int] = field(default_factory=list)  # its number in the test set
    label: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    flags: Mapping[str, list[bool | None]] = field(default_factory=dict)  # true: survived

    @property
    def task(self) -> Task:
        """What it is the record of."""
        return Task(
            self.problem,
            self.phase,
            self.method,
            self.trial,
            self.budget,
            self.seed,
            self.evaluation,
        )

    @property
    def key(self) -> tuple[str, str]:
        """The key of the task, and the signature of the configuration that it had."""
        return self.task.key, self.signature

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.state == "finished"


_TEXTS = ("metrics", "curves", "params", "tags", "result")  # stored as JSON
_SCHEMA = pa.schema([(one.name, _KINDS.get(one.name, pa.string())) for one in fields(Record)])


class Records:
    """The records of a problem: a folder of Parquet files, to which one is added per record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[Record]:
        """All records, each task of each configuration once, in the order in which they began.

        Raises:
            RequestError: naming a file that holds no records.
        """
        return _unique(one for file in sorted(self.folder.glob("*.parquet")) for one in read(file))

    def add(self, record: Record) -> None:
        """Write a record at once, whole or not at all."""
        with atomic_writer(
            self.folder / f"{record.task.key}-{record.signature[:8]}.parquet"
        ) as file:
            pq.write_table(_table([record]), file)

    def take(self, sources: Iterable[Path]) -> int:
        """Add the records of other files or folders that are not here; return how many.

        Raises:
            RequestError: naming a file that is missing, or holds no records of this problem.
        """
        known = {one.key for one in self.read()}
        new = []
        for source in sources:
            files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
            if not files:
                raise RequestError(f"{source}: expected Parquet files of a study, found none")
            new += [(file, one) for file in files for one in read(file)]
        for file, record in new:
            if record.problem != self.folder.name:
                raise RequestError(
                    f"{file}: expected records of {self.folder.name}, found {record.problem}"
                )
        added = [one for one in _unique(record for _, record in new) if one.key not in known]
        for record in added:
            self.add(record)
        return len(added)

    def join(self) -> Path:
        """Write all records to one file, remove the others, and return it."""
        files = [file for file in self.folder.glob("*.parquet") if file.name != _ALL]
        with atomic_writer(self.folder / _ALL) as file:
            pq.write_table(_table(self.read()), file, compression="zstd")
        for file in files:
            file.unlink()
        return self.folder / _ALL


def read(file: Path) -> list[Record]:
    """The records of a file.

    Raises:
        RequestError: if it is missing, or holds something else.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{file}: expected records of a study ({error})") from None
    if missing := sorted(set(_SCHEMA.names) - set(table.column_names)):
        raise RequestError(
            f"{file}: expected records of a study, found no column {missing[0]} in it"
        )
    return [_record(row) for row in table.select(_SCHEMA.names).to_pylist()]


def _record(row: dict[str, Any]) -> Record:
    texts: dict[str, Any] = {
        name: None if row[name] is None else json.loads(row[name]) for name in _TEXTS
    }
    curves = {
        metric: {int(epoch): value for epoch, value in curve.items()}
        for metric, curve in texts["curves"].items()
    }
    return Record(**{**row, **texts, "curves": curves, "flags": dict(row["flags"])})


def _table(records: Iterable[Record]) -> pa.Table:
    rows = []
    for record in records:
        row = {**asdict(record), "flags": list(record.flags.items())}
        for name in _TEXTS:
            row[name] = None if row[name] is None else json.dumps(row[name])
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _unique(records: Iterable[Record]) -> list[Record]:
    """Each task of each configuration once: of several records the first that began."""
    found: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda one: one.began):
        found.setdefault(record.key, record)
    return list(found.values())


def iter_flags(record: Record) -> Iterator[tuple[str, list[Any]]]:
    """The columns of the table of flags that `raytrain evaluate` writes."""
    yield "index", record.image
    yield "label", record.label
    yield "predicted", record.predicted
    yield from record.flags.items()
