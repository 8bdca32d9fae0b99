"""Weights go to RobustBench and come back; what does not fit changes nothing."""

import pytest
import torch
from torch import Tensor

from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec, load_robustbench, robustbench_state_dict

KEYS = {
    "resnet18": {
        "conv1.weight": (64, 3, 3, 3),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer1.0.bn1.weight": (64,),
        "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.conv1.weight": (128, 64, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "layer2.0.shortcut.1.running_var": (128,),
        "layer4.1.bn2.num_batches_tracked": (),
        "linear.weight": (10, 512),
        "linear.bias": (10,),
    },
    "preact_resnet18": {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.bn1.weight": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.bn1.weight": (64,),
        "layer2.0.bn2.weight": (128,),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
        "bn.weight": (512,),
        "bn.running_var": (512,),
        "linear.weight": (10, 512),
    },
    "wideresnet-28-10": {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.conv1.weight": (160, 16, 3, 3),
        "block1.layer.0.bn2.weight": (160,),
        "block1.layer.0.conv2.weight": (160, 160, 3, 3),
        "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
        "block2.layer.3.conv1.weight": (320, 320, 3, 3),
        "block3.layer.0.convShortcut.weight": (640, 320, 1, 1),
        "bn1.weight": (640,),
        "fc.weight": (10, 640),
        "fc.bias": (10,),
    },
}
NUM_KEYS = {"resnet18": 122, "preact_resnet18": 107, "wideresnet-28-10": 155}
ABSENT = {
    "resnet18": "layer1.0.shortcut.0.weight",
    "preact_resnet18": "layer2.0.shortcut.1.weight",
    "wideresnet-28-10": "block1.layer.1.convShortcut.weight",
}


def small(name: str = "wideresnet-10-1", seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return ModelSpec(name=name).build(3, 16, 10, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", KEYS)
def test_keys_and_shapes_are_those_of_robustbench(name: str) -> None:
    with torch.device("meta"):
        model = ModelSpec(name=name).build(3, 32, 10, [0.0] * 3, [1.0] * 3)
    shapes = {key: tuple(value.shape) for key, value in robustbench_state_dict(model).items()}
    assert KEYS[name].items() <= shapes.items()
    assert len(shapes) == NUM_KEYS[name]
    assert ABSENT[name] not in shapes


def test_wide_resnet_of_one_block_has_exactly_these_keys() -> None:
    norms = {f"{b}.layer.0.{n}" for b in ("block1", "block2", "block3") for n in ("bn1", "bn2")}
    convs = {
        f"{b}.layer.0.{c}" for b in ("block1", "block2", "block3") for c in ("conv1", "conv2")
    }
    # Width 1 keeps 16 channels in the first stage, so that only the others change the width.
    convs |= {"conv1", "block2.layer.0.convShortcut", "block3.layer.0.convShortcut"}
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{norm}.{field}" for norm in norms | {"bn1"} for field in of_norm}
    expected |= {f"{conv}.weight" for conv in convs} | {"fc.weight", "fc.bias"}
    assert robustbench_state_dict(small()).keys() == expected


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_state_dict_goes_out_and_comes_back(prefix: str) -> None:
    source, target = small(seed=1), small(seed=2)
    state = robustbench_state_dict(source)
    load_robustbench(target, {prefix + key: value for key, value in state.items()})
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(("mean", "std"), [("mu", "sigma"), ("normalize.mean", "normalize.std")])
def test_statistics_in_the_state_replace_the_normaliser(mean: str, std: str) -> None:
    model = small()
    mu, sigma = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    statistics = {mean: mu.view(1, 3, 1, 1), std: sigma.view(1, 3, 1, 1)}
    load_robustbench(model, robustbench_state_dict(small()) | statistics)
    assert torch.equal(model.normalise.mean.flatten(), mu)
    assert torch.equal(model.normalise.std.flatten(), sigma)


def test_unused_layers_and_missing_counters_of_old_checkpoints_do_not_matter() -> None:
    source, target = small(seed=1), small(seed=2)
    state = robustbench_state_dict(source)
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    load_robustbench(target, old | {"sub_block1.layer.0.bn1.weight": torch.ones(16)})
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn1.weight": None}, "does not fit WideResNet: it lacks bn1.weight$"),
        ({"extra.weight": torch.ones(1)}, "WideResNet, which has no extra.weight$"),
        ({"fc.bias": torch.ones(100)}, r"fc.bias has shape \(100,\), not \(10,\)$"),
        ({"mu": torch.ones(1)}, r"normalise.mean has shape \(1, 1, 1\), not \(3, 1, 1\)$"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    change: dict[str, Tensor | None], message: str
) -> None:
    model = small(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = robustbench_state_dict(small(seed=2)) | change
    with pytest.raises(RequestError, match=message):
        load_robustbench(model, {k: v for k, v in state.items() if v is not None})
    assert same(model.state_dict(), before)
