"""The output of `raytrain status`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from raytrain.cli.common import line, number, span
from raytrain.cli.trials_table import trials_table
from raytrain.cli.tune import screen
from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.core.storage import shown

if TYPE_CHECKING:
    from raytrain.commands.observed import ObservedStatus
    from raytrain.commands.sweep_status import SweepStatus
    from raytrain.commands.training_status import TrainingStatus

_FIELDS = ("storage", "experiment", "tracking_uri")


def places(name: str, words: list[str], storage: str | None) -> tuple[str, dict[str, Any]]:
    """The name and the fields of a run that say where it is; a field may stand in place of the name.

    Raises:
        RequestError: naming a field that says nothing about that, or one that is given twice.
    """
    fields: dict[str, Any] = {} if storage is None else {"storage": storage}
    if name.partition("=")[0] in _FIELDS:
        name, words = "last", [name, *words]
    for word in words:
        field, is_given, value = word.partition("=")
        if field not in _FIELDS or not is_given:
            raise RequestError(
                f"{field}: expected {', '.join(f'{one}=' for one in _FIELDS)}{nearest(field, _FIELDS)}"
            )
        if fields.setdefault(field, value) != value:
            raise RequestError(f"{field}: found {fields[field]} and {value}; expected one of them")
    return name, fields


def status_report(found: SweepStatus | TrainingStatus) -> Callable[[], None]:
    """`raytrain status`, for a reader."""

    def show() -> None:
        console = Console()
        line(console, found.kind, f"{found.name} in {shown(found.folder)}")
        line(console, "state", _state(found))
        if found.kind == "sweep":
            _say_sweep(console, found)  # pyright: ignore[reportArgumentType]
        else:
            _say_training(console, found)  # pyright: ignore[reportArgumentType]
        if found.waiting:
            line(console, "MLflow", f"{found.waiting:,} records wait in {found.outbox}")
        elif found.waiting == 0:
            line(console, "MLflow", f"no record waits; {found.tracking_uri}")
        for label, command in found.next.items():
            line(console, "MLflow UI" if label == "ui" else label.replace("_", " "), command)

    return show


def _state(found: ObservedStatus) -> str:
    where = "" if found.host is None else f" on {found.host}"
    if found.state == "running" and not found.here:
        where += ", judged by its last change"
    ages = {"last row": found.row, "last change": found.changed}
    said = [f"{label} {span(age)} ago" for label, age in ages.items() if age is not None]
    return "; ".join([f"{found.state}{where}", *(said or ["no row yet"])])


def _say_sweep(console: Console, found: SweepStatus) -> None:
    console.print(screen(found.progress))
    if found.trials:
        console.print(trials_table(found, console.width))


def _say_training(console: Console, found: TrainingStatus) -> None:
    done = (
        f"epoch {found.epoch}" if found.epochs is None else f"{found.epoch}/{found.epochs} epochs"
    )
    cost = "" if found.fe_per_image is None else f" of {found.fe_per_image:g} FE/image"
    line(console, "progress", f"{done}, {found.share:.0%}{cost or ' of training'}")
    if found.checkpoint is not None:
        line(console, "checkpoint", f"{span(found.checkpoint)} ago")
    table = Table(title="last row", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found.metrics.items():
        if not name.startswith("fosc_histogram/"):  # for figures
            table.add_row(name, number(value))
    if found.metrics:
        console.print(table)
