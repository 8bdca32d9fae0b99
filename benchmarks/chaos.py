"""Nodes that are killed and a storage that fails, while trainings and sweeps run on a cluster.

    python benchmarks/chaos.py --seed 0 --out benchmarks/chaos.md

A Ray cluster that wants a token, of a head and three nodes with disks of their own, an S3 server behind a
proxy, and MLflow's server, all on this machine and all the time up. In each round one command runs:
a training on two workers, one that may go on with one worker, or a sweep. While it runs, at moments that
the seed chooses, a node is lost, with all its processes (SIGKILL) and its disk: at any time of training, in
the middle of the upload of a checkpoint, or of the row of an epoch; a new node joins afterwards. Or the
storage refuses connections, resets them, or answers 503 for some seconds; or the driver is killed and
`--resume` continues on the same disk or on another. Everything is compared with rounds without a fault.
Exit status 1 if anything was lost, doubled, left open or trained otherwise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from agenda import Agenda
from chaos_audit import Checkpoint, listed, longest_pause, repeated, training_runs
from chaos_network import images, passes
from chaos_proxy import Failure, Trap
from chaos_stage import Cluster, cluster
from faults_audit import Ended, audit, ended, runs_of
from mlflow import MlflowClient

Kind = Literal["training", "checkpoint", "report", "storage", "driver"]
Subject = Literal["train", "elastic", "sweep"]

KINDS: dict[Kind, str] = {
    "training": "a node killed in training",
    "checkpoint": "a node killed in the upload of a checkpoint",
    "report": "a node killed in the upload of a row",
    "storage": "the storage failed",
    "driver": "the driver killed",
}
SUBJECTS: dict[Subject, str] = {
    "train": "training, 2 workers",
    "elastic": "training, 1 to 2 workers",
    "sweep": "sweep, 6 trials",
}
UPLOADS = {
    "checkpoint": (r"/\.last\.pt\.\d", r"/\.last\.pt\.sha256\.", r"/last\.pt(\?|$)"),
    "report": (r"/\.rows\.json\.\d", r"/\.rows\.json\.sha256\."),
}
"""The content, its checksum, the renaming."""

EPOCHS, IMAGES, BATCH, EVERY = 6, 1024, 32, 10
"""Of a training; the last: steps between two checkpoints."""
RATES = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15]  # of the trials
NAME, ROWS = "sweep", "rows.jsonl"
_AWAY = (3.0, 20.0)  # seconds that the storage is away
_LATE = 25.0  # seconds until a node joins where training goes on without it
_ROUNDING = 1e-9  # of weights in double precision, after steps on another number of workers

BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_size": IMAGES, "validation": 0.1},
    "model": "chaos_network:Recording",
    "algorithm": {"name": "pgd", "steps": 1},
    "optimizer": {"lr": 0.1},
    "precision": "fp64",
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "evaluation": {"steps": 1},
    "checkpoint_minutes": 0.005,  # whenever the loss is read, every ten steps
    "device": "cpu",
    "max_failures": 20,
}


@dataclass
class Outcome:
    """What happened in a round, and what was found after it."""

    subject: Subject
    struck: list[tuple[Kind, str, float]] = field(default_factory=list)  # with the moment
    pauses: list[tuple[Kind, float]] = field(default_factory=list)  # seconds, of trainings
    costs: list[tuple[Kind, float]] = field(default_factory=list)  # steps repeated
    steps: float = 0.0
    repeated: float = 0.0
    distance: float = 0.0  # of the weights from those of the round without a fault
    found: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    seconds: float = 0.0
    checkpoints: dict[float, Checkpoint] = field(default_factory=dict)
    images: int = 0


class Round:
    """One command from beginning to end, and what befalls it."""

    def __init__(
        self,
        scene: Cluster,
        number: int,
        subject: Subject,
        kinds: list[Kind],
        draw: random.Random,
        expected: Outcome | None,
    ) -> None:
        self._scene, self._subject, self._draw, self._expected = scene, subject, draw, expected
        self._experiment = f"round{number:02d}"
        self._kinds, self._planned = list(kinds), len(kinds)
        self._agenda = Agenda()
        self._trap: Trap | None = None
        self._seen: dict[int, Ended] = {}
        self._cache = scene.folder / f"driver-{number}"
        self._study = scene.folder / f"study-{number}.log"
        self._records = (0, time.monotonic())
        self.outcome = Outcome(subject)

    def run(self) -> Outcome:
        """The round; a command that fails or hangs is a violation."""
        began = time.monotonic()
        self._prepare()
        self._launch()
        self._plan()
        problem = ""
        while not problem and not self._over():
            self._agenda.do_due()
            if self._kinds and self._share() >= self._at and self._strike(self._kinds[0]):
                self._kinds.pop(0)
                self._plan()
            time.sleep(0.05)
            problem = self._problem()
        self._agenda.do_all()
        self._scene.proxy.heal()
        self.outcome.seconds = time.monotonic() - began
        if problem:
            print(f"{self._experiment}: {problem}", file=sys.stderr, flush=True)
            self._scene.kill_driver()
            self.outcome.found["commands that failed or hung"] += 1
        else:
            self._look()
        return self.outcome

    # ---------------------------------------------------------------- the command

    def _prepare(self) -> None:
        wanted = 2 if self._subject == "elastic" else 3
        while len(self._scene.nodes) < wanted:
            self._scene.add_node()
        while len(self._scene.nodes) > wanted:
            self._scene.lose_node(min(self._scene.nodes))
        self._scene.clear_steps()

    def _launch(self) -> None:
        where = [f"storage={self._scene.storage}", f"experiment={self._experiment}", "--json"]
        resume = self.outcome.launches > 0
        if self._subject == "sweep":
            where.append(f"study={self._study}")
            begin = [str(self._file("space.yaml", self._space())), "--name", NAME]
            words = ["tune", *(["--resume", NAME] if resume else begin), *where]
        else:
            least = {"min_workers": 1} if self._subject == "elastic" else {}
            begin = [str(self._file("run.yaml", {**BASE, **least, "workers": 2}))]
            again = ["--resume", self._run_id()] if resume else begin
            words = ["train", *again, *where]
        self.outcome.launches += 1
        self._scene.launch(*words, RAYTRAIN_CACHE=str(self._cache))

    def _space(self) -> dict[str, Any]:
        return {
            "base": BASE,
            "space": {"optimizer.lr": {"choice": RATES}},
            "search": {"sampler": "grid", "pruner": "none"},
            "budget": {"trials": len(RATES)},
        }

    def _file(self, name: str, content: dict[str, Any]) -> Path:
        file = self._scene.folder / f"{self._experiment}-{name}"
        file.write_text(yaml.safe_dump(content))
        return file

    def _run_id(self) -> str:
        return runs_of(MlflowClient(self._scene.mlflow_uri), self._experiment)[0].info.run_id

    def _over(self) -> bool:
        assert self._scene.driver is not None
        return self._scene.driver.poll() == 0

    def _problem(self) -> str:
        """What keeps the command from its end, if anything."""
        records = sum(file.stat().st_size for file in self._scene.steps.iterdir())
        if records != self._records[0]:
            self._records = (records, time.monotonic())
        assert self._scene.driver is not None
        status = self._scene.driver.poll()
        if status:
            return f"status {status}:\n{self._scene.said()[-3000:]}"
        still = time.monotonic() - self._records[1]
        return f"no step for {still:.0f} s:\n{self._scene.said()[-3000:]}" if still > 200 else ""

    # ---------------------------------------------------------------- when

    def _plan(self) -> None:
        """Where in the round the next fault comes, by the passes that there were."""
        done = self._planned - len(self._kinds)
        low, high = done / max(1, self._planned), (done + 0.6) / max(1, self._planned)
        self._at = self._draw.uniform(low + 0.05, max(high, low + 0.1))

    def _share(self) -> float:
        if self._expected is None:
            return 0.0
        return images(self._scene.steps) / self._expected.images

    # ---------------------------------------------------------------- what

    def _strike(self, kind: Kind) -> bool:
        """Let a fault happen; False if it has to wait."""
        if self._scene.proxy.failure is not None:
            return False
        if self._subject == "sweep":
            self._seen.update(ended(self._study, self._study_name))
        said = getattr(self, f"_{kind}")()
        if said:
            self.outcome.struck.append((kind, said, time.time()))
            share = f"at {100 * self._share():.0f} %"
            print(f"{self._experiment}: {said}, {share}", file=sys.stderr, flush=True)
        return bool(said)

    def _training(self) -> str:
        nodes = self._scene.at_work(1.0)
        if not nodes:
            return ""
        self._lose(self._draw.choice(nodes))
        return "node killed in training"

    def _checkpoint(self) -> str:
        return self._in_upload("checkpoint")

    def _report(self) -> str:
        return self._in_upload("report")

    def _in_upload(self, kind: str) -> str:
        if self._trap is None:
            self._upload = self._draw.choice(UPLOADS[kind])
            self._trap = self._scene.proxy.trap = Trap(self._upload)
        if self._trap.port is None:
            return ""
        node = self._scene.sender(self._trap.port)
        if node is not None:
            self._lose(node)
        self._trap.over.set()
        self._trap = self._scene.proxy.trap = None
        return "" if node is None else f"node killed in the upload of {self._upload}"

    def _lose(self, node: int) -> None:
        self._scene.lose_node(node)
        wait = _LATE if self._subject == "elastic" else self._draw.uniform(0.0, 3.0)
        self._agenda.later(wait, self._scene.add_node)

    def _storage(self) -> str:
        if not self._scene.at_work(1.0):
            return ""
        failures: list[Failure] = ["refused", "reset", "503"]
        failure, seconds = self._draw.choice(failures), self._draw.uniform(*_AWAY)
        self._scene.proxy.fail(failure)
        self._agenda.later(seconds, self._scene.proxy.heal)
        return f"storage {failure} for {seconds:.0f} s"

    def _driver(self) -> str:
        if not self._scene.at_work(1.0):
            return ""
        self._scene.kill_driver()
        elsewhere = self._draw.random() < 0.5
        if elsewhere:
            self._cache = self._cache.with_name(f"{self._cache.name}-")
        self._launch()
        return f"driver killed, resumed {'elsewhere' if elsewhere else 'here'}"

    # ---------------------------------------------------------------- afterwards

    @property
    def _study_name(self) -> str:
        return f"{self._experiment}/{NAME}"

    def _look(self) -> None:
        scene, outcome = self._scene, self.outcome
        if self._kinds:
            outcome.found["faults that found nothing to hit"] += len(self._kinds)
        outcome.images = images(scene.steps)
        outcome.steps = outcome.images / BATCH
        if self._subject == "sweep":
            copies = self._cache.glob(f"*/{self._experiment}/{NAME}/{ROWS}")
            folder = next(f.parent for f in copies if f.parents[2].suffix != ".synced")
            trials = [f"{NAME}/trials/t{number:04d}" for number in range(len(RATES))]
            _, found = audit(
                folder, self._study, self._study_name, scene.mlflow_uri, len(RATES), self._seen
            )
        else:
            trials = [self._run_id()]
            found = listed(training_runs(scene.mlflow_uri, self._experiment, EPOCHS))
        outcome.found.update(found)
        for trial in trials:
            saved = Checkpoint.of(scene, f"{self._experiment}/{trial}/last.pt")
            outcome.checkpoints[saved.rate] = saved
            outcome.found["checkpoints that do not match their checksum"] += not saved.sound
        if self._expected is not None:
            self._compare(self._expected)

    def _compare(self, expected: Outcome) -> None:
        outcome = self.outcome
        for rate, saved in expected.checkpoints.items():
            if rate in outcome.checkpoints:
                distance = saved.distance(outcome.checkpoints[rate])
                outcome.distance = max(outcome.distance, distance)
        allowed = _ROUNDING if self._subject == "elastic" else 0.0
        outcome.found["weights of another value"] += outcome.distance > allowed
        outcome.repeated = (outcome.images - expected.images) / BATCH
        outcome.found["more steps repeated than between two checkpoints"] += (
            outcome.repeated > self._most_repeated()
        )
        if self._subject != "sweep":
            self._attribute()

    def _most_repeated(self) -> float:
        """Steps between two checkpoints, of every trial that a fault could hit, and the one it was in."""
        trials = 3 if self._subject == "sweep" else 1
        hit = Counter(kind for kind, _, _ in self.outcome.struck)
        nodes = hit.total() - hit["storage"] - hit["driver"]
        resized = 2 * nodes if self._subject == "elastic" else nodes
        return (EVERY + 1) * (resized + trials * hit["driver"])

    def _attribute(self) -> None:
        """Pauses and repeated steps to the faults before them."""
        struck, outcome = self.outcome.struck, self.outcome
        processes = passes(self._scene.steps)
        times = sorted(one[0] for process in processes for one in process)
        until = [at for _, _, at in struck[1:]] + [times[-1] + 1]
        for (kind, _, at), end in zip(struck, until, strict=True):
            outcome.pauses.append((kind, longest_pause(times, at, end)))
        if self._subject == "elastic":
            return  # with another number of workers a step has other images on rank 0
        for began, steps in repeated(processes):
            before = [fault for fault in struck if fault[2] < began]
            deaths = [fault for fault in before if fault[0] != "storage"]
            outcome.costs.append(((deaths or before)[-1][0], steps))
            outcome.found["more steps repeated than between two checkpoints"] += steps > EVERY + 1


def plan(
    trainings: int, elastic: int, sweeps: int, draw: random.Random
) -> list[tuple[Subject, list[Kind]]]:
    """The rounds: two faults to a training, one to an elastic one, six to a sweep; every kind as often."""
    nodes: list[Kind] = ["training", "checkpoint", "report"]
    rounds: list[tuple[Subject, list[Kind]]] = [
        ("elastic", [nodes[number % 3]]) for number in range(elastic)
    ]
    total = 2 * trainings + elastic + 6 * sweeps
    every: list[Kind] = list(KINDS)
    kinds: list[Kind] = [every[number % len(every)] for number in range(total)]
    for _, [kind] in rounds:
        kinds.remove(kind)
    draw.shuffle(kinds)
    for _ in range(trainings):
        rounds.append(("train", [kinds.pop(), kinds.pop()]))
    for _ in range(sweeps):
        rounds.append(("sweep", [kinds.pop() for _ in range(6)]))
    draw.shuffle(rounds)
    return rounds


def table(outcomes: list[Outcome]) -> str:
    """All of it, as Markdown."""
    from importlib.metadata import version

    from raytrain.core.git import git
    from raytrain.tracking.provenance import hardware

    struck = Counter(kind for one in outcomes for kind, _, _ in one.struck)
    lines = [
        "| fault | times | in trainings of 2 workers: longest pause, s | steps repeated |",
        "|---|---|---|---|",
    ]
    for kind, name in KINDS.items():
        same = [one for one in outcomes if one.subject == "train"]
        pauses = [seconds for one in same for what, seconds in one.pauses if what == kind]
        costs = [steps for one in outcomes for what, steps in one.costs if what == kind]
        cells = (name, str(struck[kind]), _spread(pauses), _spread(costs))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| command | rounds | faults | launches | steps | repeated | longest pause, s | weights differ by "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for subject, name in SUBJECTS.items():
        those = [one for one in outcomes if one.subject == subject]
        cells = (
            name,
            str(len(those)),
            str(sum(len(one.struck) for one in those)),
            str(sum(one.launches for one in those)),
            f"{sum(one.steps for one in those):.0f}",
            f"{sum(one.repeated for one in those):.0f}",
            _most([seconds for one in those for _, seconds in one.pauses]),
            f"{max((one.distance for one in those), default=0.0):.2g}",
            f"{sum(one.seconds for one in those):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    found = sum((one.found for one in outcomes), Counter())
    names = {name: None for one in outcomes for name in one.found}
    lines += ["", "| violation | |", "|---|---|"]
    lines += [f"| {name} | {found[name]} |" for name in names]
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("ray", "optuna", "mlflow", "torch", "pyarrow", "moto")
    )
    python = ".".join(map(str, sys.version_info[:3]))
    commit = git(Path(__file__).parent, "rev-parse", "--short", "HEAD")
    lines += ["", f"{hardware()}; {versions}, Python {python}; commit {commit}."]
    return "\n".join(lines) + "\n"


def _most(values: list[float]) -> str:
    return f"{max(values):.0f}" if values else ""


def _spread(values: list[float]) -> str:
    """Median and maximum."""
    return f"{statistics.median(values):.1f}, at most {max(values):.1f}" if values else ""


def rounds(
    planned: list[tuple[Subject, list[Kind]]], draw: random.Random, keep: bool
) -> Iterator[Outcome]:
    """One round after another on one cluster, each kind of command first without a fault."""
    with cluster(keep) as scene:
        print(f"in {scene.folder}", file=sys.stderr, flush=True)
        expected: dict[Subject, Outcome] = {}
        whole: tuple[Subject, ...] = ("train", "sweep")
        for subject in whole:
            if not any((s == "sweep") == (subject == "sweep") for s, _ in planned):
                continue
            expected[subject] = Round(scene, len(expected), subject, [], draw, None).run()
            assert not +expected[subject].found, expected[subject].found
        for number, (subject, kinds) in enumerate(planned, start=len(expected)):
            same = expected["sweep" if subject == "sweep" else "train"]
            one = Round(scene, number, subject, kinds, draw, same).run()
            said = f"{one.seconds:.0f} s, {one.repeated:.0f} of {one.steps:.0f} steps repeated"
            told = (
                f"round{number:02d}: {subject}, {said}, weights {one.distance:.2g}, {+one.found}"
            )
            print(told, file=sys.stderr, flush=True)
            yield one


def main() -> None:
    """The rounds, and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trainings", type=int, default=8, help="of two workers, two faults each")
    parser.add_argument("--elastic", type=int, default=2, help="of one or two, one fault each")
    parser.add_argument("--sweeps", type=int, default=2, help="six faults each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders, to look into")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    planned = plan(chosen.trainings, chosen.elastic, chosen.sweeps, draw)
    outcomes: list[Outcome] = []
    counts = f"--trainings {chosen.trainings} --elastic {chosen.elastic} --sweeps {chosen.sweeps}"
    command = f"`python benchmarks/chaos.py {counts} --seed {chosen.seed}`"
    for one in rounds(planned, draw, chosen.keep):
        outcomes.append(one)
        if chosen.out is not None:
            chosen.out.write_text(f"Made by {command}:\n\n{table(outcomes)}")
    print(table(outcomes))
    sys.exit(1 if any(+one.found for one in outcomes) else 0)


if __name__ == "__main__":
    main()
