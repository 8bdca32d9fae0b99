"""The folder of a report: made, checked, and replaced as a whole."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from raytrain.core.errors import RequestError
from raytrain.report.content import ReportContent
from raytrain.report.page import GENERATOR, OURS, REPORT, write_report


def report_folder(path: Path) -> Path:
    """The folder at `path`: made, empty, or that of an earlier report.

    Raises:
        RequestError: naming `--to`, if it is something else or cannot be made.
    """
    folder = path.resolve()
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--to: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_report(folder / REPORT):
        raise RequestError(
            f"--to: {folder} holds something else; expected a new or empty folder, or that of an "
            "earlier comparison"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"--to: {folder} cannot be made ({error.strerror}); expected a folder that can be written"
        ) from None
    return folder


def replace_report(content: ReportContent, folder: Path) -> Path:
    """Write a report in the place of an earlier one, whose other files are kept; return its page."""
    with tempfile.TemporaryDirectory(prefix=".raytrain-", dir=folder.parent) as temporary:
        made = Path(temporary)
        write_report(content, made)
        for name in OURS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            if (made / name).exists():
                (made / name).replace(folder / name)
    return folder / REPORT


def _is_report(file: Path) -> bool:
    return (
        file.is_file() and GENERATOR in file.read_text(encoding="utf-8", errors="replace")[:2000]
    )
