"""The model card: threat model, numbers with intervals, what made them, how to load the files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from raytrain.core.cost import Meter
from raytrain.evaluation.names import attack_title
from raytrain.evaluation.record import EvaluationRecord
from raytrain.exporting import robustbench
from raytrain.exporting.card_metadata import front_matter
from raytrain.exporting.check import Checked
from raytrain.exporting.robustbench import eps_text
from raytrain.exporting.subject import Subject

_FILES = {
    "safetensors": ("model.safetensors", "weights, with what builds their network as metadata"),
    "robustbench": ("robustbench/", "weights and claim under RobustBench's names"),
    "onnx": ("model.onnx", "the graph: `images` (n, c, h, w) in [0, 1] to `logits`"),
}
_MEANS = {
    "linf": "change every pixel by at most {eps}",
    "l2": "change the image by at most {eps} in Euclidean length",
    "l1": "change the image by at most {eps} in the sum of absolute changes",
}


def card(subject: Subject, checked: Mapping[str, Checked], licence: str) -> str:
    """README.md of the folder."""
    sections = [
        front_matter(subject, checked, licence),
        _title(subject),
        _threat(subject),
        _numbers(subject),
        _loading(subject, checked),
        _files(checked),
        _making(subject),
        _limits(subject),
    ]
    return "\n".join(sections)


def _title(subject: Subject) -> str:
    run, source = subject.run, subject.source
    parameters = sum(p.numel() for p in subject.model.parameters())
    known = run.algorithm.card
    return f"""\
# {subject.name}

{type(subject.model.backbone).__name__} (`{run.model.name}`, {parameters:,} parameters), trained by
raytrain on {subject.data}.
It sees images of {source.channels}x{source.size}x{source.size} pixels and distinguishes
{len(source.classes)} classes apart: {", ".join(source.classes)}.

- Algorithm: `{run.algorithm.name}`: {known.rule} ({known.paper})
- Update of the weights: `{run.outer.name}`
"""


def _threat(subject: Subject) -> str:
    norm, eps = subject.run.threat.norm, subject.run.threat.eps
    radius = eps_text(norm, eps)
    number = radius if "/" not in radius else f"{radius} ({eps:.5f})"
    main = subject.record.main
    recorded = ""
    if main is not None and main.contract is not None and main.contract.text:
        recorded = f"\nAs recorded: `{main.contract.text}`, contract `{main.contract.hash}`.\n"
    return f"""\
## Threat model

The attacker has the network and may {_MEANS[norm].format(eps=number)}; pixels are numbers in
[0, 1] and stay there. The normaliser is inside the network: give it pixels in [0, 1], not
normalised ones. BatchNorm uses its running statistics.

| norm | eps | pixels | normaliser | BatchNorm |
|---|---|---|---|---|
| {norm} | {radius} | [0, 1] | inside | eval |
{recorded}"""


def _numbers(subject: Subject) -> str:
    found = [_evaluation(subject, one) for one in subject.record.evaluations]
    if subject.record.main is None:
        found.insert(
            0,
            "**Not evaluated** on the test set under the threat model of training; `raytrain evaluate` "
            "does that.\n",
        )
    return "## Numbers\n\n" + "\n".join(found)


def _evaluation(subject: Subject, found: EvaluationRecord) -> str:
    rows = [
        f"| {attack_title(name)} | {got.value:.2%} | {got.low:.2%} to {got.high:.2%} "
        f"| {got.count} of {got.images} |"
        for name, got in found.accuracies.items()
    ]
    lines = [
        _warning(found),
        _measured_under(found),
        "| attack | accuracy | 95 % interval | images |",
    ]
    lines += ["|---|---|---|---|", *rows, "", _footing(subject, found)]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _warning(found: EvaluationRecord) -> str | None:
    if not found.failed:
        return None
    listed = "\n".join(f"> - `{one.check}`: {one.sentence}" for one in found.failed)
    return (
        "> **WARNING: CHECKS FAILED. Do not believe the numbers under attack below;** what looks "
        f"like robustness may be an attack that did not work.\n>\n{listed}\n"
    )


def _measured_under(found: EvaluationRecord) -> str | None:
    if found.same_contract or found.contract is None:
        return None
    contract = found.contract
    radius = eps_text(contract.norm, contract.eps)
    return f"Under **another** threat model, {contract.norm} eps {radius}:\n"


def _footing(subject: Subject, found: EvaluationRecord) -> str:
    words = ["Wilson intervals: the chance of these test images, not of another training."]
    if found.images < subject.num_test:
        words.append(f"Only {found.images} of {subject.num_test} test images were used.")
    if "aa" not in found.accuracies:
        words.append("**AutoAttack was not run**: weaker attacks overstate robustness.")
    if found.trusted:
        passed = ", ".join(f"`{one.check}`" for one in found.findings)
        words.append(f"Checks passed{': ' if passed else ''}{passed}.")
    elif found.trusted is None:
        words.append("Whether the attacks worked was not checked.")
    if found.epoch is None:
        words.append(
            "Read from the run's metrics, which do not record the epoch of the checkpoint."
        )
    if found.hardware:
        words.append(f"Measured on {found.hardware}.")
    return " ".join(words)


def _loading(subject: Subject, checked: Mapping[str, Checked]) -> str:
    shape = f"{subject.source.channels}, {subject.source.size}, {subject.source.size}"
    pieces = []
    if "safetensors" in checked:
        pieces.append(
            f"""\
import torch
import raytrain

model = raytrain.load_exported(".")  # this folder
images = torch.rand(2, {shape})  # yours, in [0, 1]
print(model(images).argmax(1))"""
        )
    if "onnx" in checked:
        pieces.append(
            f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = np.random.rand(2, {shape}).astype(np.float32)  # yours, in [0, 1]
print(session.run(["logits"], {{"images": images}})[0].argmax(1))"""
        )
    codes = "\n\n".join(f"```python\n{piece}\n```" for piece in pieces)
    theirs = f"`{robustbench.FOLDER}/README.md` describes how RobustBench loads it.\n"
    own = ":" in subject.run.model.name and not subject.run.model.name.startswith("torchvision:")
    needs = f"`{subject.run.model.name}` must be importable for `load_exported`.\n" if own else ""
    parts = [codes, theirs if "robustbench" in checked else "", needs]
    return "## Loading\n\n" + "\n\n".join(text for text in parts if text).rstrip() + "\n"


def _files(checked: Mapping[str, Checked]) -> str:
    rows = [
        f"| `{_FILES[name][0]}` | {_FILES[name][1]} | {how.sentence()} |"
        for name, how in checked.items()
    ]
    rows.append("| `run.yaml` | the configuration | |")
    return (
        "## Files\n\n| file | what | checked when written |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _making(subject: Subject) -> str:
    run, saved, tags = subject.run, subject.saved, subject.record.tags
    meter = Meter(**saved.content["meter"])
    seconds = saved.content["counters"]["seconds"]
    commit = tags.get("git_commit", "")
    dirty = " with local changes" if tags.get("git_dirty") else ""
    versions = [
        f"{name} {tags[key]}"
        for name, key in (("raytrain", "raytrain_version"), ("torch", "torch_version"))
        if key in tags
    ]
    versions += [f"ray {tags['ray_version']}"] if "ray_version" in tags else []
    versions += [f"Python {tags['python']}"] if "python" in tags else []
    averaged = f", averaged over training (ema {run.ema:g})" if run.ema is not None else ""
    wide = ", exported as fp32" if run.precision != "fp32" else ""
    rows = {
        "command": "`raytrain train run.yaml`",
        "data": _data(subject),
        "seed": str(run.seed),
        "weights": f"after epoch {saved.epoch}{averaged}; trained in {run.precision}{wide}",
        "cost until then": f"{meter.fe:,} forward-equivalents, {meter.samples:,} samples, "
        f"{seconds:,.1f} seconds",
        "signature": f"`{run.signature()}`",
        "run in MLflow": f"`{subject.run_id}`" if subject.run_id else "none",
        "hardware": tags.get("hardware", "not recorded"),
        "versions": ", ".join(versions) or "not recorded",
        "git commit": f"`{commit}`{dirty}" if commit else "not recorded",
        "exported by": f"raytrain {version('raytrain')}, torch {version('torch')}",
    }
    return (
        "## How it was made\n\n| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {text} |" for name, text in rows.items())
        + "\n"
    )


def _data(subject: Subject) -> str:
    spec = subject.run.data
    held = f"{spec.validation:g} of the training images held back to choose by"
    few = f", {spec.train_size} used" if spec.train_size is not None else ""
    return f"{subject.data}, {held}{few}; the test set was not seen in training"


def _limits(subject: Subject) -> str:
    return f"""\
## Limits

Robust here means: against the threat model above, as far as the attacks in the table went. Nothing is
said of other norms or larger radii, of changes of light, weather or camera, or of images unlike those
of {subject.data}. The numbers are of one training with one seed.
"""
