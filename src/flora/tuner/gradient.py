"""The data start for N modes: core spaces from the gradient of the loss over a few batches.

For every adapted weight, HOSVD of the gradient D of the mean loss gives the factors of all modes but the output mode o;
the leading right singular vectors of the projected gradient's output unfolding are the rows of the core; the output
factor is zero. So the first step follows D as closely as the ranks allow, and no output changes before it.

D itself is never kept. Two passes over the batches reduce each layer's gradient as it arrives (randomized SVD: Halko,
Martinsson and Tropp, 2011). The first finds, for every long mode, a basis Qₙ a few times wider than the rank. The
second sums B = D ×ₙ Qₙᵀ over n ≠ o, and HOSVD of the small B does the rest. A mode no longer than
its basis would be keeps Qₙ = 1, so small layers are exact and take one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flora import tucker
from flora.layers.kinds import output_mode
from flora.layers.starts import fill_core
from flora.tuner.layer import FloraLayer

Loss = Callable[[nn.Module, Any], Tensor]
Factors = list[Tensor | None]  # None for the output mode

BASIS = 4  # columns of a basis per rank
SPARE = 32  # and further ones


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    adapter: str = "default",
    loss: Loss | None = None,
    *,
    warmup_steps: int = 20,
    warmup_rate: float = 1e-2,
    overwrite: bool = False,
) -> None:
    """Start the adapter's core spaces from the gradient of the loss over ``batches``.

    A head that has learned nothing yields a gradient that says nothing. So whatever else is trained (a new head in
    ``modules_to_save``, biases) is first trained for some steps, and put back in the end. The model runs in training
    mode, as it will in the first step. Its mode, gradients, running statistics and the state of the random numbers are
    as before afterwards. In a distributed run every process passes batches of its own, and all get the same start.

    Args:
        model: with the adapter in it, not merged.
        batches: a few batches of training data. All of them are kept in memory.
        adapter: its name.
        loss: ``loss(model, batch)`` -> scalar; by default ``model(**batch).loss``.
        warmup_steps: of AdamW, on the batches in turn, for the parameters that are trained beside the adapter.
        warmup_rate: their learning rate.
        overwrite: start even an adapter that has been trained; its numbers are lost.

    Raises:
        ValueError: no batch, no labels, no such adapter, a merged or trained one, a loss that is not finite or does not
            depend on a layer. Nothing is changed then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its own averaging would miss the parameters that are frozen
    layers = _layers_to_start(model, adapter, overwrite)
    batches = list(batches)
    if not batches:
        raise ValueError("no batches were given; a few are needed for a gradient")
    mean_loss = loss or _loss_of_output
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".tucker_space." not in f".{name}"]
    with undisturbed(model), _restored(others), _counted_as_started(layers, adapter):
        _warm_up(model, others, batches, mean_loss, warmup_steps, warmup_rate)
        starts = _starts(model, layers, adapter, batches, mean_loss)
    for layer, (rows, factors) in zip(layers, starts, strict=True):
        _fill(layer, adapter, rows, factors)


def _layers_to_start(model: nn.Module, adapter: str, overwrite: bool) -> list[FloraLayer]:
    layers = [m for m in model.modules() if isinstance(m, FloraLayer) and adapter in m.tucker_space]
    if not layers:
        raise ValueError(f"the model has no FLoRA adapter {adapter!r}")
    for layer in layers:
        space = layer.space(adapter)
        if layer.merged:
            raise ValueError(f"adapter {adapter!r}: unmerge before initializing")
        if not overwrite and space.core.any() and all(factor.any() for factor in space.factors):
            raise ValueError(
                f"adapter {adapter!r} has been trained: the update of layer {layer.name!r} is not zero; "
                "pass overwrite=True to start it anew"
            )
    return layers


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(f"the model returns no loss: the batch has {sorted(batch)}, and needs labels (or pass loss=)")
    return loss


def _finite_loss(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    value = loss(model, batch)
    if not isfinite(number := value.item()):
        raise ValueError(f"the loss of a batch is {number}, not finite")
    return value


# ---------------------------------------------------------------------------------------------- what must not change


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode. Afterwards its modes, buffers, flags and gradients, and the state of the random
    numbers, are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device.index for parameter, _, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(sorted(device for device in devices if device is not None)):
        try:
            model.train()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, flag, gradient in flags:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextmanager
def _counted_as_started(layers: Sequence[FloraLayer], adapter: str) -> Iterator[None]:
    """From now on, unless an error ends it."""
    before = [(layer.space(adapter), layer.space(adapter).started) for layer in layers]
    try:
        for space, _ in before:
            space.started = True
        yield
    except BaseException:
        for space, started in before:
            space.started = started
        raise


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, kept in zip(parameters, before, strict=True):
                parameter.copy_(kept)


def _warm_up(
    model: nn.Module, parameters: Sequence[nn.Parameter], batches: Sequence[Any], loss: Loss, steps: int, rate: float
) -> None:
    if not parameters:
        return
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        value = _finite_loss(model, batches[step % len(batches)], loss)
        if not value.requires_grad:
            return
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, _averaged(gradients), strict=True):
            parameter.grad = gradient
        optimizer.step()


def _averaged(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The mean over the processes of a distributed run."""
    tensors = list(tensors)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            if tensor is not None:
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
    return tensors


# ------------------------------------------------------------------------------------------------------ the two passes


def _starts(
    model: nn.Module, layers: Sequence[FloraLayer], adapter: str, batches: Sequence[Any], loss: Loss
) -> list[tuple[Tensor, Factors]]:
    """Rows of the core's output unfolding, and factors, of every layer."""
    model.requires_grad_(False)
    reductions = [_Reduction(layer, adapter, number) for number, layer in enumerate(layers)]
    if any(reduction.needs_bases for reduction in reductions):
        _pass(model, reductions, batches, loss)
        for reduction in reductions:
            reduction.find_bases()
    _pass(model, reductions, batches, loss)
    return [reduction.start() for reduction in reductions]


def _pass(model: nn.Module, reductions: Sequence[_Reduction], batches: Sequence[Any], loss: Loss) -> None:
    """Run the batches, and hand every layer's gradient to its reduction as soon as it is there."""
    handles = []
    try:
        for reduction in reductions:
            reduction.weight.requires_grad_(True)
            handles.append(reduction.weight.register_post_accumulate_grad_hook(reduction.take))
        for batch in batches:
            with torch.enable_grad():
                value = _finite_loss(model, batch, loss)
            if value.requires_grad:  # else no layer gets a gradient, which the reductions report
                value.backward()
    finally:
        for handle in handles:
            handle.remove()
        for reduction in reductions:
            reduction.weight.grad = None


class _Reduction:
    """The gradient D (I_1, …, I_N) of one weight, reduced to the sums that its start needs."""

    def __init__(self, layer: FloraLayer, adapter: str, number: int) -> None:
        self.layer, self.number = layer, number
        self.weight, self.ranks = layer.base_parameter, layer.space(adapter).ranks
        self.output_mode = output_mode(layer.roles)
        self.bases: Factors = [None] * len(self.ranks)
        self.sums: dict[int, Tensor] = {}  # by mode in the first pass; in the second B, under -1
        wide = {n: BASIS * rank + SPARE for n, rank in enumerate(self.ranks) if n != self.output_mode}
        self.widths = {n: width for n, width in wide.items() if width < layer.weight_shape[n]}
        self.needs_bases = bool(self.widths)

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Add a batch's gradient, and free it."""
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self.needs_bases:
            for mode, width in self.widths.items():
                rows = tucker.unfold(gradient, mode)
                self._add(mode, rows @ self._probe(mode, rows.shape[1], width, rows))
        else:
            self._add(-1, tucker.project(gradient, self.bases))

    def _add(self, key: int, term: Tensor) -> None:
        self.sums[key] = term if key not in self.sums else self.sums[key].add_(term)

    def _probe(self, mode: int, rows: int, columns: int, like: Tensor) -> Tensor:
        """Random directions, the same for every batch and process."""
        generator = torch.Generator().manual_seed(16 * self.number + mode)
        return torch.randn(rows, columns, generator=generator).to(like.device, like.dtype)

    def find_bases(self) -> None:
        """End the first pass."""
        for mode in self.widths:
            self.bases[mode] = torch.linalg.qr(self._sum(mode)).Q
        self.sums, self.needs_bases = {}, False

    def _sum(self, key: int) -> Tensor:
        if key not in self.sums:
            raise ValueError(f"the loss does not depend on layer {self.layer.name!r}: it has no gradient to start from")
        (total,) = _averaged([self.sums[key]])
        if total is None or not torch.isfinite(total).all():
            raise ValueError(
                f"layer {self.layer.name!r}: the gradient of shape {list(self.layer.weight_shape)} is not finite"
            )
        return total

    def start(self) -> tuple[Tensor, Factors]:
        """Orthonormal rows of the core's output unfolding, and factors with orthonormal columns: the sizes of every
        start (``layers.starts``)."""
        small = self._sum(-1)
        inner: Factors = [
            None if mode == self.output_mode else tucker.leading_vectors(tucker.unfold(small, mode), rank)
            for mode, rank in enumerate(self.ranks)
        ]
        unfolded = tucker.unfold(tucker.project(small, inner), self.output_mode)
        rank = self.ranks[self.output_mode]
        leading = tucker.leading_vectors(unfolded.mT, min(rank, unfolded.shape[1])).mT
        rows = leading.new_zeros(rank, unfolded.shape[1])  # a rank beyond what the input modes can tell apart is empty
        rows[: leading.shape[0]] = leading
        pairs = zip(self.bases, inner, strict=True)
        return rows, [factor if basis is None or factor is None else basis @ factor for basis, factor in pairs]


@torch.no_grad()
def _fill(layer: FloraLayer, adapter: str, rows: Tensor, factors: Factors) -> None:
    space = layer.space(adapter)
    fill_core(space, rows, output_mode(layer.roles))
    for target, factor in zip(space.factors, factors, strict=True):
        if factor is None:
            target.zero_()
        else:
            target.copy_(factor)
