"""Evaluation, differentiation and counting of every pass that belongs to the cost of training.

Perturbation gradients go through the bare module and `torch.autograd.grad`, so that no weight
gradient is computed, no collective runs, and ranks may take different numbers of inner steps.
Weight gradients go through the wrapper; a network that is its own wrapper has them averaged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, func, nn

from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import TrainingFailed
from raytrain.core.losses import AbstractLoss, Reference
from raytrain.core.network import (
    FrozenNetwork,
    Precision,
    autocast,
    mode,
    trainable,
    weight_grads,
)
from raytrain.core.regions import NETWORK, region
from raytrain.core.types import (
    Batch,
    BatchNorm,
    Delta,
    Mask,
    MixedLabels,
    PerSample,
    Predict,
    Rows,
)

Weigh = Callable[[PerSample, Callable[[], Delta]], PerSample]
"""Weights of a mean, a function of the losses and of a callable for their input gradients."""


class Oracle:
    """Losses and gradients of an objective on one batch. Every pass is counted by the meter.

    `wrapper` is the module for weight gradients (the DDP wrapper, or the model itself, whose gradients
    are averaged over the workers of `context` after the pass);
    `compiled` is a compiled form of it, for passes that are differentiated once;
    `frozen` is the network for passes without weight gradients (default: the model);
    `attack_bn` is the BatchNorm mode of all passes but those of the weight update, which are in train
    mode.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: AbstractLoss,
        batch: Batch,
        meter: Meter,
        *,
        attack_bn: BatchNorm,
        wrapper: Predict | None = None,
        compiled: Predict | None = None,
        frozen: FrozenNetwork | None = None,
        context: DistributedContext | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.batch = batch
        self.latest: Delta | None = None  # the last input gradient taken of each sample
        self.logits = batch.images.new_empty(
            0
        )  # of the last inner loss: the network's last output
        self._model, self._wrapper = model, model if wrapper is None else wrapper
        self._compiled = compiled
        self._frozen = FrozenNetwork(model, model) if frozen is None else frozen
        self._objective, self._meter = objective, meter
        self._context = DistributedContext() if context is None else context
        self._attack_bn: BatchNorm = attack_bn
        self._precision: Precision = precision
        self._reference: Reference | None = None
        self._walked = 0  # samples forwarded into the present graph
        self._held = False

    # ---------------------------------------------------------------- at fixed weights

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Set the attack's BatchNorm mode for the block, instead of switching at each call."""
        if self._held:
            yield
            return
        with mode(self._frozen.module, self._attack_bn):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    @property
    def reference(self) -> Reference:
        """The objective's `reference` of the batch, computed in the attack's mode at the first access."""
        if self._reference is None:
            with torch.no_grad(), self.attacking():
                found = self._objective.reference(self._attacked, self.batch)
            self._reference = tuple(part.detach() for part in found)
        return self._reference

    def set_reference(self, *reference: Tensor) -> None:
        """Set the reference of this batch to tensors that an algorithm has computed already."""
        self._reference = reference

    def losses(self, delta: Delta) -> PerSample:
        """The inner objective at delta, without a graph."""
        with torch.no_grad():
            return self._inner(self.batch, delta, self.reference)

    def correct(self, delta: Delta) -> Mask:
        """Whether each sample is still classified as its label at delta."""
        with torch.no_grad(), self.attacking():
            logits = self._attacked(self.batch.images + delta)
        return logits.argmax(1) == self.batch.labels

    def delta_grad(self, delta: Delta, rows: Rows | None = None) -> tuple[PerSample, Delta]:
        """Inner losses and d loss_i / d delta_i, for the batch or for `rows` of it (`delta` of these)."""
        batch, reference = self.batch, self.reference
        if rows is not None:
            batch, reference = batch[rows], tuple(part[rows] for part in reference)
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = self._inner(batch, delta, reference)
            grad = _input_grad(losses, delta)
        self._meter.input_backwards += self._walked
        if rows is None:
            self.latest = grad
        else:
            self.latest = (
                torch.zeros_like(self.batch.images) if self.latest is None else self.latest
            )
            self.latest = self.latest.index_copy(0, rows, grad)
        return losses.detach(), grad

    def outer_grad(self, delta: Delta, bn: BatchNorm) -> tuple[PerSample, Delta]:
        """Outer losses and their input gradients, on the bare module in the mode `bn`."""
        delta, frozen = delta.detach().requires_grad_(True), self._frozen
        network = frozen.module if self._objective.nested_gradients else frozen.predict
        with torch.enable_grad(), mode(frozen.module, bn):
            losses = self._outer(network, delta)
            grad = _input_grad(losses, delta)
        self._meter.input_backwards += len(delta)
        return losses.detach(), grad

    # ---------------------------------------------------------------- weight gradients

    def theta_grad(self, delta: Delta, weights: PerSample | Weigh | None = None) -> PerSample:
        """Return the outer losses; add their (weighted) mean's gradient over all workers to every p.grad."""
        delta = delta.detach()
        if callable(weights):
            delta.requires_grad_(True)
        losses, walked = self._trained(self._for_update(weights), delta), self._walked
        weighted, _ = self._weighted(losses, weights, lambda: self._input_grads(losses, delta))
        self._backward(weighted.mean())
        self._meter.full_backwards += walked + self._nested
        return losses.detach()

    def both_grads(
        self, delta: Delta, weights: PerSample | Weigh | None = None
    ) -> tuple[PerSample, Delta]:
        """`theta_grad` and d loss_i / d delta_i from one pass, of the outer losses in train mode."""
        delta = delta.detach().requires_grad_(True)
        losses, walked = self._trained(self._for_update(weights), delta), self._walked
        weighted, used = self._weighted(losses, weights, lambda: self._input_grads(losses, delta))
        self._backward(weighted.mean())
        self._meter.full_backwards += walked + self._nested
        # Local, also under DDP: of the mean over this worker's samples, not over all of them.
        return losses.detach(), _per_sample(delta, used)

    def local_grads(self, delta: Delta, factor: float) -> Delta:
        """Add `factor` times this worker's mean outer gradient to every p.grad, without a collective.

        The bare module with batch statistics, whose running ones are left alone; returns d loss_i /
        d delta_i. A later pass through the wrapper averages what was added over the workers.
        """
        delta = delta.detach().requires_grad_(True)
        losses = self._trained(self._model, delta, "batch_nostat")
        (factor * losses.mean()).backward()
        self._meter.full_backwards += self._walked + self._nested
        return _per_sample(delta, None) / factor

    def mean_grads(self, delta: Delta) -> list[Tensor]:
        """This worker's mean outer gradient for every trainable weight; no p.grad is touched.

        The bare module with batch statistics, whose running ones are left alone.
        """
        with torch.enable_grad():
            losses = self._trained(self._model, delta.detach(), "batch_nostat")
            grads = weight_grads(losses.mean(), self._model)
        self._meter.full_backwards += self._walked + self._nested
        return grads

    def sample_grads(
        self, delta: Delta, bn: BatchNorm, chunk: int, count: int | None = None
    ) -> Iterator[list[Tensor]]:
        """Per-sample outer gradients of the first `count` samples, (k, *weight) for every trainable
        weight, `chunk` samples at a time.

        In eval mode samples are independent, and a chunk is vectorised, in float32 or wider; the memory is
        `chunk` times that of the weights. With batch statistics a sample's gradient is that of its
        loss through the statistics of the whole batch: one backward of the whole batch for each.
        """
        if bn != "eval":
            yield from self._grads_through_the_batch(delta, bn, count)
            return
        reference = self._outer_reference
        for rows in torch.arange(len(self.batch), device=delta.device)[:count].split(chunk):
            part = tuple(one[rows] for one in reference)
            if chunk == 1 or self._objective.nested_gradients:
                for row in rows:
                    yield self._grads_of_one(delta, row.view(1))
            else:
                yield self._grads_of_many(self.batch[rows], delta[rows].detach(), part)

    # ---------------------------------------------------------------- in two stages (YOPO)

    def costate(
        self, delta: Delta, weights: PerSample | Weigh | None, stem_too: bool
    ) -> tuple[PerSample, Tensor, PerSample | None]:
        """Outer losses, d loss_i / d stem_i, and the weights of the mean.

        The later layers' mean gradient is added to their p.grad, without a collective; `stem_too`
        adds the first layer's gradient at this delta as well. The model must have `stem` and `rest`.
        """
        seams: list[tuple[Tensor, Tensor]] = []

        def staged(images: Tensor) -> Tensor:
            after = self._model.stem(images)  # pyright: ignore[reportCallIssue]
            seams.append((after, after.detach().requires_grad_(True)))
            return self._model.rest(seams[0][1])  # pyright: ignore[reportCallIssue]

        losses, walked = self._trained(staged, delta.detach()), self._walked
        ((after, seam),) = seams
        # This pass does not reach the pixels: their gradients cost another one.
        weighted, used = self._weighted(
            losses, weights, lambda: self.outer_grad(delta, "batch_nostat")[1]
        )
        weighted.mean().backward()
        self._meter.full_backwards += walked
        if stem_too:
            after.backward(seam.grad)
        return losses.detach(), _per_sample(seam, used), used

    def stem_delta_grad(self, delta: Delta, costate: Tensor, share: float) -> Delta:
        """d <stem(x + delta_i), costate_i> / d delta_i: the input gradient at a fixed costate.

        `share` is the cost of the stem as a share of a forward.
        """
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            product = self._hamiltonian(delta, costate)
            (grad,) = torch.autograd.grad(product, delta)
        self._meter.stem += 2 * share * len(delta)
        return grad

    def stem_theta_grad(self, delta: Delta, costate: Tensor, share: float) -> None:
        """Add the mean of d <stem(x + delta_i), costate_i> / d weights to the stem's p.grad."""
        (self._hamiltonian(delta.detach(), costate) / len(delta)).backward()
        self._meter.stem += 2 * share * len(delta)

    # ---------------------------------------------------------------- within

    @property
    def _outer_reference(self) -> Reference:
        """Return the reference if `outer` uses it (it has nested gradients); others do not pay for it."""
        return self.reference if self._objective.nested_gradients else ()

    @property
    def _nested(self) -> int:
        """Samples whose loss contains an input gradient, which costs one more full backward."""
        return self._objective.nested_gradients * len(self.batch)

    def _backward(self, loss: Tensor) -> None:
        """Add the gradient to every p.grad; the sum is averaged over the workers."""
        with region(NETWORK):
            loss.backward()
        if self._wrapper is self._model:
            self._context.average_grads(self._model)

    def _hamiltonian(self, delta: Delta, costate: Tensor) -> Tensor:
        with mode(self._model, "train"), autocast(delta.device, self._precision):
            after = self._model.stem(self.batch.images + delta)  # pyright: ignore[reportCallIssue]
        return (after * costate).sum()

    def _inner(self, batch: Batch, delta: Delta, reference: Reference) -> PerSample:
        self._walked = 0

        def recorded(images: Tensor) -> Tensor:
            logits = self._attacked(images)
            self.logits = logits.detach()
            return logits

        with self.attacking():
            return self._objective.inner(recorded, batch, delta, reference)

    def _for_update(self, weights: PerSample | Weigh | None) -> Predict:
        """The network for weight gradients: compiled, unless its pass is differentiated twice.

        torch.compile refuses gradients of gradients, and a second gradient of one pass was found to be
        wrong with channels last (torch 2.15, CPU).
        """
        twice = callable(weights) or self._objective.nested_gradients
        return self._wrapper if twice or self._compiled is None else self._compiled

    def _trained(self, module: Predict, delta: Delta, bn: BatchNorm = "train") -> PerSample:
        """The outer losses by `module`, which evaluates the trained network, in the mode `bn`."""
        with mode(self._model, bn):
            return self._outer(module, delta)

    def _outer(self, module: Predict, delta: Delta) -> PerSample:
        reference = self._outer_reference  # in its own mode
        self._walked = 0
        losses = self._objective.outer(self._predictor(module), self.batch, delta, reference)
        self._meter.input_backwards += self._nested
        return losses

    def _weighted(
        self,
        losses: PerSample,
        weights: PerSample | Weigh | None,
        input_grads: Callable[[], Delta],
    ) -> tuple[PerSample, PerSample | None]:
        """Return the losses times their weights, and the weights."""
        if weights is None:
            return losses, None
        found = weights(losses.detach(), input_grads) if callable(weights) else weights
        return losses * found.detach(), found.detach()

    def _input_grads(self, losses: PerSample, delta: Delta) -> Delta:
        """d loss_i / d delta_i, retaining the graph: delta enters one branch of any objective."""
        self._meter.input_backwards += len(delta)
        return _input_grad(losses, delta, retain_graph=True)

    def _grads_of_one(self, delta: Delta, row: Rows) -> list[Tensor]:
        part = tuple(one[row] for one in self._outer_reference)
        self._walked = 0
        with torch.enable_grad(), mode(self._model, "eval"):
            predict = self._predictor(self._model, "fp32")
            losses = self._objective.outer(predict, self.batch[row], delta[row].detach(), part)
            grads = weight_grads(losses.sum(), self._model)
        self._meter.full_backwards += self._walked + self._objective.nested_gradients
        self._meter.input_backwards += self._objective.nested_gradients
        return [grad[None] for grad in grads]

    def _grads_of_many(self, batch: Batch, delta: Delta, reference: Reference) -> list[Tensor]:
        names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        weights = dict(zip(names, trainable(self._model), strict=True))
        mixed = (batch.mixed.other, batch.mixed.share) if batch.mixed else ()
        self._walked = 0

        def loss(
            weights: dict[str, Tensor], image: Tensor, label: Tensor, delta: Tensor, *part: Tensor
        ) -> Tensor:
            given = tuple(value[None] for value in part)
            labels = MixedLabels(*given[:2]) if batch.mixed else None
            one = Batch(image[None], label[None], batch.index[:1], batch.rng, mixed=labels)

            def module(images: Tensor) -> Tensor:
                return func.functional_call(self._model, weights, (images,))

            predict = self._predictor(module, "fp32")
            rest = given[len(mixed) :]
            return self._objective.outer(predict, one, delta[None], rest).sum()

        with mode(self._model, "eval"):
            per_sample = func.vmap(
                func.grad(loss), in_dims=(None, 0, 0, 0, *(0 for _ in (*mixed, *reference)))
            )
            fixed = {name: value.detach() for name, value in weights.items()}
            try:
                grads = per_sample(fixed, batch.images, batch.labels, delta, *mixed, *reference)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                raise TrainingFailed(
                    "per-sample gradients of this network cannot be vectorised "
                    f"({str(error).splitlines()[0][:150]}); chunk=1 takes them one by one"
                ) from error
        # vmap traced one sample; all of the chunk were computed.
        self._meter.forwards += self._walked * (len(batch) - 1)
        self._meter.full_backwards += self._walked * len(batch)
        return [grads[name] for name in names]

    def _grads_through_the_batch(
        self, delta: Delta, bn: BatchNorm, count: int | None
    ) -> Iterator[list[Tensor]]:
        with torch.enable_grad():
            losses = self._trained(self._model, delta.detach(), bn)
            walked = self._walked
            for loss in losses[:count]:
                grads = weight_grads(loss, self._model, retain_graph=True)
                self._meter.full_backwards += walked + self._nested
                yield [one[None] for one in grads]

    def _attacked(self, images: Tensor) -> Tensor:
        """Logits in the mode of the attack."""
        return self._predictor(self._frozen.predict)(images)

    def _predictor(self, module: Predict, precision: Precision | None = None) -> Predict:
        def predict(images: Tensor) -> Tensor:
            self._meter.forwards += len(images)
            self._walked += len(images)
            with region(NETWORK), autocast(images.device, precision or self._precision):
                return module(images)

        return predict


def _input_grad(losses: PerSample, delta: Delta, retain_graph: bool = False) -> Delta:
    """d loss_i / d delta_i: the gradient of the SUM, whatever the batch size."""
    with region(NETWORK):
        return torch.autograd.grad(losses.sum(), delta, retain_graph=retain_graph)[0]


def _per_sample(leaf: Tensor, weights: PerSample | None) -> Tensor:
    """Convert the gradient of the (weighted) mean loss to that of each sample's own loss."""
    assert leaf.grad is not None
    grad = leaf.grad * len(leaf)
    return grad if weights is None else grad / weights.view(-1, *[1] * (leaf.dim() - 1))
