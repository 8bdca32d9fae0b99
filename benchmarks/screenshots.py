"""The pictures of the MLflow UI in the README: real runs on the digits, seen by headless Chromium.

    python benchmarks/screenshots.py --store /tmp/pictures

The store is made where there is none (six algorithms, two evaluations and a sweep: about five minutes
on two cores), and taken as it is otherwise. Chromium and the fonts of the system decide the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name("raytrain")
ALGORITHMS = (
    ["algorithm=pgd"],
    ["algorithm=trades"],
    ["algorithm=mart"],
    ["algorithm=dynamic"],
    ["algorithm=n_fgsm"],
    ["algorithm=free"],
)
FE_PER_IMAGE = 120
PORT = 5077
_PATIENCE = 180  # seconds for a page
_LEFT, _WIDTH, _RIGHT = 196, 1400, 404  # pixels: a menu, the page, an assistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of mlflow.db and runs/")
    parser.add_argument("--to", type=Path, default=ROOT / ".github", help="folder of pictures")
    parser.add_argument("--only", default="", help="names of pictures, with commas")
    words = parser.parse_args()
    words.store.mkdir(parents=True, exist_ok=True)
    if not (words.store / "mlflow.db").exists():
        make(words.store)
    wanted = set(filter(None, words.only.split(",")))
    with served(words.store) as address:
        for name, page, height in pages(words.store):
            if not wanted or name in wanted:
                picture = words.to / f"{name}.png"
                shoot(f"{address}/{page}", picture, height)
                print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


def make(folder: Path) -> None:
    """Runs of every kind."""
    for words in ALGORITHMS:
        run = raytrain(folder, "train", *words, f"fe_per_image={FE_PER_IMAGE}", "batch_size=64")
        if words[0] in ("algorithm=pgd", "algorithm=n_fgsm"):
            raytrain(folder, "evaluate", run["run_id"], "attacks=pgd,apgd", "images=100")
    raytrain(
        folder, "tune", str(ROOT / "search_spaces" / "quickstart.yaml"), "--name", "quickstart"
    )


def raytrain(folder: Path, *words: str) -> dict[str, Any]:
    """The JSON that a command prints last."""
    command = [str(COMMAND), *words, "--json"]
    print("raytrain", *words)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, check=True, stdout=PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def pages(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, address below the server, and height of every picture."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    where = [experiment.experiment_id]
    of = f"#/experiments/{experiment.experiment_id}"

    def runs(wanted: str) -> list[str]:
        found = client.search_runs(where, wanted, order_by=["attributes.start_time ASC"])
        return [run.info.run_id for run in found]

    trained = runs("tags.kind = 'train'")
    (sweep,) = runs("tags.kind = 'sweep'")
    ids = quote(json.dumps(trained))
    search = quote("params.`algorithm.name` = 'dynamic' and metrics.`valid/robust` > 0.7")
    yield "mlflow-runs", f"{of}/runs?viewStateShareKey=raytrain", 720
    yield (
        "mlflow-compare",
        f"#/compare-runs?runs={ids}&experiments={quote(json.dumps(where))}",
        1100,
    )
    yield (
        "mlflow-parallel",
        f"{of}/runs?viewStateShareKey=quickstart&compareRunsMode=CHART",
        720,
    )
    yield "mlflow-search", f"{of}/runs?searchFilter={search}", 560
    yield "mlflow-run", f"{of}/runs/{trained[0]}", 1100
    yield "mlflow-sweep", f"{of}/runs/{sweep}", 1100
    yield "mlflow-model", "#/models/digits-small_cnn-linf-0.1", 620


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The UI as `raytrain ui` starts it."""
    command = [str(COMMAND), "ui", "--port", str(PORT)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{PORT}"
        try:
            _wait_for(address)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address: str) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"{address}: no answer")


def shoot(address: str, picture: Path, height: int) -> None:
    """A page as a PNG with few colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += [
            f"--user-data-dir={profile}",
            f"--window-size={_LEFT + _WIDTH + _RIGHT},{height}",
        ]
        flags += [f"--screenshot={profile}/page.png", "--virtual-time-budget=25000"]
        command = [os.environ.get("CHROMIUM", "chromium"), *flags, address]
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)
        with Image.open(f"{profile}/page.png") as page:
            cut = page.convert("RGB").crop((_LEFT, 0, _LEFT + _WIDTH, page.height))
            cut.quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
