"""Kill everything, lose nothing: a sweep whose driver, workers, node and MLflow server die at random moments.

    python benchmarks/faults.py --faults 20 --seed 0 --out benchmarks/faults.md

A real MLflow server, two Ray nodes that want a token, and `raytrain tune`, all on this machine. A fault
comes after so many rows of the sweep, and a moment later, as the seed says; every kind equally often:
SIGKILL of the driver, which is launched again with `--resume`; of the process of a running trial; of the
raylet of a node, which is replaced; and of the MLflow server, or SIGSTOP, which comes back after some
seconds. When the sweep has ended, what is in the study, in the table and in MLflow is counted from the
outside. Exit status 1 if anything was lost, repeated, doubled or left open.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from agenda import Agenda
from faults_audit import Ended, audit, ended
from faults_stage import Stage, result_of, stage

KINDS = ("driver", "worker", "node", "mlflow")
NAME = "faults"
FOLDER = Path("runs") / "raytrain" / NAME
STUDY = FOLDER / "study.log"
_ROWS = 10  # between two faults at most
_EACH = 4  # rows that a trial has at least, if it does not diverge
_AWAY = 8.0  # seconds that the server is away, at most

SPACE: dict[str, Any] = {
    "base": {
        "data": {"name": "digits", "train_size": 512},
        "algorithm": {"name": "pgd", "steps": 4},
        "epochs": 12,
        "batch_size": 32,
        "evaluation": {"steps": 2},
        "device": "cpu",
        "max_failures": 20,
    },
    "space": {
        "optimizer.lr": {"choice": [0.02, 0.05, 0.1, 1e9]},  # the last one diverges
        "algorithm.step_size": {"float": ["1/8", "1/2"], "log": True, "unit": "eps"},
    },
    "search": {"sampler": "tpe", "startup": 8, "pruner": "asha", "first_rung": 4, "reduction": 2},
}


@dataclass
class Story:
    """What happened to a sweep."""

    trials: int
    faults: list[str] = field(default_factory=list)  # their kinds, in order
    seen: dict[int, Ended] = field(default_factory=dict)  # trials that had ended before a fault
    refused: int = 0  # launches that found no MLflow, and said so
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)  # what the command said in the end


class Chaos:
    """Injects faults into a sweep until there are none left, and lets it end."""

    def __init__(
        self, stage: Stage, trials: int, kinds: list[str], draw: random.Random, patience: float
    ) -> None:
        self._stage, self._draw, self._patience = stage, draw, patience
        self._kinds = list(kinds)
        self._agenda = Agenda()
        self._away = False  # the server
        self._most = 0  # rows so far
        self._rows_file = stage.folder / FOLDER / "rows.jsonl"
        self.story = Story(trials)

    def run(self) -> Story:
        """The whole sweep.

        Raises:
            AssertionError: if it hangs, fails, or ends before all faults.
        """
        began = self._moved = time.monotonic()
        self._launch()
        self._plan()
        while not self._over():
            self._agenda.do_due()
            if self._kinds and self._ripe() and self._strike(self._kinds[0]):
                self.story.faults.append(self._kinds.pop(0))
                self._plan()
            time.sleep(0.05)
        self._agenda.do_all()
        self.story.seconds = time.monotonic() - began
        self.story.result = result_of(self._stage.said())
        assert not self._kinds, f"the sweep ended before {self._kinds}: give it more trials"
        return self.story

    # ---------------------------------------------------------------- when

    def _plan(self) -> None:
        """The next fault: after so many more rows, one in four whether or not the sweep moves."""
        starts = self.story.faults[-1:] == ["driver"] and self._kinds[:1] == ["mlflow"]
        hasty = starts or self._draw.random() < 0.25
        left = (self.story.trials - len(self.story.seen)) * _EACH // max(1, len(self._kinds))
        more = self._draw.randint(1, max(1, min(_ROWS, left)))
        self._at_rows = 0 if hasty else self._rows() + more
        self._then = self._draw.uniform(0.0, 6.0 if hasty else 1.0)
        self._from: float | None = None

    def _ripe(self) -> bool:
        if self._from is None and self._rows() >= self._at_rows:
            self._from = time.monotonic()
        return self._from is not None and time.monotonic() >= self._from + self._then

    def _rows(self) -> int:
        rows = 0
        if self._rows_file.is_file():
            rows = self._rows_file.read_bytes().count(b"\n")
        if rows > self._most:
            self._most, self._moved = rows, time.monotonic()
        return rows

    def _over(self) -> bool:
        """Whether the sweep has ended; a launch that found no MLflow is tried again."""
        self._rows()
        still = time.monotonic() - self._moved
        assert still < self._patience, f"no row for {still:.0f} s:\n{self._stage.said()}"
        assert self._stage.driver is not None
        status = self._stage.driver.poll()
        if status is None or status == 0:
            return status == 0
        said = self._stage.said()
        assert status == 2 and "tracking_uri: MLflow" in said, f"status {status}:\n{said}"
        self.story.refused += 1
        self._moved = time.monotonic()
        time.sleep(1.0)
        self._launch()
        return False

    # ---------------------------------------------------------------- what

    def _strike(self, kind: str) -> bool:
        """Inject a fault; False if there is nothing to hit now."""
        seen = ended(self._stage.folder / STUDY, NAME)
        hit = getattr(self, f"_{kind}")()
        if hit:
            self.story.seen.update(seen)
            where = f"{len(self.story.faults) + 1}: {hit}, after {self._rows()} rows"
            print(f"fault {where} and {len(seen)} trials", file=sys.stderr, flush=True)
        return bool(hit)

    def _driver(self) -> str:
        self._stage.kill_driver()
        self._launch()
        return "driver killed"

    def _worker(self) -> str:
        slots = self._stage.slots()
        if not slots:
            return ""
        os.kill(self._draw.choice(slots), signal.SIGKILL)
        return "worker killed"

    def _node(self) -> str:
        if not self._stage.node_killed():
            return ""
        self._agenda.later(self._draw.uniform(0.0, 3.0), self._stage.start_node)
        return "node killed"

    def _mlflow(self) -> str:
        if self._away or not self._stage.answers():
            return ""
        kill = self.story.faults.count("mlflow") % 2 == 0
        self._stage.signal_server(signal.SIGKILL if kill else signal.SIGSTOP)
        self._away = True

        def back() -> None:
            self._away = False
            if kill:
                self._stage.start_server()
            else:
                self._stage.signal_server(signal.SIGCONT)

        self._agenda.later(self._draw.uniform(1.0, _AWAY), back)
        return "mlflow killed" if kill else "mlflow stopped"

    def _launch(self) -> None:
        fresh = not (self._stage.folder / STUDY).is_file()
        space = str(self._stage.folder / "space.yaml")
        words = (space, "--name", NAME) if fresh else ("--resume", NAME)
        self._stage.launch("tune", *words, "--json")


def order(faults: int, draw: random.Random) -> list[str]:
    """Every kind as often as any other; every other driver starts anew while the server dies."""
    kinds = Counter(KINDS[number % len(KINDS)] for number in range(faults))
    pairs = kinds["mlflow"] // 2
    singles = [[kind] for kind in KINDS for _ in range(kinds[kind])]
    for _ in range(pairs):
        singles.remove(["driver"])
        singles.remove(["mlflow"])
    units = [*singles, *(["driver", "mlflow"] for _ in range(pairs))]
    draw.shuffle(units)
    return [kind for unit in units for kind in unit]


def sweep(
    faults: int, trials: int, seed: int, patience: float = 180.0, keep: bool = False
) -> tuple[Story, dict[str, int], dict[str, int]]:
    """A sweep under so many faults: its story, its trials by outcome, and what was violated how often."""
    draw = random.Random(seed)
    kinds = order(faults, draw)
    with stage(keep) as scene:
        space = {**SPACE, "budget": {"trials": trials}}
        (scene.folder / "space.yaml").write_text(yaml.safe_dump(space))
        try:
            story = Chaos(scene, trials, kinds, draw, patience).run()
            folder, study = scene.folder / FOLDER, scene.folder / STUDY
            outcomes, found = audit(folder, study, NAME, scene.mlflow_uri, trials, story.seen)
        finally:
            if keep:
                print(f"kept in {scene.folder}", file=sys.stderr)
        story.result["launches"] = scene.launches
    return story, outcomes, found


def table(story: Story, outcomes: dict[str, int], found: dict[str, int]) -> str:
    """All of it, as Markdown."""
    from importlib.metadata import version

    from raytrain.tracking.provenance import hardware

    kinds, progress = Counter(story.faults), story.result["progress"]
    happened = {
        **{f"faults: {kind}": kinds[kind] for kind in KINDS},
        "launches of the driver": story.result["launches"],
        "launches refused, MLflow being away": story.refused,
        "attempts at a trial that were lost and made again": progress["retries"],
        **{f"trials: {outcome}": count for outcome, count in sorted(outcomes.items())},
        "seconds": round(story.seconds),
    }
    lines = ["| what happened | |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in happened.items()]
    lines += ["", "| violation | |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in found.items()]
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("ray", "optuna", "mlflow", "torch")
    )
    python = ".".join(map(str, sys.version_info[:3]))
    lines += ["", f"{hardware()}; {versions}, Python {python}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The sweep, and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--trials", type=int, default=36, help="the budget of the sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4 faults, 8 trials")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds without a row")
    parser.add_argument("--keep", action="store_true", help="leave the folders, to look into")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args()
    faults, trials = (4, 8) if chosen.quick else (chosen.faults, chosen.trials)
    story, outcomes, found = sweep(faults, trials, chosen.seed, chosen.patience, chosen.keep)
    command = f"`python benchmarks/faults.py --faults {faults} --seed {chosen.seed}`"
    text = f"Made by {command}:\n\n{table(story, outcomes, found)}"
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text)
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
