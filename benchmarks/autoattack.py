"""AutoAttack's standard version, whole: raytrain's evaluation against the reference run by itself.

The same network, images, seed and batch size; the reference is pyautoattack's `run_standard_evaluation`,
whose attacks are the authors' own code. Both run on this machine one after the other, several times in
turn, each time in a process of its own; a row is the median. The flags of every image are compared.

The reference runs as its users run it, and once more with the one setting of the process that raytrain
makes, memory that is kept when it is freed, which makes it faster too.

    python benchmarks/autoattack.py --images 360 --out benchmarks/autoattack-digits.md
    python benchmarks/autoattack.py --data cifar10/train.parquet --images 200 model=small_cnn
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import nn

from raytrain.attacks.autoattack import STAGES
from raytrain.commands.train import train
from raytrain.core.distributed_context import DistributedContext, keep_freed_memory
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.data.loader import SplitShard, open_test
from raytrain.evaluation.evaluator import Evaluator
from raytrain.evaluation.result_log import ResultLog
from raytrain.evaluation.runner import run
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.evaluation.table import flags_table
from raytrain.tracking.provenance import hardware
from raytrain.training.checkpoint import Saved, load
from raytrain.training.setup import network

NORMS: dict[str, Any] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


WAYS = ("reference", "reference, memory kept", "raytrain")


@dataclass(frozen=True)
class Measured:
    """One evaluation: the final flags, the share left after each attack, seconds of each."""

    flags: np.ndarray
    left: dict[str, float]
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def ours(
    model: nn.Module, part: SplitShard, ball: AbstractThreatModel, settings: EvaluationSettings
) -> Measured:
    """raytrain: cleanly correct images, then stage by stage, journalled as always."""
    evaluator = Evaluator(model, part, ball, settings)
    labels = part.labels[: settings.images].cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        log = ResultLog(Path(folder) / "verdicts.jsonl", {})
        seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

        def work(units: list) -> object:
            for unit in units:
                result = evaluator.run(unit)
                stage = unit.stage.removeprefix("aa.")
                seconds[stage] = seconds.get(stage, 0.0) + result.seconds
                yield result

        results = run(settings, labels, work, log)  # pyright: ignore[reportArgumentType]
    table = flags_table(settings, results)
    seconds.pop("clean", None)
    left, stages = {}, []
    for stage in STAGES:
        stages.append(f"aa.{stage}")
        left[stage] = float(results.survived(stages).mean())
    return Measured(np.asarray(table["aa"]), left, seconds)


def reference(
    model: nn.Module, part: SplitShard, ball: AbstractThreatModel, settings: EvaluationSettings
) -> Measured:
    """The reference, whole; what it logs after each attack tells the time and the share left."""
    images = part.whole[: settings.images].float() / 255
    labels = part.labels[: settings.images]
    attack = AutoAttack(
        model,
        eps=ball.eps,
        norm=NORMS[ball.norm],
        seed=settings.seed,
        device=images.device,
        version="standard",
    )
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    attack.logger.addHandler(listener)
    attack.logger.setLevel(logging.DEBUG)
    attack.logger.propagate = False
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=settings.batch_size)
    attack.logger.removeHandler(listener)
    with torch.no_grad():
        flags = torch.cat(
            [
                model(x).argmax(1) == y
                for x, y in zip(
                    found.split(settings.batch_size),
                    labels.split(settings.batch_size),
                    strict=True,
                )
            ]
        )
    left, seconds, before = {}, {}, 0.0
    for line in told:
        match = re.match(
            r"robust accuracy after (\S+): ([0-9.]+)% \(total time ([0-9.]+) s\)", line
        )
        if match:
            stage, now = match[1].lower(), float(match[3])
            left[stage], seconds[stage], before = float(match[2]) / 100, now - before, now
    return Measured(flags.cpu().numpy(), left, seconds)


def trained(data: str, folder: Path, words: list[str]) -> Path:
    """A network to attack, trained here with PGD."""
    result = train(
        None,
        [
            f"data={data}",
            f"storage={folder}",
            f"tracking_uri=sqlite:///{folder}/mlflow.db",
            *words,
        ],
    )
    return result.checkpoints / "best.pt"


def setting(
    options: argparse.Namespace,
) -> tuple[nn.Module, SplitShard, AbstractThreatModel, EvaluationSettings, Saved]:
    """What is attacked, by whom ever."""
    saved: Saved = load(options.checkpoint)
    device = torch.device(
        "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    )
    part, _ = open_test(saved.run.data, DistributedContext(device))
    settings = EvaluationSettings.model_validate(
        {
            "attacks": "aa",
            "images": min(options.images, part.num_images),
            "batch_size": options.batch_size,
            "checks": False,
        }
    )
    return network(saved).float().to(device), part, saved.run.threat, settings, saved


def one(options: argparse.Namespace) -> None:
    """One evaluation, in this process; its result is left as JSON."""
    torch.set_num_threads(options.threads)
    if options.way != WAYS[0]:
        keep_freed_memory()
    model, part, ball, settings, _ = setting(options)
    measured = (ours if options.way == WAYS[2] else reference)(model, part, ball, settings)
    told = {"flags": measured.flags.tolist(), "left": measured.left, "seconds": measured.seconds}
    options.out.write_text(json.dumps(told))


def apart(way: str, options: argparse.Namespace, folder: Path) -> Measured:
    """One evaluation in a process of its own."""
    out = folder / "measured.json"
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in SHARED]
    command = [sys.executable, __file__, f"--way={way}", f"--out={out}", *words]
    subprocess.run(command, check=True)
    told = json.loads(out.read_text())
    return Measured(np.array(told["flags"]), told["left"], told["seconds"])


SHARED = ("checkpoint", "images", "batch_size", "threads", "device")


def table(rows: list[list[Measured]], note: str) -> str:
    """Markdown: medians over the repeats."""
    first, _, last = rows[0]
    lines = ["| attack | left, reference | left, raytrain | reference, s | its memory kept, s |"]
    lines[0] += " raytrain, s | ratio | ratio, memory kept |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for stage in [*STAGES, "all"]:
        plain, kept, mine = (
            statistics.median(m.total if stage == "all" else m.seconds.get(stage, 0.0) for m in ms)
            for ms in zip(*rows, strict=True)
        )
        left = [
            f"{m.left.get(STAGES[-1] if stage == 'all' else stage, np.nan):.2%}"
            for m in (first, last)
        ]
        lines.append(
            f"| {stage} | {left[0]} | {left[1]} | {plain:.1f} | {kept:.1f} | {mine:.1f} | "
            f"{plain / mine:.2f} | {kept / mine:.2f} |"
        )
    differ = max(int((a.flags != c.flags).sum()) for a, _, c in rows)
    lines += ["", f"Images whose final flag differs: {differ} of {len(first.flags)}. {note}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help="data set, if there is no checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--way", choices=WAYS, default=None, help="only that, as JSON")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("words", nargs="*", help="fields of the training, such as epochs=15")
    options = parser.parse_args()
    if options.way is not None:
        one(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.checkpoint is None:
            options.checkpoint = trained(options.data, folder, options.words)
        rows = []
        for repeat in range(options.repeats):
            rows.append([apart(way, options, folder) for way in WAYS])
            told = zip(WAYS, rows[-1], strict=True)
            print(f"{repeat + 1}:", ", ".join(f"{way} {m.total:.1f} s" for way, m in told))
        model, _, ball, settings, saved = setting(options)
    from importlib.metadata import version

    kind = type(getattr(model, "backbone", model)).__name__
    note = (
        f"{kind}, {Path(saved.run.data.name).stem}, {settings.images} test images, {ball.norm} "
        f"{ball.eps:.4g}, batches of {settings.batch_size}, medians of {options.repeats}, "
        f"{options.threads} thread. {hardware()}; torch {torch.__version__}, pyautoattack "
        f"{version('pyautoattack')}, raytrain {version('raytrain')}."
    )
    text = table(rows, note)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
