"""Every benchmark is a program whose imports exist; that of speed needs few of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import unchecked

import raytrain
from raytrain.config.cost_estimate import estimate_cost
from raytrain.config.run import RunConfig
from raytrain.models import ModelSpec

FOLDER = Path(__file__).parents[1] / "benchmarks"
UNNEEDED = (
    *("ray", "mlflow", "optuna", "sklearn", "scipy", "pyarrow", "yaml", "safetensors"),
    *("torchvision", "PIL", "matplotlib", "rich", "typer"),
)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_imported_without_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


@pytest.mark.slow
def test_the_speed_of_a_step_is_measured_without_the_packages_for_everything_else() -> None:
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({UNNEEDED}));"
        f"sys.path.insert(0, {str(FOLDER)!r}); sys.argv[0] = {str(FOLDER / 'speed.py')!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = "--network small_cnn --batch 2 --algorithms pgd --modes eager --steps 1 --repeats 1"
    done = subprocess.run(
        [sys.executable, "-c", program, *options.split(), "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "small_cnn" in line]
    steps, attacks = rows[:3], rows[3:]
    assert [row[3:6] for row in steps] == [
        ["pgd", "5.0", "raytrain, eager"],
        ["pgd", "5.0", "floor, eager"],
        ["pgd", "5.0", "plain loop, fp32"],
    ]
    assert attacks[0][3:5] == ["1", "raytrain"] and attacks[0][6:] == ["1.00", "0e+00 |"]


def test_the_attack_that_is_measured_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from speed_attacks import Pgd

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.arange(4)
    model = ModelSpec(name="small_cnn").build(3, 8, 10, (0.5,) * 3, (0.25,) * 3).double()
    with unchecked():
        found = Pgd(eps=0.1, step_size=0.03, steps=3).of_raytrain(model, "fp64")(images, labels)
        wanted = raytrain.attack(
            model, images, labels, eps=0.1, step_size=0.03, steps=3, start="zero"
        )
    assert torch.equal(found, wanted)
    assert (found - images).abs().max() == pytest.approx(0.09)


@pytest.mark.parametrize("name", ["train", "tune"])
def test_a_recording_is_a_small_asciicast_without_paths_of_a_machine(name: str) -> None:
    file = FOLDER.parent / ".github" / f"{name}.cast"
    header, *events = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert header["version"] == 2 and header["title"].startswith(f"raytrain {name} ")
    assert {kind for _, kind, _ in events} == {"o"}
    times = [at for at, _, _ in events]
    assert times == sorted(times) and times[-1] < 60
    assert file.stat().st_size < 100_000
    shown = "".join(text for _, _, text in events)
    assert re.findall(r"(?<![\w.])/(?:tmp|home|root|work|usr|var|mnt|opt)/", shown) == []


def test_the_model_of_many_gpus_hides_the_collective_behind_the_passes_of_an_attack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    model = importlib.import_module("scaling_model")
    size, links = model.size_of("resnet18"), model.BETWEEN
    assert 11.1e6 < size.weights < 11.2e6
    assert model.all_reduce(size.bytes, 1, links["Ethernet"]) == 0.0
    for link in links.values():
        times = [model.all_reduce(size.bytes, 2**k, link) for k in range(10)]
        assert times == sorted(times)
        natural, pgd = (model.share(size, name, 64, link) for name in ("natural", "pgd"))
        # Shares c / (c + p): odds are in proportion to the passes.
        odds = natural / (1 - natural) / (pgd / (1 - pgd))
        assert odds == pytest.approx(model.FE["pgd"] / model.FE["natural"])
        assert 1 <= model.speed_up(size, "pgd", 64, link) <= 64
    for name in ("natural", "pgd"):
        run = RunConfig.model_validate({"algorithm": name})
        assert estimate_cost(run) / run.epochs == model.FE[name]


def test_the_capacity_plan_is_written_between_its_marks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    plan = importlib.import_module("scaling_plan")
    monkeypatch.setattr(plan, "README", tmp_path / "README.md")
    for before in ("", "old\n"):
        plan.README.write_text(f"a\n<!-- plan -->\n{before}\n<!-- end -->\nb")
        plan.into_readme([r"| \1 |", "c"])
        assert plan.README.read_text() == "a\n<!-- plan -->\n| \\1 |\nc\n<!-- end -->\nb"
