"""The pictures of the MLflow UI: real runs on the digits, seen by headless Chromium.

    python benchmarks/screenshots.py --store /tmp/pictures

The store is made where there is none (six algorithms, two evaluations and a sweep: about five minutes
on two cores), and taken as it is otherwise. Chromium and the fonts of the system decide the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
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
from subprocess import DEVNULL, PIPE
from typing import Any

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
_PATIENCE = 12  # seconds for a page
_MENU, _WIDTH = 196, 1400  # pixels: what is cut away on the left, and what is kept
_CLOSE = """
[...document.querySelectorAll("button")].filter(
  (button) => button.closest("div")?.parentElement?.textContent.startsWith("MLflow Assistant")
).at(-1)?.click()
"""  # the pane of MLflow's assistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of mlflow.db and runs/")
    parser.add_argument("--to", type=Path, default=ROOT / ".github", help="folder of pictures")
    parser.add_argument("--only", default="", help="names of pictures, with commas")
    words = parser.parse_args()
    for folder in (words.store, words.to):
        folder.mkdir(parents=True, exist_ok=True)
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

    from raytrain.tracking import link, run_link
    from raytrain.tracking.views import EVERY

    client = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    where = [experiment.experiment_id]

    def runs(wanted: str) -> list[str]:
        found = client.search_runs(where, wanted, order_by=["attributes.start_time ASC"])
        return [run.info.run_id for run in found]

    trained = runs("tags.kind = 'train'")
    number = experiment.experiment_id
    yield "mlflow-runs", link(number, EVERY), 720
    yield "mlflow-compare", link(number, EVERY, charts=True), 1240
    yield "mlflow-parallel", link(number, "quickstart", charts=True), 1240
    yield "mlflow-run", run_link(number, trained[0]), 900
    yield "mlflow-model", "#/models/digits-small_cnn-linf-0.1?workflowType=machine_learning", 720


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The UI as `raytrain ui` starts it."""
    command = [str(COMMAND), "ui", "--no-browser", "--port", str(PORT)]
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

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        command = [os.environ.get("CHROMIUM", "chromium"), *flags, "about:blank"]
        browser = subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL)
        try:
            seen = asyncio.run(_seen(Path(profile) / "DevToolsActivePort", address, height))
        finally:
            browser.terminate()
            browser.wait(30)
    with Image.open(io.BytesIO(seen)) as page:
        cut = page.convert("RGB").crop((_MENU, 0, page.width, page.height))
        cut.quantize(128).save(picture, optimize=True)


async def _seen(port_file: Path, address: str, height: int) -> bytes:
    """What a browser shows once a page has had its time; charts are drawn in real time only."""
    from aiohttp import ClientSession

    for _ in range(100):  # Chromium chooses a free port and writes it there
        if port_file.exists() and port_file.read_text().strip():
            break
        await asyncio.sleep(0.2)
    port = port_file.read_text().split()[0]
    async with ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            (tab, *_) = [one for one in await answer.json() if one["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as tab:

            async def do(method: str, **what: Any) -> Any:
                await tab.send_json({"id": 1, "method": method, "params": what})
                async for message in tab:
                    told = message.json()
                    if told.get("id") == 1:
                        return told.get("result", told)

            size = {"width": _MENU + _WIDTH, "height": height, "deviceScaleFactor": 1}
            await do("Emulation.setDeviceMetricsOverride", **size, mobile=False)
            await do("Page.navigate", url=address)
            await asyncio.sleep(_PATIENCE / 2)
            await do("Runtime.evaluate", expression=_CLOSE)
            await asyncio.sleep(_PATIENCE / 2)
            return base64.b64decode((await do("Page.captureScreenshot"))["data"])


if __name__ == "__main__":
    main()
