"""Weights as SafeTensors: every tensor under its own name, and the facts as metadata."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from raytrain.core.errors import RequestError
from raytrain.exporting.check import Checked, same_logits
from raytrain.exporting.subject import Facts, Subject
from raytrain.models import Classifier, ModelSpec

FILE = "model.safetensors"
_KEY = "raytrain"  # of the metadata that holds the facts as JSON


def write_tensors(subject: Subject, folder: Path) -> Checked:
    """`model.safetensors`, read back and compared bit for bit."""
    from safetensors.torch import save

    # Copies: the format refuses tensors that share memory, as tied weights do.
    state = {key: value.contiguous().clone() for key, value in subject.model.state_dict().items()}
    metadata = {"format": "pt", _KEY: subject.facts().model_dump_json()}
    (folder / FILE).write_bytes(save(state, metadata=metadata))
    return same_logits(folder / FILE, subject.model, load_exported(folder), subject.images)


def load_exported(path: str | Path) -> Classifier:
    """The network of an exported folder (or of its model.safetensors), in eval mode on the CPU.

    From images (n, channels, size, size) in [0, 1] to logits (n, classes); the data set is not
    needed. A `module:function` network needs that module on Python's path.

    Raises:
        RequestError: if there is none, or it was not exported by raytrain.

    >>> load_exported("no-such-folder")
    Traceback (most recent call last):
    raytrain.core.errors.RequestError: no-such-folder: no such file; expected a folder that ...
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    facts, state = _read(file)
    channels = facts.channels
    model = ModelSpec.model_validate(facts.model).build(
        channels, facts.size, len(facts.classes), [0.0] * channels, [1.0] * channels
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RequestError(
            f"{file}: its weights do not fit {facts.model['name']} as it is built here "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error
    return model.eval()


def _read(file: Path) -> tuple[Facts, dict]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise RequestError(f"{file}: no such file; expected a folder that `raytrain export` made")
    try:
        with safe_open(file, framework="pt") as content:
            facts = Facts.model_validate_json((content.metadata() or {})[_KEY])
            return facts, {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValidationError) as error:
        raise RequestError(f"{file}: not a file of weights that raytrain exported") from error
