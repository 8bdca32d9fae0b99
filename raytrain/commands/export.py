"""Export a run's network as a folder: written beside its target, checked, then renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytrain.commands.results import Result, ShownResult, word_of
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.storage import local_root
from raytrain.evaluation.record import FOLDER, RECORD
from raytrain.exporting.check import Checked
from raytrain.exporting.formats import FORMATS, chosen, possible
from raytrain.exporting.model_card import card
from raytrain.exporting.subject import Subject, subject_of


@dataclass(frozen=True, repr=False)
class ExportResult(ShownResult):
    """An exported folder, complete and checked."""

    folder: Path
    name: str
    checkpoint: Path
    epoch: int
    checked: dict[str, Checked]  # by format
    skipped: dict[str, str]  # formats that are not possible here, and why
    evaluated: bool  # under the threat model of training
    failed_checks: tuple[str, ...]  # of all evaluations on the card

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, its formats, and whether its numbers can be believed."""
        failed = ", ".join(self.failed_checks)
        evaluated = "with test-set numbers" if self.evaluated else "without test-set numbers"
        return self.name, {
            "formats": ", ".join(self.checked),
            "checkpoint": f"{self.checkpoint}, epoch {self.epoch}",
            "card": f"CHECKS FAILED: {failed}" if failed else evaluated,
            "folder": str(self.folder),
        }

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "folder": str(self.folder),
            "name": self.name,
            "checkpoint": str(self.checkpoint),
            "epoch": self.epoch,
            "formats": {name: vars(how) for name, how in self.checked.items()},
            "skipped": self.skipped,
            "evaluated": self.evaluated,
            "failed_checks": list(self.failed_checks),
        }


def export(
    run_or_checkpoint: Result | str | Path,
    to: str | Path | None = None,
    *,
    which: str | None = None,
    formats: str | Sequence[str] | None = None,
    storage: Path | str = Path("runs"),
    tracking_uri: str | None = None,
    licence: str = "unknown",
) -> ExportResult:
    """The network that is evaluated (averaged weights where there are any), as files for others.

    `run_or_checkpoint` is the result of another command, a word as `run_of` takes it, a checkpoint folder
    or file; `to` is a new or empty folder, `exports/NAME` if not given. `formats` are names of `FORMATS`,
    also in one string with commas, all that are possible if not given. Every format is read
    back and must give the same logits on test images. `licence` is an identifier of the
    Hugging Face hub, for the card.

    Raises:
        RequestError: if the run, its data, the folder or a format that was asked for is not there.
        TrainingFailed: if a file cannot be written or does not give the logits back; nothing is left.
    """
    if isinstance(formats, str):
        formats = [word.strip() for word in formats.split(",") if word.strip()]
    chosen(formats)
    _check_licence(licence)
    if to is not None:
        _must_be_free(Path(to))
    subject = subject_of(word_of(run_or_checkpoint), which, local_root(storage), tracking_uri)
    target = Path("exports") / subject.name if to is None else Path(to)
    _must_be_free(target)
    wanted, skipped = possible(subject, formats)
    with _whole(target.resolve()) as folder:
        checked = {name: FORMATS[name](subject, folder) for name in wanted}
        _leave_words(subject, folder, checked, licence)
    return ExportResult(
        folder=target.resolve(),
        name=subject.name,
        checkpoint=subject.file,
        epoch=subject.saved.epoch,
        checked=checked,
        skipped=skipped,
        evaluated=subject.record.main is not None,
        failed_checks=subject.record.failed,
    )


def _must_be_free(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        raise RequestError(f"--to: {target} is not empty; expected a new or an empty folder")


def _check_licence(licence: str) -> None:
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence) is None:
        raise RequestError(
            f"--license: expected an identifier of the hub such as mit, apache-2.0 or cc-by-4.0, "
            f"found {licence!r}"
        )


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or disappears."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        scratch.replace(target)
    except OSError as error:
        raise TrainingFailed(
            f"--to: {target} could not be written ({error.strerror or error})"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _leave_words(
    subject: Subject, folder: Path, checked: dict[str, Checked], licence: str
) -> None:
    (folder / "README.md").write_text(card(subject, checked, licence), encoding="utf-8")
    (folder / "run.yaml").write_text(_run_file(subject), encoding="utf-8")
    for scope, text in subject.record.texts.items():
        (folder / FOLDER / scope).mkdir(parents=True)
        (folder / FOLDER / scope / RECORD).write_text(text, encoding="utf-8")


def _run_file(subject: Subject) -> str:
    """What decides the training, without where it happened: no store, no folders of a machine."""
    values = subject.run.computed()
    for path in ("name", "root", "test_path"):
        given = values["data"][path]
        if given is not None and Path(given).is_absolute():
            values["data"][path] = None if path == "root" else Path(given).name
    if (weights := values["model"].get("weights")) is not None:
        values["model"]["weights"] = Path(weights).name
    return yaml.safe_dump(values, sort_keys=False)
