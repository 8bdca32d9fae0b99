"""Terminal recordings of `raytrain train` and `raytrain tune`, in the asciicast v2 format.

    python benchmarks/recordings.py

Takes about three minutes on two cores. The files are text: `asciinema play .github/train.cast` plays one.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import json
import os
import pty
import shlex
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINES = 120, 44
_PAUSE = 1.0  # longest time without output in a recording, seconds
_STEP = 0.25  # of time: screens drawn within it are one event, seconds
RECORDINGS = {
    "train": "raytrain train data.train_size=500 batch_size=50 epochs=8 evaluation.every=2",
    "tune": "raytrain tune SPACES/quickstart.yaml data.train_size=500 batch_size=50 --trials 4 --name steps",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / ".github", help="folder of recordings")
    parser.add_argument("--only", choices=list(RECORDINGS), help="one of them")
    words = parser.parse_args()
    for name, command in RECORDINGS.items():
        if words.only in (None, name):
            file = words.to / f"{name}.cast"
            with tempfile.TemporaryDirectory() as folder:
                file.write_text(cast(command, Path(folder)), encoding="utf-8")
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def cast(command: str, folder: Path) -> str:
    """The recording of a command in `folder`, whose path is left out of it."""
    shown = command.replace("SPACES/", "search_spaces/")
    events = [(0.0, f"$ {shown}\r\n")]
    now = last = 0.0
    for moment, text in _joined(_output(command, folder)):
        now += min(moment - last, _PAUSE)
        last = moment
        events.append((round(now, 2), text.replace(f"{folder.resolve()}/", "")))
    header = {"version": 2, "width": COLUMNS, "height": LINES, "title": shown}
    lines = [header, *([at, "o", text] for at, text in events)]
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


def _joined(chunks: Iterator[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Chunks of output, those that follow each other within `_STEP` as one."""
    began, held = 0.0, ""
    for moment, text in chunks:
        if held and moment - began >= _STEP:
            yield began, held
            held = ""
        began, held = (began, held + text) if held else (moment, text)
    if held:
        yield began, held


def _output(command: str, folder: Path) -> Iterator[tuple[float, str]]:
    """What a command writes to a terminal of its own, with the seconds since it was started."""
    words = shlex.split(command.replace("SPACES", str(ROOT / "search_spaces")))
    settings = {
        **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm-256color",
    }
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        os.execve(sys.executable, [sys.executable, "-m", *words], settings)
    began, decoder = time.monotonic(), codecs.getincrementaldecoder("utf-8")()
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not read:
            break
        yield time.monotonic() - began, decoder.decode(read)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"{command}: exit status {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
