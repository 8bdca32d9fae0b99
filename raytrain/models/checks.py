"""Checks of a network on a few random images before training, on a copy and without side effects."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy

from raytrain.core.errors import RequestError
from raytrain.core.network import Precision, autocast, copy_of, mode
from raytrain.core.user_code import seeded_generator, user_code_errors
from raytrain.models.classifier import Classifier


def initialised(model: Classifier, shape: tuple[int, int, int]) -> Classifier:
    """Move the network to torch's default device, in float32, and initialise lazy layers.

    Lazy layers (nn.LazyLinear) take their sizes from a forward pass in eval mode.
    """
    device = torch.get_default_device()
    with user_code_errors(model.name, f"cannot be moved to {device}"):
        model = model.to(device).float()
    if any(map(is_lazy, model.state_dict().values())):
        images = torch.zeros(2, *shape)
        with user_code_errors(model.name, "cannot be tried"), torch.no_grad(), mode(model, "eval"):
            model.answer(images)
    for name, value in model.backbone.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            _refuse(model, f"keeps {name}, which is no tensor; checkpoints hold tensors")
        if is_lazy(value):
            _refuse(model, f"leaves {name} without a size after a pass in evaluation mode")
        if isinstance(value, nn.Parameter) and value.is_complex():
            _refuse(model, f"has the complex weight {name}; expected real ones")
    return model


def check_network(
    model: Classifier,
    shape: tuple[int, int, int],
    classes: int,
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> None:
    """Check what training, attacks and evaluation need: logits in both modes, for any number of images,
    with finite gradients for pixels and, in training mode, weights.

    The passes run on a copy, and torch's generator on the CPU is restored.

    Raises:
        RequestError: naming `model.name`, what was expected, and file and line of an error.
    """
    with (
        seeded_generator(),
        warnings.catch_warnings(action="ignore"),
    ):  # training repeats the warnings
        twin, images = _copied(model, shape, device, precision)
        with user_code_errors(model.name, "cannot be read from a checkpoint of its own"):
            twin.load_state_dict(model.state_dict())
        _check_weights(twin)
        before = _weights(twin)
        _try(twin, images[:2], classes, training=True, precision=precision)
        _try(twin, images[:1], classes, training=False)
        _try(twin, images, classes, training=False)
        _check_same(twin, before)


def check_single_images(
    model: Classifier, shape: tuple[int, int, int], classes: int, workers: int
) -> None:
    """Check that the network can be trained on one image at a time.

    Raises:
        RequestError: naming `batch_size`, for example because BatchNorm has one value per channel.
    """
    with seeded_generator():
        twin, images = _copied(model, shape)
        try:
            _try(twin, images[:1], classes, training=True)
        except RequestError as error:
            raise RequestError(
                f"batch_size: {workers} is one image per worker; expected at least {2 * workers}, since "
                f"{str(error).removeprefix('model.name: ')}"
            ) from error.__cause__


def _copied(
    model: Classifier,
    shape: tuple[int, int, int],
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> tuple[Classifier, Tensor]:
    """Return a copy of the network on the device and in the precision of training, and three images."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    images = torch.rand(3, *shape).to(device or torch.get_default_device(), dtype)
    with user_code_errors(model.name, "cannot be copied, which averages and evaluation need"):
        return copy_of(model).to(images.device, dtype), images


def _try(
    model: Classifier,
    images: Tensor,
    classes: int,
    *,
    training: bool,
    precision: Precision = "fp32",
) -> None:
    """Run one forward and backward pass and check the results."""
    many = f"{len(images)} images" if len(images) > 1 else "1 image"
    when = f"for {many} in {'training' if training else 'evaluation'} mode"
    pixels = images.clone().requires_grad_(True)
    with user_code_errors(model.name, f"cannot be tried {when}"), torch.enable_grad():
        model.train(training)
        with autocast(images.device, precision) if precision == "bf16" else nullcontext():
            logits = model.answer(pixels)
        graph = torch.is_grad_enabled()
    _check_logits(model, logits, classes, images, precision, when)
    if not (graph and logits.requires_grad):
        _refuse(
            model, f"gives logits without a gradient {when}; expected no detach and no no_grad"
        )
    weights = _weights(model) if training else {}
    learning = {name: weight for name, weight in weights.items() if weight.requires_grad}
    with user_code_errors(model.name, f"cannot be differentiated {when}"), torch.enable_grad():
        labels = torch.zeros(len(images), dtype=torch.long, device=logits.device)
        points = [pixels, *learning.values()]
        of_pixels, *others = torch.autograd.grad(
            cross_entropy(logits, labels), points, allow_unused=True
        )
    if of_pixels is None:
        _refuse(
            model,
            f"gives logits without a gradient for the pixels {when}, which attacks follow; expected a "
            "differentiable function of them",
        )
    of_weights = {k: v for k, v in zip(learning, others, strict=True) if v is not None}
    if learning and not of_weights:
        _refuse(model, f"gives logits without a gradient for any weight {when}")
    _check_gradients(model, {"the pixels": of_pixels, **of_weights}, when)


def _check_weights(model: Classifier) -> None:
    weights = _weights(model)
    if not any(weight.requires_grad for weight in weights.values()):
        _refuse(model, f"has nothing to train: none of its {len(weights)} weights requires_grad")
    for name, weight in weights.items():
        if not _finite(weight):
            _refuse(model, f"starts with numbers in {name} that are not finite")


def _check_logits(
    model: Classifier,
    logits: Any,
    classes: int,
    images: Tensor,
    precision: Precision,
    when: str,
) -> None:
    if not isinstance(logits, Tensor):
        _refuse(
            model,
            f"gives {type(logits).__name__} {when}, not a tensor of logits; aux_logits: false in "
            "model.kwargs switches torchvision's auxiliary heads off",
        )
    shape, found = (len(images), classes), tuple(logits.shape)
    if found != shape:
        _refuse(model, f"gives shape {found} {when}, not {shape}")
    if logits.device != images.device:
        _refuse(model, f"gives logits on {logits.device} {when}; expected {images.device}")
    expected = images.dtype
    if logits.dtype != expected and not (precision == "bf16" and logits.is_floating_point()):
        _refuse(model, f"gives {_short(logits.dtype)} {when}; expected {_short(expected)} logits")
    if not _finite(logits):
        _refuse(model, f"gives logits that are not finite {when}")


def _check_gradients(model: Classifier, gradients: Mapping[str, Tensor], when: str) -> None:
    for name, gradient in gradients.items():
        if gradient.layout is not torch.strided:
            _refuse(model, f"has a sparse gradient for {name}; expected a dense one")
        if not _finite(gradient):
            _refuse(model, f"has a gradient for {name} that is not finite {when}")


def _check_same(model: Classifier, before: Mapping[str, Tensor]) -> None:
    for name, weight in _weights(model).items():
        if before.get(name) is not weight:
            _refuse(
                model,
                f"makes the weight {name} in its forward pass; expected all of them at the start, or "
                "a lazy layer such as nn.LazyLinear",
            )


def _weights(model: Classifier) -> dict[str, nn.Parameter]:
    return dict(model.backbone.named_parameters())


def _finite(values: Tensor) -> bool:
    return values.is_meta or bool(values.isfinite().all())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(model: Classifier, why: str) -> NoReturn:
    raise RequestError(f"model.name: {model.name} {why}")
