"""Weights and claim in RobustBench's layout (Croce et al. 2021, arXiv 2010.09670).

Its zoo reads `models/DATA/THREAT/NAME.pt`, a state dict without prefix; a network with a
normaliser has the buffers `mu` and `sigma` of shape (1, 3, 1, 1) and a class that applies them, or is
a DMWideResNet, which has `mean` and `std` of shape (3, 1, 1). Its leaderboard is made of
`model_info/DATA/THREAT/NAME.json`, a claim each.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrain.core.errors import RequestError
from raytrain.data.catalogue import SOURCES
from raytrain.evaluation.names import attack_title
from raytrain.evaluation.record import EvaluationRecord
from raytrain.exporting.check import Checked, same_logits
from raytrain.exporting.numbers import Record
from raytrain.exporting.subject import Subject
from raytrain.models import load_robustbench, robustbench_state_dict
from raytrain.models.classifier import Normalise
from raytrain.models.preact_resnet import PreActResNet18
from raytrain.models.resnet import ResNet18
from raytrain.models.silu_wide_resnet import SiluWideResNet
from raytrain.models.wide_resnet import WideResNet

FOLDER = "robustbench"
LEADERBOARDS = ("cifar10", "cifar100")  # that networks of 32 pixels can stand on

_THREATS = {"linf": "Linf", "l2": "L2"}
_SIZE = 32  # its networks end with a pooling of fixed size


@dataclass(frozen=True)
class Namesake:
    """A network of RobustBench with the same arithmetic and parameter names."""

    architecture: str  # as its leaderboard writes it
    names: str  # what to import from module `robustbench.model_zoo.architectures.<module>`
    module: str
    base: str
    arguments: str
    normalises: bool = False  # in its class, by buffers `mean` and `std` of shape (3, 1, 1)

    @property
    def statistics(self) -> tuple[str, str]:
        """The names of its buffers of mean and standard deviation."""
        return ("mean", "std") if self.normalises else ("mu", "sigma")

    def buffers(self, normalise: Normalise) -> dict[str, Tensor]:
        """The normaliser, as its state dict has it."""
        values = normalise.mean, normalise.std
        return {
            name: value if self.normalises else value[None]
            for name, value in zip(self.statistics, values, strict=True)
        }

    def definition(self, classes: int) -> str:
        """Python that makes `Net`, the network with its normaliser inside."""
        if self.normalises:
            return f"""\
import torch
from robustbench.model_zoo.architectures.{self.module} import {self.names}


class Net({self.base}):  # images in [0, 1]; mean and std are in its state dict
    def __init__(self):
        super().__init__({self.arguments}num_classes={classes})
"""
        return f"""\
import torch
from robustbench.model_zoo.architectures.{self.module} import {self.names}


class Net({self.base}):
    def __init__(self):
        super().__init__({self.arguments}num_classes={classes})
        self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
        self.register_buffer("sigma", torch.ones(1, 3, 1, 1))

    def forward(self, x):  # images in [0, 1]
        return super().forward((x - self.mu) / self.sigma)
"""


def namesake(subject: Subject) -> Namesake:
    """RobustBench's network for these weights.

    Raises:
        RequestError: if it has none, or no such threat model.
    """
    threat, source, backbone = subject.run.threat, subject.source, subject.model.backbone
    if threat.norm not in _THREATS:
        raise RequestError(f"--format: RobustBench has no {threat.norm} threat model")
    if (source.channels, source.size) != (3, _SIZE):
        raise RequestError(
            f"--format: RobustBench's networks take 3x{_SIZE}x{_SIZE} images, these are "
            f"{source.channels}x{source.size}x{source.size}"
        )
    blocks = "[2, 2, 2, 2], "
    if isinstance(backbone, ResNet18):
        return Namesake(
            "ResNet-18", "BasicBlock, ResNet", "resnet", "ResNet", f"BasicBlock, {blocks}"
        )
    if isinstance(backbone, PreActResNet18):
        arguments = f"PreActBlockV2, {blocks}bn_before_fc=True, "
        names = "PreActBlockV2, PreActResNet"
        return Namesake("PreActResNet-18", names, "resnet", "PreActResNet", arguments)
    match = re.fullmatch(r"wideresnet-(\d+)-(\d+)", subject.run.model.name)
    if isinstance(backbone, WideResNet) and match is not None:
        depth, width = match.groups()
        arguments = f"depth={depth}, widen_factor={width}, "
        names = f"WideResNet-{depth}-{width}"
        return Namesake(names, "WideResNet", "wide_resnet", "WideResNet", arguments)
    silu = re.fullmatch(r"wideresnet-(\d+)-(\d+)-silu", subject.run.model.name)
    if isinstance(backbone, SiluWideResNet) and silu is not None:
        depth, width = silu.groups()
        arguments = f"depth={depth}, width={width}, activation_fn=Swish, "
        names, base = "DMWideResNet, Swish", "DMWideResNet"
        name = f"WideResNet-{depth}-{width}"
        return Namesake(name, names, "dm_wide_resnet", base, arguments, normalises=True)
    raise RequestError(
        f"--format: RobustBench has no namesake of {subject.run.model.name}; expected resnet18, "
        "preact_resnet18 or a wideresnet"
    )


def write_robustbench(subject: Subject, folder: Path) -> Checked:
    """State dict, claim, and how they load there; read back and compared bit for bit.

    Compared through RobustBench's names with raytrain's network: the package itself is not needed.
    """
    same = namesake(subject)
    place = Path(subject.data) / _THREATS[subject.run.threat.norm]
    weights = folder / FOLDER / "models" / place / f"{subject.name}.pt"
    claim = folder / FOLDER / "model_info" / place / f"{subject.name}.json"
    for file in (weights, claim):
        file.parent.mkdir(parents=True)
    statistics = same.buffers(subject.model.normalise)
    torch.save({**robustbench_state_dict(subject.model), **statistics}, weights)
    claim.write_text(json.dumps(claim_of(subject, same), indent=2) + "\n")
    text = _instructions(subject, same, weights.relative_to(folder / FOLDER))
    (folder / FOLDER / "README.md").write_text(text)
    back = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()  # so that nothing is right by chance
    load_robustbench(back, torch.load(weights, weights_only=True))
    return same_logits(weights, subject.model, back, subject.images)


def claim_of(subject: Subject, same: Namesake) -> dict[str, Any]:
    """The fields of a claim; unknown ones are empty. Accuracies are percentages.

    `reported` is the least accuracy that `raytrain evaluate` found under any attack, `autoattack_acc`
    that under AutoAttack. `unreliable` if a check of any evaluation has failed, also of one under
    another threat model or on fewer images.
    """
    found = subject.record.main
    strongest = None if found is None else found.strongest
    known = subject.run.data.name in SOURCES
    claim = {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": False if known and subject.run.data.extra is None else "",
        "number_forward_passes": 1,
        "dataset": subject.data,
        "venue": "",
        "architecture": same.architecture,
        "eps": eps_text(subject.run.threat.norm, subject.run.threat.eps),
        "clean_acc": _percent(found, "clean"),
        "reported": _percent(found, strongest),
        "autoattack_acc": _percent(found, "aa"),
        "footnote": _footnote(subject.record, subject.num_test),
    }
    if subject.record.failed:
        return {**claim, "unreliable": True}
    return claim if found is None or found.trusted is None else {**claim, "unreliable": False}


def eps_text(norm: str, eps: float) -> str:
    """A radius as papers write it: `0.3` if that is all of it, else `8/255` for whole grey levels.

    Six digits are enough to know it: evaluations record no more.
    """
    levels, short = eps * 255, f"{eps:.3g}"
    if norm == "linf" and float(short) != eps and abs(levels - round(levels)) < 1e-5 * levels:
        return f"{round(levels)}/255"
    return f"{eps:.6g}"


def _percent(record: EvaluationRecord | None, attack: str | None) -> str:
    """An accuracy; empty where it was not measured."""
    share = None if record is None or attack is None else record.accuracies.get(attack)
    return "" if share is None else f"{100 * share.value:.2f}"


def _footnote(record: Record, num_test: int) -> str:
    words, found = [], record.main
    if found is not None and found.images < num_test:
        words.append(f"Measured on {found.images} of {num_test} test images.")
    strongest = None if found is None else found.strongest
    if strongest is not None and strongest != "aa":
        words.append(f"The reported accuracy is under {attack_title(strongest)}, not AutoAttack.")
    if record.failed:
        words.append(f"Failed checks: {', '.join(record.failed)}.")
    return " ".join(words)


def _instructions(subject: Subject, same: Namesake, weights: Path) -> str:
    data = subject.data
    mean, std = same.statistics
    board = "" if data in LEADERBOARDS else f"\nRobustBench has no leaderboard for {data}.\n"
    return f"""\
# {subject.name} for RobustBench

The weights have the parameter names of RobustBench's {same.architecture}; `{mean}` and `{std}` are the
mean and standard deviation of the normaliser, which belongs inside the network:

```python
{same.definition(len(subject.source.classes))}

net = Net().eval()
net.load_state_dict(torch.load("{weights.as_posix()}", weights_only=True))
```

For its model zoo, `Net` goes to `robustbench/model_zoo/`, and `model_info/` beside its own. In the
claim, `link`, `name`, `authors` and `venue` are for you to fill in; numbers that were not measured
are empty. `autoattack_acc` is under pyautoattack's attacks (the authors' loops), which raytrain
runs one after the other; FAB's loop and projection, and Square's loop in l-inf, are rewritten.
{board}"""
