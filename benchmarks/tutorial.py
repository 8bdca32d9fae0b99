"""Write raytrain/cli/TUTORIAL.md: the commands of a first session with what they print.

    python benchmarks/tutorial.py

Takes about three minutes on two cores. The text stands here; what the commands print is theirs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "raytrain" / "cli" / "TUTORIAL.md"

HEAD = """# Five minutes with raytrain

Every command below was run as it stands by [benchmarks/tutorial.py](../../benchmarks/tutorial.py), in
an empty folder on two cores; what it printed is underneath. Ids and times differ on your machine.

Words: **FE** is a forward-equivalent, one forward pass of one image; a backward pass for the image
counts one more, a pass with weight gradients three in all. So `FE/sample` is what an image cost each
time it was trained on. **Robust** is the accuracy under attack. **FOSC** is how far an attack is from
its best point, in nats: 0 is converged. A **contract** is the threat model that a number was measured
under: norm, radius, pixel range. A **rung** is a cost at which a sweep stops its weaker trials.
"""

STEPS: list[tuple[str, str]] = [
    (
        "## Train\n\nPGD training on 500 of scikit-learn's digits; `raytrain config` lists every field, "
        "`--dry-run` shows what a run would cost.",
        "raytrain train data.train_size=500 batch_size=50 epochs=6 evaluation.every=3 run_name=first",
    ),
    (
        "## Sweep\n\nFour trials of dynamic adversarial training, whose step size and threshold are "
        "searched; the weaker ones are stopped early. `raytrain ui steps` opens them in the MLflow UI.",
        "raytrain tune SPACES/quickstart.yaml data.train_size=500 batch_size=50 --trials 4 --name steps",
    ),
    (
        "## Evaluate\n\nThe test set, once: of the run, and of the best trial of the sweep, by name. Without "
        "`attacks=pgd` AutoAttack runs too, which takes minutes.",
        "raytrain evaluate first attacks=pgd",
    ),
    ("", "raytrain evaluate steps attacks=pgd"),
    (
        "## Compare\n\nThe report in `comparisons/` has accuracy against cost, intervals and paired tests.",
        "raytrain compare first steps",
    ),
    (
        "## Export\n\nWeights as SafeTensors, in RobustBench's layout and as ONNX where that is installed, "
        "with a model card.",
        "raytrain export first --to exported",
    ),
]

TAIL = """## Go on

- A run that was interrupted: `raytrain train --resume last`; a sweep: `raytrain tune --resume steps`.
- On CIFAR-10: `raytrain train data=cifar10 model=resnet18 threat.eps=8/255`, on 2,000 of its images
  with `data.train_size=2000`.
- Two recordings of a terminal: `asciinema play .github/train.cast`, `asciinema play .github/tune.cast`
  ([how they are made](../../benchmarks/recordings.py)).
- In Python: `help(raytrain)` is the same tour.
- What each command does: [commands](README.md). Choose an algorithm:
  [algorithms](../algorithms/README.md).
"""


def printed(command: str, folder: Path) -> str:
    """Run a command; return what it prints on stdout, without what belongs to this machine."""
    words = shlex.split(command.replace("SPACES", str(ROOT / "search_spaces")))
    settings = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit status {done.returncode}\n{done.stderr}")
    lines = done.stdout.replace(f"{folder.resolve()}/", "").splitlines()
    return re.sub(r"\n{2,}", "\n", "\n".join(line.rstrip() for line in lines)).strip("\n")


def main() -> None:
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as name:
        for text, command in STEPS:
            print(command, flush=True)
            shown = command.replace("SPACES/", "search_spaces/")
            output = printed(command, Path(name))
            heading, _, words = text.rpartition("\n\n")
            text = f"{heading}\n\n{textwrap.fill(words, 128)}"
            parts.append(f"{text}\n\n```sh\n{shown}\n```\n\n```text\n{output}\n```\n".lstrip("\n"))
    PAGE.write_text("\n".join([*parts, TAIL]), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
