"""Names of networks: what they build, and the sentence a wrong one gets."""

import subprocess
import sys

import pytest
import torch
from pydantic import BaseModel, ValidationError

from raytrain.core.errors import RequestError
from raytrain.models import MODELS, Classifier, ModelSpec


def build(name: str, channels: int = 3, size: int = 8) -> Classifier:
    return ModelSpec(name=name).build(channels, size, 10, [0.5] * channels, [0.25] * channels)


def backbone(model: Classifier) -> str:
    return f"{type(model.backbone).__module__}.{type(model.backbone).__name__}"


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [
        (1, 8, "raytrain.models.small_cnn.SmallCNN"),
        (1, 28, "raytrain.models.small_cnn.SmallCNN"),
        (3, 32, "raytrain.models.resnet.ResNet18"),
        (3, 64, "torchvision.models.resnet.ResNet"),
    ],
)
def test_auto_follows_the_size_of_the_images(channels: int, size: int, expected: str) -> None:
    with torch.device("meta"):
        assert backbone(build("auto", channels, size)) == expected


def test_catalogue_names_build() -> None:
    plain = [name for name in MODELS if name.isidentifier()]
    assert {"auto", "small_cnn", "small_cnn_nobn", "resnet18", "preact_resnet18"} == {*plain}
    with torch.device("meta"):
        assert all(
            isinstance(build(name), Classifier)
            for name in [*plain, "wideresnet-10-1", "wideresnet-10-1-silu"]
        )


def test_a_string_stands_for_the_record() -> None:
    class Run(BaseModel):
        model: ModelSpec

    assert Run.model_validate({"model": "resnet18"}).model == ModelSpec(name="resnet18")
    with pytest.raises(ValidationError, match="depth"):
        ModelSpec.model_validate({"name": "resnet18", "depth": 18})


@pytest.mark.slow
def test_torchvision_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from raytrain.models import ModelSpec; "
        "ModelSpec(name='small_cnn').build(1, 8, 10, [0.0], [1.0]); "
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_prefix_tells_torchvisions_resnet18_from_ours() -> None:
    with torch.device("meta"):
        assert backbone(build("torchvision:resnet18", size=64)).startswith("torchvision.")
        assert backbone(build("resnet18", size=64)).startswith("raytrain.")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet_18", "resnet18"),
        ("preact-resnet18", "preact_resnet18"),
        ("wideresnet-28", "wideresnet-28-10"),
        ("wideresnet-28-10-swish", "wideresnet-28-10-silu"),
        ("mnasnet0-5", "mnasnet0_5"),
        ("torchvision:mnasnet05", "torchvision:mnasnet0_5"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(name: str, nearest: str) -> None:
    sentence = f"^model.name: no model is called '{name}'; the nearest is {nearest}$"
    with pytest.raises(RequestError, match=sentence):
        build(name)


@pytest.mark.parametrize(
    "name", ["wideresnet-27-10", "wideresnet-4-10", "wideresnet-28-0", "wideresnet-27-10-silu"]
)
def test_a_wide_resnet_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"^model.name: {name} does not exist: .*16, 22, 28"):
        build(name)


def test_networks_of_the_package_take_no_kwargs() -> None:
    with pytest.raises(
        RequestError, match=r"^model.kwargs: small_cnn takes none, but \['depth'\]"
    ):
        ModelSpec(name="small_cnn", kwargs={"depth": 3}).build(1, 8, 10, [0.5], [0.25])
