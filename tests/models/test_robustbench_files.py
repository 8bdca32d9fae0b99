"""Files of RobustBench are recognised by names and shapes, and become fields of the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrain.config.request import as_run
from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec, robustbench_state_dict

NAMES = ["resnet18", "preact_resnet18", "wideresnet-16-2", "wideresnet-10-1"]
NAMES += ["wideresnet-16-2-silu", "wideresnet-10-1-silu"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def network(
    name: str = "wideresnet-10-1-silu", classes: int = 10, channels: int = 3
) -> Classifier:
    torch.manual_seed(0)
    return ModelSpec(name=name).build(channels, 32, classes, [0.0] * channels, [1.0] * channels)


def statistics(mean: str = "mean", std: str = "std") -> dict[str, Tensor]:
    return {mean: torch.tensor(MEAN).view(3, 1, 1), std: torch.tensor(STD).view(3, 1, 1)}


def written(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "theirs.pt")
    return folder / "theirs.pt"


def model_of(path: Path | str, *words: str) -> ModelSpec:
    return as_run(None, ["data=cifar10", f"model=robustbench:{path}", *words]).model


@pytest.mark.parametrize("name", NAMES)
def test_the_network_of_a_file_is_recognised(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, robustbench_state_dict(network(name)))
    found = model_of(path)
    assert found == ModelSpec(name=name, normalise=False, weights=path)
    assert (
        ModelSpec(name=f"robustbench:{path}")
        == ModelSpec.model_validate(found.model_dump())
        == found
    )


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize(
    "names", [("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std")]
)
def test_prefixes_wrappings_and_statistics_of_all_kinds(
    prefix: str, wrapped: str | None, names: tuple[str, str], tmp_path: Path
) -> None:
    source = network()
    state = robustbench_state_dict(source) | statistics(*names)
    state = {prefix + key: value for key, value in state.items()}
    path = written(tmp_path, state if wrapped is None else {wrapped: state, "epoch": 3})
    found = model_of(path)
    assert (found.normalise, found.mean, found.std) == (True, MEAN, STD)
    target = found.build(3, 32, 10, [0.0] * 3, [1.0] * 3)
    found.load_weights(target, 3, 10)
    wanted = source.backbone.state_dict()
    assert all(
        torch.equal(value, wanted[key]) for key, value in target.backbone.state_dict().items()
    )
    assert torch.equal(target.normalise.mean.flatten(), torch.tensor(MEAN))


def test_the_recorded_configuration_does_not_depend_on_the_file(tmp_path: Path) -> None:
    run = as_run(
        None, [f"model=robustbench:{written(tmp_path, robustbench_state_dict(network()))}"]
    )
    (tmp_path / "theirs.pt").unlink()
    assert as_run(run.model_dump(mode="json")) == run
    assert run.computed()["model"]["weights"] == str(tmp_path / "theirs.pt")
    assert "mean" not in run.computed()["model"]


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, robustbench_state_dict(network()))
    monkeypatch.chdir(tmp_path)
    assert model_of("theirs.pt").weights == path
    assert ModelSpec(name="resnet18", weights=Path("theirs.pt")).weights == path


def test_another_file_of_the_same_name_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path, robustbench_state_dict(network("wideresnet-10-1")))
    assert model_of(path).name == "wideresnet-10-1"
    written(tmp_path, robustbench_state_dict(network("wideresnet-16-2")))
    assert model_of(path).name == "wideresnet-16-2"


def test_statistics_of_ones_own_go_with_a_file_without_any(tmp_path: Path) -> None:
    path = written(tmp_path, robustbench_state_dict(network()))
    found = model_of(path, "model.mean=[0.5, 0.5, 0.5]", "model.std=[1, 1, 1]")
    assert (found.normalise, found.mean) == (True, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "theirs.pt holds no state dict; expected names and dense, real tensors"),
        ({0: torch.ones(1)}, "holds no state dict"),
        pytest.param(
            {"conv1.weight": torch.eye(2).to_sparse()},
            "holds no state dict",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        ({"conv1.weight": torch.ones(2, dtype=torch.complex64)}, "holds no state dict"),
        (
            {
                "conv1.weight": torch.ones(1, 1),
                "fc.weight": torch.ones(1, 1),
                "block1.layer.0.conv1.weight": torch.tensor(1.0),
            },
            "is of an unknown network",
        ),
        ({"std": torch.ones(3)}, "has std; expected one mean and one std, or neither"),
        (
            {"mean": torch.ones(3), "mu": torch.zeros(3), "std": torch.ones(3)},
            "has mean, mu, std; expected one mean and one std",
        ),
        (
            {"mean": torch.zeros(3), "std": torch.zeros(3)},
            "has std .0.0, 0.0, 0.0.; expected positive numbers",
        ),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "has names twice"),
        ({"state_dict": {"a": 1}}, "theirs.pt holds no state dict"),
        (
            {"a.weight": torch.ones(1)},
            "is of an unknown network .its first names: a.weight.; expected",
        ),
        (
            {"conv1.weight": torch.full((1,), torch.nan)},
            "numbers in conv1.weight that are not finite",
        ),
    ],
)
def test_other_files_get_a_sentence(content: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^model.name: .*{sentence}"):
        model_of(written(tmp_path, content))


def test_no_file_and_no_file_of_tensors_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="^model.name: no such file: .*none.pt; expected a check"
    ):
        model_of(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(RequestError, match="^model.name: .*text.pt is not a file of tensors"):
        model_of(tmp_path / "text.pt")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.mean=[0, 0, 0]", "model.std=[1, 1, 1]"], r"^model.mean: theirs.pt has \(0.49"),
        (["model.normalise=false"], "^model.normalise: theirs.pt has True, found False"),
        (["model.weights=other.pt"], "^model.weights: theirs.pt has .*, found .*other.pt"),
        (["model.mean=[0, 0, 0]"], r"^model.mean: theirs.pt has \(0.49"),
    ],
)
def test_fields_that_contradict_the_file_are_refused(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path, robustbench_state_dict(network()) | statistics())
    with pytest.raises(RequestError, match=sentence):
        model_of(path, *words)


@pytest.mark.parametrize(
    ("spec", "images", "sentence"),
    [
        (
            {},
            (3, 100),
            "is of wideresnet-10-1-silu for 10 classes and 3 channels; .* 100 classes and 3",
        ),
        ({}, (1, 10), "is of .* 3 channels; expected .* 10 classes and 1 channels"),
        ({"name": "wideresnet-16-1-silu"}, (3, 10), "; expected weights of wideresnet-16-1-silu"),
        (
            {"mean": None, "std": None},
            (3, 10),
            "has the normaliser mean .*; expected the same in model",
        ),
        ({"normalise": False, "mean": None, "std": None}, (3, 10), "has the normaliser mean"),
    ],
)
def test_a_file_that_does_not_fit_the_network_changes_nothing(
    spec: dict[str, Any], images: tuple[int, int], sentence: str, tmp_path: Path
) -> None:
    path = written(tmp_path, robustbench_state_dict(network()) | statistics())
    model = ModelSpec.model_validate(model_of(path).model_dump() | spec)
    channels, classes = images
    if channels == 1:
        model = model.model_copy(update={"mean": None, "std": None})
    built = model.build(channels, 32, classes, [0.0] * channels, [1.0] * channels)
    before = {key: value.clone() for key, value in built.state_dict().items()}
    with pytest.raises(RequestError, match=f"^model.weights: .*{sentence}"):
        model.load_weights(built, channels, classes)
    assert all(torch.equal(value, before[key]) for key, value in built.state_dict().items())


@pytest.mark.parametrize("words", [["model.mean=[0.5]"], ["model.std=[0.5]"]])
def test_mean_and_std_go_together(words: list[str]) -> None:
    with pytest.raises(RequestError, match="^model.mean: expected together with std, or neither$"):
        as_run(None, words)


def test_statistics_that_are_not_applied_are_refused() -> None:
    words = ["model.mean=[0.5]", "model.std=[0.5]", "model.normalise=false"]
    with pytest.raises(
        RequestError, match="^model.mean: not applied with normalise=false; expected"
    ):
        as_run(None, words)


def test_a_normaliser_for_other_channels_is_refused() -> None:
    spec = ModelSpec(name="small_cnn", mean=(0.5,), std=(0.5,))
    with pytest.raises(
        RequestError, match="^model.mean: expected a number for each of 3 channels"
    ):
        spec.build(3, 8, 10, [0.0] * 3, [1.0] * 3)
