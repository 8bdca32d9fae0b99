"""A trained network leaves as files that give the same logits, with a card that tells what is known."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import raytrain
from raytrain.cli.app import app
from raytrain.commands.export import ExportResult, export
from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.data.digits import read_digits
from raytrain.data.images import Split
from raytrain.data.loader import open_splits, open_test
from raytrain.evaluation.record import EvaluationRecord
from raytrain.exporting import formats
from raytrain.exporting import onnx as onnx_format
from raytrain.exporting.check import same_logits
from raytrain.exporting.numbers import record_of
from raytrain.exporting.robustbench import eps_text
from raytrain.exporting.safetensors import load_exported
from raytrain.models import ModelSpec, robustbench_state_dict
from raytrain.models.preact_resnet import PreActResNet18
from raytrain.models.resnet import ResNet18
from raytrain.models.silu_wide_resnet import SiluWideResNet
from raytrain.models.wide_resnet import WideResNet
from raytrain.tracking.lookup import Seen, look_up
from raytrain.training.checkpoint import load, save
from raytrain.training.run_folder import write_run_file
from raytrain.training.setup import network, start
from raytrain.training.trainer import fit_and_checkpoint

# MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*loader strategy")

RUN_ID = "0123456789abcdef0123456789abcdef"
THEIRS = [
    pytest.param("resnet18", marks=pytest.mark.slow),
    pytest.param("preact_resnet18", marks=pytest.mark.slow),
    "wideresnet-10-1",
    "wideresnet-10-1-silu",
]
FIELDS = [
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
    *("architecture", "eps", "clean_acc", "reported", "autoattack_acc", "footnote"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no store from outside."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training on the digits with averaged weights, below runs/raytrain."""
    folder = tmp_path_factory.mktemp("home") / "runs" / "raytrain" / RUN_ID
    run = as_run(
        {
            "data": {"name": "digits", "train_size": 128},
            "algorithm": {"name": "pgd", "steps": 1},
            "evaluation": {"steps": 1},
            "epochs": 2,
            "batch_size": 64,
            "ema": 0.9,
            "storage": str(folder.parent.parent),
        }
    )
    write_run_file(run, folder)
    assert len(list(fit_and_checkpoint(run, DistributedContext(), folder))) == 2
    return folder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as photographs of 32 pixels: a colour per image, in Parquet."""
    folder = tmp_path_factory.mktemp("coloured")
    sizes: dict[Split, int] = {"train": 200, "test": 30}
    for split, number in sizes.items():
        images = read_digits(split)
        grey = images.whole[:number].repeat_interleave(4, 2).repeat_interleave(4, 3)
        tint = torch.rand(number, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        pixels = (grey * tint).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        table = {"img": [_png(one) for one in pixels], "label": images.labels[:number].tolist()}
        pq.write_table(pa.table(table), folder / f"{split}.parquet")
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


ONNX = ("onnx", "onnxscript", "onnxruntime")


def hide(patch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages count as not installed."""
    for package in packages:
        patch.setitem(sys.modules, package, None)


def untrained(folder: Path, **config: Any) -> Path:
    """A checkpoint of a network that has only seen its images: BatchNorm's statistics are real."""
    run = as_run({"batch_size": 8, **config})
    splits = open_splits(run.data, DistributedContext())
    state = start(run, splits, DistributedContext())
    state.model.train()
    with torch.no_grad():
        state.model(splits.train.whole[:32].to(splits.train.dtype) / 255)
    save(state, run, folder / "best.pt", DistributedContext())
    return folder / "best.pt"


def other_images(checkpoint: Path, number: int) -> Tensor:
    """Other images than those that the export checks itself on."""
    return (
        open_test(load(checkpoint).run.data, DistributedContext())[0].whole[-number:].float() / 255
    )


def logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def front(folder: Path) -> dict[str, Any]:
    """The YAML at the head of the card."""
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head)


def evaluation(
    epoch: int, scope: str = "test", eps: float = 0.1, failed: bool = False, **robust: int
) -> dict[str, Any]:
    """evaluation.json, with counts of 397 images."""
    counts = {"clean": 380, **robust}
    return {
        "scope": scope,
        "checkpoint": "last" if scope.startswith("test_last") else "best",
        "epoch": epoch,
        "contract": {"norm": "linf", "eps": eps, "hash": "1a2b3c4d", "text": f"linf eps {eps}"},
        "same_contract": eps == 0.1,
        "images": 397,
        "accuracies": {
            name: {
                "value": count / 397,
                "low": count / 397 - 0.05,
                "high": count / 397 + 0.02,
                "count": count,
                "images": 397,
            }
            for name, count in counts.items()
        },
        "findings": [
            {"check": "zero_gradients", "passed": not failed, "sentence": "Half vanish."},
            {"check": "modes", "passed": True, "sentence": "All in eval mode."},
        ],
        "trusted": not failed,
        "hardware": "an abacus",
    }


def with_numbers(checkpoint: Path, folder: Path, *numbers: dict[str, Any]) -> Path:
    """A copy of a checkpoint, with evaluations beside it."""
    folder.mkdir()
    (folder / "best.pt").write_bytes(checkpoint.read_bytes())
    for one in numbers:
        file = folder / "evaluation" / one["scope"] / "evaluation.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(one))
    return folder


def epoch_of(folder: Path) -> int:
    return load(folder / "best.pt").epoch


class TestWeights:
    """model.safetensors."""

    @pytest.mark.parametrize("name", ["small_cnn", "small_cnn_nobn", *THEIRS])
    def test_every_network_comes_back_bit_for_bit(
        self, name: str, coloured: Path, tmp_path: Path
    ) -> None:
        data = {"name": "digits" if name.startswith("small") else str(coloured)}
        file = untrained(tmp_path / "run", data=data, model=name)
        result = export(file, "out", formats=["safetensors"])
        images = other_images(file, 7)
        assert torch.equal(
            logits(load_exported("out"), images), logits(network(load(file)), images)
        )
        assert result.checked["safetensors"].tolerance == 0
        assert {path.name for path in Path("out").iterdir()} == {
            *("model.safetensors", "README.md", "run.yaml")
        }

    def test_averaged_weights_are_the_ones_that_leave(self, trained: Path) -> None:
        export(trained, "out", formats=["safetensors"])
        content = load(trained / "best.pt").content
        found = load_file("out/model.safetensors")
        for key, value in found.items():
            assert torch.equal(value, content["ema"][f"module.{key}"])
        assert not torch.equal(
            found["backbone.linear.weight"], content["model"]["backbone.linear.weight"]
        )
        assert "averaged over training (ema 0.9)" in Path("out/README.md").read_text()

    def test_double_precision_leaves_as_single(self, tmp_path: Path) -> None:
        file = untrained(tmp_path / "run", precision="fp64")
        export(file, "out", formats=["safetensors"])
        images = other_images(file, 7)
        assert torch.equal(
            logits(load_exported("out"), images), logits(network(load(file)).float(), images)
        )
        assert "trained in fp64, exported as fp32" in Path("out/README.md").read_text()

    def test_a_network_from_elsewhere_with_tied_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = types.ModuleType("elsewhere")
        vars(module)["tied"] = Tied
        monkeypatch.setitem(sys.modules, "elsewhere", module)
        model = {"name": "elsewhere:tied", "kwargs": {"width": 12}}
        file = untrained(tmp_path / "run", model=model)
        export(file, "out", formats=["safetensors"])
        images = other_images(file, 7)
        back = load_exported("out")
        assert torch.equal(logits(back, images), logits(network(load(file)), images))
        assert "`elsewhere:tied` must be importable" in Path("out/README.md").read_text()
        monkeypatch.delitem(sys.modules, "elsewhere")
        with pytest.raises(RequestError, match="elsewhere cannot be imported"):
            load_exported("out")

    def test_what_is_not_an_export_is_refused_by_name(self, trained: Path) -> None:
        with pytest.raises(RequestError, match="raytrain export"):
            load_exported("nowhere")
        with pytest.raises(RequestError, match="best.pt: not a file of weights"):
            load_exported(trained / "best.pt")

    def test_the_name_export_is_a_function_whatever_was_imported(self) -> None:
        assert raytrain.export is export
        assert raytrain.load_exported is load_exported


class Tied(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(64, width)
        self.second.weight = self.first.weight
        self.last = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.last(torch.relu(self.first(flat)) - torch.relu(self.second(-flat)))


class TestRobustBench:
    """robustbench/."""

    @pytest.mark.parametrize("name", THEIRS)
    def test_the_code_of_its_readme_gives_the_same_logits(
        self, name: str, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"data": str(coloured), "model": name, "threat": {"norm": "l2", "eps": 0.5}}
        file = untrained(tmp_path / "run", **config)
        result = export(file, "out", formats=["robustbench"])
        (weights,) = Path("out/robustbench/models").rglob("*.pt")
        assert weights.parts[-3:-1] == (coloured.name, "L2")
        state = torch.load(weights, weights_only=True)
        model: Any = network(load(file))
        names, shape = {"mu", "sigma"}, (1, 3, 1, 1)
        if "silu" in name:
            names, shape = {"mean", "std"}, (3, 1, 1)
        assert state.keys() == robustbench_state_dict(model).keys() | names
        assert {tuple(state[buffer].shape) for buffer in names} == {shape}
        again = ModelSpec(name=f"robustbench:{weights}")
        assert (again.name, again.normalise) == (name, True)
        _their_package(monkeypatch)
        monkeypatch.chdir("out/robustbench")
        (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
        Path("theirs.py").write_text(code)
        net = runpy.run_path("theirs.py")["net"]
        images = other_images(file, 7)
        assert torch.equal(logits(net, images), logits(model, images))
        assert result.checked["robustbench"].difference == 0

    def test_a_claim_without_numbers_is_empty_where_nobody_knows(
        self, coloured: Path, tmp_path: Path
    ) -> None:
        threat = {"norm": "linf", "eps": "8/255"}
        file = untrained(
            tmp_path / "run", data=str(coloured), model="wideresnet-10-1", threat=threat
        )
        result = export(file, "out", formats=["robustbench"])
        folder = Path("out/robustbench/model_info") / coloured.name / "Linf"
        claim = json.loads((folder / f"{result.name}.json").read_text())
        assert list(claim) == FIELDS
        known = {key: value for key, value in claim.items() if value != ""}
        assert known == {
            "number_forward_passes": 1,
            "dataset": coloured.name,
            "architecture": "WideResNet-10-1",
            "eps": "8/255",
        }

    def test_a_claim_with_numbers_says_which_attack_and_how_many_images(
        self, coloured: Path, tmp_path: Path
    ) -> None:
        file = untrained(tmp_path / "run", data=str(coloured), model="wideresnet-10-1")
        weak = {**evaluation(0, pgd20=20), "images": 20}
        export(with_numbers(file, tmp_path / "weak", weak), "one", formats=["robustbench"])
        strong = evaluation(0, failed=True, pgd20=200, aa=210)
        export(with_numbers(file, tmp_path / "aa", strong), "two", formats=["robustbench"])
        one, two = (
            json.loads(next(Path(folder, "robustbench").rglob("*.json")).read_text())
            for folder in ("one", "two")
        )
        assert (one["clean_acc"], one["reported"], one["autoattack_acc"]) == ("95.72", "5.04", "")
        assert one["footnote"] == (
            "Measured on 20 of 30 test images. The reported accuracy is under PGD-20, not AutoAttack."
        )
        assert (two["reported"], two["autoattack_acc"]) == ("50.38", "52.90")
        assert two["footnote"] == (
            "The reported accuracy is under PGD-20, not AutoAttack. Failed checks: zero_gradients."
        )
        assert (one["unreliable"], two["unreliable"]) == (False, True)

    def test_a_claim_is_unreliable_if_any_evaluation_is(
        self, coloured: Path, tmp_path: Path
    ) -> None:
        """Also where the numbers of the claim passed, or there are none."""
        file = untrained(tmp_path / "run", data=str(coloured), model="wideresnet-10-1")
        whole = {**evaluation(0, aa=210), "same_contract": True}
        some = {**evaluation(0, "test_1000", failed=True, aa=100), "same_contract": True}
        other = evaluation(0, "test_linf-0.2", eps=0.2, failed=True, aa=100)
        for name, numbers, reported in (("one", (whole, some), "52.90"), ("two", (other,), "")):
            folder = with_numbers(file, tmp_path / f"of {name}", *numbers)
            result = export(folder, name, formats=["robustbench"])
            claim = json.loads(next(Path(name, "robustbench").rglob("*.json")).read_text())
            assert claim["reported"] == claim["autoattack_acc"] == reported
            assert claim["footnote"] == "Failed checks: zero_gradients."
            assert claim["unreliable"] is True and result.failed_checks == ("zero_gradients",)

    @pytest.mark.parametrize(
        ("robust", "strongest"),
        [
            ({"pgd20": 200, "aa": 210}, "pgd20"),
            ({"pgd50x5": 200, "aa": 200}, "aa"),
            ({"cw50x5": 200, "pgd50": 200, "pgd50x5": 200}, "pgd50x5"),
            ({"cw20": 190, "pgd20": 200}, "cw20"),
            ({}, None),
        ],
    )
    def test_the_strongest_attack_has_the_least_accuracy_and_the_stronger_name_of_equals(
        self, robust: dict[str, Any], strongest: str | None
    ) -> None:
        assert EvaluationRecord.model_validate(evaluation(1, **robust)).strongest == strongest

    @pytest.mark.parametrize(
        ("model", "threat", "message"),
        [
            ("small_cnn", "linf", "RobustBench has no namesake of small_cnn; expected resnet18"),
            ("wideresnet-10-1", "l1", "RobustBench has no l1 threat model"),
        ],
    )
    def test_what_it_has_no_name_for_is_refused_and_else_left_out(
        self, model: str, threat: str, message: str, coloured: Path, tmp_path: Path
    ) -> None:
        config = {"data": str(coloured), "threat": {"norm": threat, "eps": 0.1}}
        file = untrained(tmp_path / "run", model=model, **config)
        with pytest.raises(RequestError, match=f"^--format: {message}"):
            export(file, "out", formats=["safetensors", "robustbench"])
        assert not Path("out").exists()
        with pytest.MonkeyPatch.context() as patch:
            hide(patch, *ONNX)
            result = export(file, "out")
        assert result.skipped["robustbench"].startswith(message)
        assert list(result.checked) == ["safetensors"]

    def test_grey_images_have_no_network_there(self, trained: Path) -> None:
        with pytest.raises(RequestError, match="take 3x32x32 images, these are 1x8x8"):
            export(trained, "out", formats=["robustbench"])

    @pytest.mark.parametrize(
        ("norm", "eps", "text"),
        [
            ("linf", 8 / 255, "8/255"),
            ("linf", 0.0313725, "8/255"),
            ("linf", 0.0313, "0.0313"),
            ("linf", 0.1, "0.1"),
            ("linf", 0.3, "0.3"),
            ("linf", 0.001, "0.001"),
            ("linf", 0.2, "0.2"),
            ("linf", 1.0, "1"),
            ("linf", 0.5 / 255, "0.00196078"),
            ("l2", 0.5, "0.5"),
            ("l2", 128 / 255, "0.501961"),
        ],
    )
    def test_a_radius_is_written_as_in_papers(self, norm: str, eps: float, text: str) -> None:
        assert eps_text(norm, eps) == text


def _their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with RobustBench's names and signatures, made of networks of the same arithmetic."""

    def resnet(self: nn.Module, block: str, blocks: list[int], num_classes: int = 10) -> None:
        assert (block, blocks) == ("BasicBlock", [2, 2, 2, 2])
        ResNet18.__init__(self, 3, num_classes)  # pyright: ignore[reportArgumentType]

    def preact(
        self: nn.Module, block: str, blocks: list[int], num_classes: int, bn_before_fc: bool
    ) -> None:
        assert (block, blocks, bn_before_fc) == ("PreActBlockV2", [2, 2, 2, 2], True)
        PreActResNet18.__init__(self, 3, num_classes)  # pyright: ignore[reportArgumentType]

    def wide(self: nn.Module, depth: int, num_classes: int, widen_factor: int) -> None:
        args = (3, num_classes, depth, widen_factor)
        WideResNet.__init__(self, *args)  # pyright: ignore[reportArgumentType]

    def silu(self: Any, depth: int, width: int, activation_fn: str, num_classes: int = 10) -> None:
        assert activation_fn == "Swish"
        SiluWideResNet.__init__(self, 3, num_classes, depth, width)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def normalised(self: Any, x: Tensor) -> Tensor:
        return SiluWideResNet.forward(self, (x - self.mean) / self.std)

    def named(name: str, base: type, init: Callable) -> type:
        return types.new_class(name, (base,), exec_body=lambda body: body.update(__init__=init))

    dm: Any = named("DMWideResNet", SiluWideResNet, silu)
    dm.forward = normalised
    theirs = {
        "resnet": {
            "BasicBlock": "BasicBlock",
            "PreActBlockV2": "PreActBlockV2",
            "ResNet": named("ResNet", ResNet18, resnet),
            "PreActResNet": named("PreActResNet", PreActResNet18, preact),
        },
        "wide_resnet": {"WideResNet": named("WideResNet", WideResNet, wide)},
        "dm_wide_resnet": {"DMWideResNet": dm, "Swish": "Swish"},
    }
    path = "robustbench"
    for part in ("", ".model_zoo", ".architectures"):
        path += part
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for name, content in theirs.items():
        module = types.ModuleType(f"{path}.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"{path}.{name}", module)


class TestOnnx:
    """model.onnx."""

    @pytest.mark.parametrize(
        "name",
        [
            "small_cnn",
            pytest.param("wideresnet-10-1", marks=pytest.mark.slow),
            pytest.param("small_cnn_nobn", marks=pytest.mark.slow),
            pytest.param("resnet18", marks=pytest.mark.slow),
            pytest.param("preact_resnet18", marks=pytest.mark.slow),
        ],
    )
    def test_the_graph_takes_any_batch_and_gives_the_logits(
        self, name: str, coloured: Path, tmp_path: Path
    ) -> None:
        data = "digits" if name.startswith("small") else str(coloured)
        file = untrained(tmp_path / "run", data=data, model=name)
        result = export(file, "out", formats=["onnx"])
        assert result.checked["onnx"].tolerance == onnx_format.TOLERANCE
        session = onnxruntime.InferenceSession("out/model.onnx")
        model = network(load(file))
        for number in (1, 3, 17):
            images = other_images(file, number)
            (found,) = map(np.asarray, session.run(None, {"images": images.numpy()}))
            expected = logits(model, images)
            assert found.shape == expected.shape
            assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-5
        graph = onnx.load("out/model.onnx")
        assert [one.version for one in graph.opset_import if one.domain == ""] == [18]
        assert [one.name for one in graph.graph.input] == ["images"]
        assert [one.name for one in graph.graph.output] == ["logits"]
        facts = json.loads(session.get_modelmeta().custom_metadata_map["raytrain"])
        assert facts["name"] == result.name and facts["channels"] == images.shape[1]

    def test_missing_packages_are_one_sentence_or_left_out(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            hide(patch, *ONNX)
            with pytest.raises(
                RequestError, match=r"onnx needs onnx, onnxscript, .*raytrain\[onnx\]"
            ):
                export(trained, "out", formats=["onnx"])
        hide(monkeypatch, "onnxruntime")
        result = export(trained, "out")
        assert list(result.checked) == ["safetensors"]
        assert result.skipped["onnx"].startswith("onnx needs onnxruntime;")

    def test_a_network_that_cannot_be_traced_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = types.ModuleType("elsewhere")
        vars(module)["untraceable"] = Untraceable
        monkeypatch.setitem(sys.modules, "elsewhere", module)
        file = untrained(tmp_path / "run", model="elsewhere:untraceable")
        with pytest.raises(TrainingFailed, match="untraceable cannot be made an ONNX graph"):
            export(file, tmp_path / "new" / "out", formats=["safetensors", "onnx"])
        assert list((tmp_path / "new").iterdir()) == []


class Untraceable(nn.Module):
    """Its path depends on the pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scale = 2 if float(x.sum()) > 1 else 1
        return scale * self.linear(x.flatten(1))


class TestCheck:
    """What is written is read back before it is called an export."""

    def test_differences_above_the_tolerance_shapes_and_nan_fail(self) -> None:
        images, file = torch.rand(5, 1, 2, 2), Path("weights")
        flat = nn.Flatten()
        assert same_logits(file, flat, flat, images).difference == 0
        near = same_logits(file, flat, lambda x: flat(x) * (1 + 1e-6), images, 1e-5)
        assert 0 < near.difference <= 1e-6
        wrong: dict[str, Callable[[Tensor], Tensor]] = {
            "off by": lambda x: flat(x) + 1e-4,
            "off by inf": lambda x: flat(x) * torch.nan,
            "shape": lambda x: flat(x)[:1],
        }
        for sentence, theirs in wrong.items():
            with pytest.raises(TrainingFailed, match=f"weights: .*{sentence}"):
                same_logits(file, flat, theirs, images, 1e-5)

    def test_one_wrong_image_in_a_batch_is_enough(self) -> None:
        images, flat = torch.rand(5, 1, 2, 2), nn.Flatten()

        def only_the_fifth(x: Tensor) -> Tensor:
            return flat(x) + (torch.arange(len(x)) == 4)[:, None]

        with pytest.raises(TrainingFailed):
            same_logits(Path("weights"), flat, only_the_fifth, images)

    def test_weights_that_were_not_written_well_leave_nothing(
        self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = formats.FORMATS["safetensors"]

        def badly(subject: Any, folder: Path) -> Any:
            with torch.no_grad():
                moved = network(subject.saved)
                next(moved.parameters()).add_(1e-3)
            return write(replace(subject, model=moved), folder)

        def compared(subject: Any, folder: Path) -> Any:
            badly(subject, folder)
            back = load_exported(folder)
            return same_logits(folder, subject.model, back, subject.images)

        monkeypatch.setitem(formats.FORMATS, "safetensors", compared)
        command = ["export", str(trained), "--to", "new/out", "--format", "safetensors"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert "does not give the network's logits back" in result.stderr
        assert list((tmp_path / "new").iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_one_sentence(
        self, trained: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TrainingFailed, match=r"^--to: .*/file/out could not be written"):
            export(trained, tmp_path / "file" / "out", formats=["safetensors"])


class TestCard:
    """README.md: the threat, the numbers, what made them."""

    def test_without_an_evaluation_it_says_so_and_has_no_results(self, trained: Path) -> None:
        result = export(trained, "out", formats=["safetensors"])
        text = Path("out/README.md").read_text()
        assert not result.evaluated and "**Not evaluated**" in text
        head = front(Path("out"))
        assert "model-index" not in head and "datasets" not in head
        assert head["license"] == "unknown" and head["library_name"] == "raytrain"
        assert {"linf", "pgd", "safetensors"} <= set(head["tags"])
        assert "not recorded" in text  # MLflow knows nothing of this run

    def test_numbers_come_with_interval_count_and_contract(
        self, trained: Path, tmp_path: Path
    ) -> None:
        numbers = evaluation(epoch_of(trained), pgd20=200, aa=190)
        folder = with_numbers(trained / "best.pt", tmp_path / "run", numbers)
        result = export(folder, "out", formats=["safetensors"], licence="cc-by-4.0")
        text = Path("out/README.md").read_text()
        assert result.evaluated and result.failed_checks == ()
        assert "| PGD-20 | 50.38% | 45.38% to 52.38% | 200 of 397 |" in text
        assert "| AutoAttack | 47.86% | 42.86% to 49.86% | 190 of 397 |" in text
        assert "Checks passed: `zero_gradients`, `modes`." in text
        assert "contract `1a2b3c4d`" in text and "Measured on an abacus." in text
        assert "WARNING" not in text and "AutoAttack was not run" not in text
        head = front(Path("out"))
        (index,) = head["model-index"]
        (found,) = index["results"]
        assert found["task"]["type"] == "image-classification"
        values = {one["name"]: one["value"] for one in found["metrics"]}
        assert values == {
            "clean accuracy": 0.957179,
            "accuracy under PGD-20, linf eps 0.1": 0.503778,
            "accuracy under AutoAttack, linf eps 0.1": 0.478589,
        }
        assert head["license"] == "cc-by-4.0"
        copied = Path("out/evaluation/test/evaluation.json")
        assert json.loads(copied.read_text()) == numbers

    def test_failed_checks_are_loud_everywhere(self, trained: Path, tmp_path: Path) -> None:
        numbers = evaluation(epoch_of(trained), failed=True, pgd20=300)
        folder = with_numbers(trained / "best.pt", tmp_path / "run", numbers)
        result = export(folder, "out", formats=["safetensors"])
        text = Path("out/README.md").read_text()
        assert result.failed_checks == ("zero_gradients",)
        assert "WARNING: CHECKS FAILED" in text and "`zero_gradients`: Half vanish." in text
        assert "**AutoAttack was not run**" in text
        (found,) = front(Path("out"))["model-index"][0]["results"]
        assert all("FAILED CHECKS" in one["name"] for one in found["metrics"])

    @pytest.mark.parametrize(("scope", "eps"), [("test_200", 0.1), ("test_linf-0.2", 0.2)])
    def test_a_failure_beside_numbers_that_passed_is_told_on_the_screen_and_as_json(
        self, scope: str, eps: float, trained: Path, tmp_path: Path
    ) -> None:
        epoch = epoch_of(trained)
        passed = evaluation(epoch, aa=200)
        other = evaluation(epoch, scope, eps, failed=True, pgd20=200)
        folder = with_numbers(trained / "best.pt", tmp_path / "run", passed, other)
        command = ["export", str(folder), "--format", "safetensors", "--to"]
        screen = CliRunner().invoke(app, [*command, "out"]).stdout
        assert "CHECKS FAILED (zero_gradients)" in screen and "with test-set" not in screen
        told = json.loads(CliRunner().invoke(app, [*command, "two", "--json"]).stdout)
        assert told["evaluated"] is True and told["failed_checks"] == ["zero_gradients"]

    def test_a_failure_without_numbers_of_the_own_threat_model_is_told_on_the_screen(
        self, trained: Path, tmp_path: Path
    ) -> None:
        other = evaluation(epoch_of(trained), "test_linf-0.2", 0.2, failed=True, aa=200)
        folder = with_numbers(trained / "best.pt", tmp_path / "run", other)
        command = ["export", str(folder), "--format", "safetensors", "--to", "out"]
        assert "CHECKS FAILED (zero_gradients)" in CliRunner().invoke(app, command).stdout

    def test_an_evaluation_that_is_not_trusted_is_as_loud(
        self, trained: Path, tmp_path: Path
    ) -> None:
        numbers = {**evaluation(epoch_of(trained), aa=300), "trusted": False}
        folder = with_numbers(trained / "best.pt", tmp_path / "run", numbers)
        assert export(folder, "out", formats=["safetensors"]).failed_checks == ("trusted",)
        assert "WARNING: CHECKS FAILED" in Path("out/README.md").read_text()

    def test_numbers_of_another_epoch_or_checkpoint_are_left_out(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        epoch = epoch_of(trained)
        stale = evaluation(epoch + 1, pgd20=390)
        last = evaluation(epoch, scope="test_last", pgd20=391)
        elsewhere = evaluation(epoch, scope="test_linf-0.2", eps=0.2, pgd20=100)
        folder = with_numbers(trained / "best.pt", tmp_path / "run", stale, last, elsewhere)
        result = export(folder, "out", formats=["safetensors"])
        text = Path("out/README.md").read_text()
        assert not result.evaluated and "**Not evaluated**" in text
        assert "Under **another** threat model, linf eps 0.2:" in text and "100 of 397" in text
        assert "390 of 397" not in text and "391 of 397" not in text
        assert [path.name for path in Path("out/evaluation").iterdir()] == ["test_linf-0.2"]
        assert f"is of epoch {epoch + 1}, not {epoch}: left out" in capsys.readouterr().err

    def test_the_last_checkpoint_has_numbers_of_its_own(self, trained: Path) -> None:
        record = record_of(None, None, trained, "last", 2)
        assert record.evaluations == ()
        file = trained / "evaluation" / "test_last_linf-0.2" / "evaluation.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(evaluation(2, scope="test_last_linf-0.2", eps=0.2, aa=3)))
        try:
            (found,) = record_of(None, None, trained, "last", 2).evaluations
            assert found.accuracies["aa"].count == 3
            assert record_of(None, None, trained, "best", 2).evaluations == ()
            result = export(trained, "out", which="last", formats=["safetensors"])
        finally:
            file.unlink()
        assert result.name.endswith("-last") and result.epoch == 2 and not result.evaluated

    def test_an_evaluation_of_another_version_is_left_out_with_its_place(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        numbers = {**evaluation(1), "images": "many"}
        folder = with_numbers(trained / "best.pt", tmp_path / "run", numbers)
        assert record_of(None, None, folder, "best", 1).main is None
        assert (
            "evaluation.json beside the checkpoint is not of this version (images)"
            in capsys.readouterr().err
        )

    def test_each_evaluation_is_of_the_file_beside_the_checkpoint_or_else_of_mlflow(
        self,
        trained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        stored = {
            "test": evaluation(1, aa=201),
            "test_100": evaluation(1, "test_100", aa=202),
            "test_200": evaluation(1, "test_200", aa=203),
            "test_300": evaluation(3, "test_300", aa=204),
            "test_last": evaluation(1, "test_last", aa=205),
        }
        texts = {f"evaluation/{k}/evaluation.json": json.dumps(v) for k, v in stored.items()}
        seen = Seen({}, {"test/images": 9.0, "test/aa": 1.0}, texts)
        monkeypatch.setattr("raytrain.exporting.numbers.look_up", lambda *_: seen)
        folder = with_numbers(
            trained / "best.pt",
            tmp_path / "run",
            evaluation(1, failed=True, aa=101),
            evaluation(2, "test_200", aa=102),
            evaluation(2, "test_300", aa=103),
            evaluation(1, "test_linf-0.2", eps=0.2, aa=104),
        )
        record = record_of(None, RUN_ID, folder, "best", 1)
        counts = {one.scope: one.accuracies["aa"].count for one in record.evaluations}
        assert counts == {"test": 101, "test_100": 202, "test_200": 203, "test_linf-0.2": 104}
        assert record.failed == ("zero_gradients",)
        assert {
            k: json.loads(v)["accuracies"]["aa"]["count"] for k, v in record.texts.items()
        } == (counts)
        told = capsys.readouterr().err.splitlines()
        assert [line.split(" is of epoch ")[0].split("evaluation ")[1] for line in told] == [
            "test_200 beside the checkpoint",
            "test_300 beside the checkpoint",
            "test_300 in MLflow",
        ]

    def test_metrics_without_files_have_wilson_intervals(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metrics = {"test/pgd20": 0.5, "test/clean": 1.0, "test/images": 100.0, "test/fe": 7.0}
        seen = Seen({"checks": "FAILED: modes, range"}, {**metrics, "test_last/clean": 0.1}, {})
        monkeypatch.setattr("raytrain.exporting.numbers.look_up", lambda *_: seen)
        found = record_of(None, RUN_ID, trained, "best", 1).main
        assert found is not None and list(found.accuracies) == ["clean", "pgd20"]
        # Wilson 1927 with z = 1.96: (p + z^2/2n +- z sqrt(pq/n + z^2/4n^2)) / (1 + z^2/n)
        assert found.accuracies["pgd20"].low == pytest.approx(0.40383, abs=1e-5)
        assert found.accuracies["pgd20"].high == pytest.approx(0.59617, abs=1e-5)
        assert found.accuracies["clean"].high == pytest.approx(1.0)
        assert [one.check for one in found.failed] == ["modes", "range"]
        assert found.trusted is False and found.epoch is None

    def test_its_code_runs(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        export(trained, "out", formats=["safetensors", "onnx"])
        monkeypatch.chdir("out")
        codes = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
        assert len(codes) == 2
        for code in codes:
            assert len([line for line in code.splitlines() if line]) <= 6
            Path("code.py").write_text(code)
            runpy.run_path("code.py")
            assert re.fullmatch(r"(tensor\()?\[\d,? \d\]\)?\n", capsys.readouterr().out)

    def test_its_configuration_is_the_run_without_the_machine(
        self, trained: Path, coloured: Path, tmp_path: Path
    ) -> None:
        export(trained, "out", formats=["safetensors"])
        again = as_run("out/run.yaml")
        assert f"signature | `{again.signature()}`" in Path("out/README.md").read_text()
        assert again.signature() == as_run(trained / "run.yaml").signature()
        file = untrained(tmp_path / "run", data=str(coloured), model="small_cnn")
        export(file, "two", formats=["safetensors"])
        text = Path("two/run.yaml").read_text() + Path("two/README.md").read_text()
        assert str(tmp_path) not in text and str(coloured.parent) not in text
        assert "tracking_uri" not in text

    def test_attacks_are_told_apart_in_card_and_results(
        self, trained: Path, tmp_path: Path
    ) -> None:
        robust: dict[str, Any] = {"pgd20": 220, "pgd20-eps_8": 210, "cw50x5-eps_8": 200}
        numbers = evaluation(epoch_of(trained), **robust)
        export(
            with_numbers(trained / "best.pt", tmp_path / "run", numbers),
            "out",
            formats=["safetensors"],
        )
        text = Path("out/README.md").read_text()
        titles = ["clean images", "PGD-20", "PGD-20, step eps/8", "CW-50, 5 restarts, step eps/8"]
        assert all(f"| {title} | " in text for title in titles)
        (found,) = front(Path("out"))["model-index"][0]["results"]
        assert [one["name"] for one in found["metrics"]] == [
            "clean accuracy",
            *(f"accuracy under {title}, linf eps 0.1" for title in titles[1:]),
        ]


class TestCommand:
    """raytrain export."""

    def test_a_run_is_found_by_its_id_and_told_as_json(self, trained: Path) -> None:
        storage = str(trained.parent.parent)
        command = ["export", RUN_ID, "--storage", storage, "--format", "safetensors", "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert Path(told["folder"]) == Path("exports").resolve() / told["name"]
        assert told["formats"] == {"safetensors": {"difference": 0.0, "tolerance": 0.0}}
        assert told["epoch"] == epoch_of(trained)
        assert (Path(told["folder"]) / "model.safetensors").is_file()
        assert not Path("mlflow.db").exists()

    def test_it_says_what_was_checked_and_what_was_left_out(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hide(monkeypatch, *ONNX)
        result = CliRunner().invoke(app, ["export", str(trained), "--to", "out"])
        assert result.exit_code == 0, result.output
        assert "the same logits bit for bit on test images" in result.stdout
        assert "robustbench left out: RobustBench's networks take 3x32x32" in result.stdout
        assert "onnx        left out: onnx needs" in result.stdout
        assert "no test-set numbers" in result.stdout

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--format", "onx"], "no format is called 'onx'; .*nearest is onnx"),
            (["--format", ","], "expected some of safetensors"),
            (["--which", "first"], "--which: expected best or last, found first"),
            (["--license", "My own"], "--license: expected an identifier of the hub"),
            (["--to", "full"], "--to: full is not empty"),
            (["--to", "full/file"], "--to: full/file is not empty"),
        ],
    )
    def test_wrong_requests_are_one_sentence(
        self, words: list[str], message: str, trained: Path
    ) -> None:
        Path("full").mkdir()
        Path("full/file").write_text("")
        command = [
            "export",
            str(trained),
            *(words if "--to" in words else ["--to", "out", *words]),
        ]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert re.search(message, line) and not Path("out").exists()
        assert [path.name for path in Path("full").iterdir()] == ["file"]

    def test_a_checkpoint_that_is_not_there_is_refused(self, trained: Path) -> None:
        with pytest.raises(RequestError, match="nowhere: neither a checkpoint nor a run"):
            export("nowhere", "out")
        with pytest.raises(RequestError, match="--which: .* has no last.pt"):
            alone = with_numbers(trained / "best.pt", Path("alone"))
            export(alone, "out", which="last")

    def test_an_empty_folder_is_taken(self, trained: Path) -> None:
        Path("out").mkdir()
        result: ExportResult = export(trained, "out", formats=["safetensors"])
        assert result.folder == Path("out").resolve() and any(Path("out").iterdir())


@pytest.mark.slow
def test_mlflow_tells_numbers_commit_and_hardware(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    client = MlflowClient(uri)
    experiment = client.create_experiment("raytrain", (tmp_path / "mlruns").as_uri())
    tags = {"git_commit": "c0ffee", "git_dirty": "true", "hardware": "3x H", "torch_version": "9"}
    run_id = client.create_run(experiment, tags=tags).info.run_id
    numbers = evaluation(epoch_of(trained), aa=190)
    client.log_text(run_id, json.dumps(numbers), "evaluation/test/evaluation.json")
    client.log_text(run_id, "", "evaluation/test/flags.parquet")
    (tmp_path / "copies").mkdir()
    folder = tmp_path / "copies" / run_id
    with_numbers(trained / "best.pt", folder, evaluation(99, aa=1))
    write_run_file(as_run(trained / "run.yaml"), folder)
    result = export(folder, "out", formats=["safetensors"], tracking_uri=uri)
    text = Path("out/README.md").read_text()
    assert result.evaluated and "190 of 397" in text
    assert "| git commit | `c0ffee` with local changes |" in text
    assert "| hardware | 3x H |" in text and "torch 9" in text
    client.log_artifact(run_id, str(trained / "best.pt"), "checkpoints")
    client.log_artifact(run_id, str(trained / "run.yaml"))
    fetched = export(run_id, "two", formats=["safetensors"], tracking_uri=uri)
    assert fetched.evaluated
    assert fetched.name == result.name == client.get_run(run_id).info.run_name
    assert fetched.checkpoint.is_relative_to(tmp_path / "runs" / "fetched")
    assert look_up(uri, "f" * 32, "evaluation", "evaluation.json") is None
    assert look_up(f"sqlite:///{tmp_path}/none.db", run_id, "evaluation", "x") is None
    assert not (tmp_path / "none.db").exists()
