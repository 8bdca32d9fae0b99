"""Evaluate, differentiate and count: the only code that touches autograd, autocast, the DDP
wrapper and BatchNorm mode.

Perturbation gradients go through the bare module and `torch.autograd.grad`, so that no weight
gradient is computed, no collective runs, and ranks may take different numbers of inner steps.
Weight gradients go through the wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raytrain.objectives import AbstractObjective
from raytrain.place import Place
from raytrain.types import Batch, BatchNorm, Delta, Mask, PerSample, Predict, Rows

Precision = Literal["fp32", "bf16", "fp64"]


@dataclass
class Meter:
    """What training cost so far, counted in samples walked by each kind of pass.

    One forward-equivalent (FE) is the forward of one image. The gradient for the input costs one
    more, the gradient for input and weights two more: FE = forwards + input_backwards + 2
    full_backwards.
    """

    forwards: int = 0
    input_backwards: int = 0
    full_backwards: int = 0
    samples: int = 0  # images trained on, counted once per step

    @property
    def fe(self) -> int:
        """Forward-equivalents in all."""
        return self.forwards + self.input_backwards + 2 * self.full_backwards

    def over(self, place: Place) -> Meter:
        """The sum over all workers: a collective."""
        counts = asdict(self)
        summed = place.total(torch.tensor(list(counts.values()), device=place.device))
        return Meter(**dict(zip(counts, summed.tolist(), strict=True)))


@contextmanager
def mode(model: nn.Module, wanted: BatchNorm) -> Iterator[None]:
    """BatchNorm and dropout in the `wanted` mode inside; every module as it was afterwards."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    tracking = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
    model.train(wanted != "eval")
    if wanted == "batch_nostat":
        for norm in tracking:
            norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
        for module, was in zip(modules, training, strict=True):
            module.training = was


class Oracle:
    """What the objective looks like around one batch at the present weights. Every call is
    counted.

    `wrapper` is the module for weight gradients (the DDP wrapper, or the model itself);
    `attack_bn` is the BatchNorm mode of all passes that are not the weight update, which itself
    runs in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: AbstractObjective,
        batch: Batch,
        meter: Meter,
        *,
        attack_bn: BatchNorm,
        wrapper: nn.Module | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.batch = batch
        self._model, self._wrapper = model, model if wrapper is None else wrapper
        self._objective, self._meter = objective, meter
        self._attack_bn: BatchNorm = attack_bn
        self._precision: Precision = precision
        self._walked = 0  # samples forwarded into the present graph
        self._held = False

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Hold the attack's BatchNorm mode over many calls, instead of switching at each one."""
        if self._held:
            yield
            return
        with mode(self._model, self._attack_bn):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def losses(self, delta: Delta) -> PerSample:
        """The inner objective at delta, without a graph."""
        with torch.no_grad():
            return self._inner(self.batch, delta)

    def correct(self, delta: Delta) -> Mask:
        """Whether each sample is still classified as its label at delta."""
        with torch.no_grad(), self.attacking():
            logits = self._predictor(self._model)(self.batch.images + delta)
        return logits.argmax(1) == self.batch.labels

    def delta_grad(self, delta: Delta, rows: Rows | None = None) -> tuple[PerSample, Delta]:
        """Inner losses and d loss_i / d delta_i, for the batch or for `rows` of it (delta has just those)."""
        batch = self.batch if rows is None else self.batch[rows]
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = self._inner(batch, delta)
            # The gradient of the SUM is the per-sample gradient, whatever the batch size.
            (grad,) = torch.autograd.grad(losses.sum(), delta)
        self._meter.input_backwards += self._walked
        return losses.detach(), grad

    def theta_grad(self, delta: Delta, weights: PerSample | None = None) -> PerSample:
        """The outer losses; their (weighted) mean's gradient, over all workers, is added to every p.grad."""
        self._walked = 0
        with mode(self._model, "train"):
            losses = self._objective.outer(
                self._predictor(self._wrapper), self.batch, delta.detach()
            )
            (losses if weights is None else losses * weights.detach()).mean().backward()
        self._meter.full_backwards += self._walked
        self._meter.samples += len(self.batch)
        return losses.detach()

    def _inner(self, batch: Batch, delta: Delta) -> PerSample:
        self._walked = 0
        with self.attacking():
            return self._objective.inner(self._predictor(self._model), batch, delta)

    def _predictor(self, module: nn.Module) -> Predict:
        def predict(images: Tensor) -> Tensor:
            self._meter.forwards += len(images)
            self._walked += len(images)
            with autocast(images.device, self._precision):
                return module(images)

        return predict


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bfloat16 autocast where asked for; bfloat16 has float32's range, so no loss scaling is needed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
