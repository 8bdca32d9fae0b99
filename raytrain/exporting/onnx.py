"""The network as an ONNX graph: input `images` (n, c, h, w) in [0, 1], output `logits` (n, classes)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.exporting.check import Checked, same_logits
from raytrain.exporting.subject import Subject

FILE = "model.onnx"
OPSET = 18
TOLERANCE = 1e-4
"""Sums in another order: single precision keeps about 1e-7 per sum, deep networks have many."""

_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Refuse where a package is missing.

    Raises:
        RequestError: naming it and the extra that brings it.
    """
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        raise RequestError(
            f"--format: onnx needs {', '.join(missing)}; `pip install 'raytrain[onnx]'` brings it"
        )


def write_onnx(subject: Subject, folder: Path) -> Checked:
    """`model.onnx`, run by onnxruntime and compared to `TOLERANCE`.

    Any batch size; the normaliser is inside; the facts are in the metadata.

    Raises:
        TrainingFailed: if the network cannot be traced.
    """
    check_packages()
    example = subject.images[:1].repeat(2, 1, 1, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.onnx.export(
                subject.model,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        program.model.metadata_props["raytrain"] = subject.facts().model_dump_json()
        program.save(str(folder / FILE), external_data=False)
    except OSError:
        raise
    except Exception as error:  # the exporter, the tracer and foreign code each have their own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingFailed(
            f"--format: {subject.run.model.name} cannot be made an ONNX graph ({line}); the other "
            "formats do without"
        ) from error
    theirs = _runner(folder / FILE)
    return same_logits(folder / FILE, subject.model, theirs, subject.images, TOLERANCE)


def _runner(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run
