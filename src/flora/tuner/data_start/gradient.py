"""``init="gradient"``: a start from the gradient of the loss over a few batches.

For every adapted weight, D is the gradient of the mean loss, so the first step follows it as well as the ranks allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from flora.tuner.data_start.reduction import Reduction, Start, averaged, distributed, most, together, two_passes
from flora.tuner.layer import FloraLayer

Loss = Callable[[nn.Module, Any], Tensor]


def from_gradient(
    model: nn.Module,
    layers: Sequence[FloraLayer],
    adapter: str,
    batches: Sequence[Any],
    loss: Loss,
    seed: int,
    warmup_steps: int,
    warmup_rate: float,
) -> list[Start]:
    """The start of every layer. See ``initialize``."""
    missing = "the loss does not depend on layer {layer}: it has no gradient to start from"
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".tucker_space." not in f".{name}"]
    with _restored(others):
        _warm_up(model, others, batches, loss, warmup_steps, warmup_rate)
        model.requires_grad_(False)
        reductions = [
            Reduction(layer, adapter, seed + 16 * number, "the gradient", missing)
            for number, layer in enumerate(layers)
        ]
        return two_passes(reductions, lambda: _pass(model, reductions, batches, loss))


def _finite_loss(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    value = loss(model, batch)
    if not isfinite(number := value.item()):
        raise ValueError(f"the loss of a batch is {number}, not finite")
    return value


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
    """Train what is trained beside the adapter: a head that has learned nothing yields a gradient that says nothing."""
    if not parameters:
        return
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        with together():
            value = _finite_loss(model, batches[step % len(batches)], loss)
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = _of_all_processes(parameters, gradients)
        if all(gradient is None for gradient in gradients):
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _of_all_processes(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The mean of the gradients over all processes, some of which may have none for a parameter."""
    if not distributed():
        return gradients
    seen = torch.tensor([float(gradient is not None) for gradient in gradients], device=parameters[0].device)
    averaged([seen])
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    averaged(whole)
    return [gradient if share else None for gradient, share in zip(whole, seen.tolist(), strict=True)]


def _pass(model: nn.Module, reductions: Sequence[Reduction], batches: Sequence[Any], loss: Loss) -> None:
    """Run the batches, and hand every layer's gradient to its reduction as soon as it is there."""
    handles: list[Any] = []
    plain = [reduction.layer.base_parameter for reduction in reductions if not reduction.layer.is_quantized]
    try:
        for reduction in reductions:
            if reduction.layer.is_quantized:
                base = reduction.layer.get_base_layer()
                handles.append(base.register_forward_hook(_watcher(reduction), with_kwargs=True))
            else:
                weight = reduction.layer.base_parameter
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(_taker(reduction)))
        for number in range(most(len(batches))):
            with together(), torch.enable_grad():
                value = _finite_loss(model, batches[number], loss) if number < len(batches) else None
            if value is not None and value.requires_grad:  # else no layer gets a gradient, which the reductions report
                value.backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight in plain:
            weight.grad = None


def _taker(reduction: Reduction) -> Callable[[Tensor], None]:
    """A hook that adds a batch's gradient, and frees it."""

    def take(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None:
            reduction.add(gradient)

    return take


def _watcher(reduction: Reduction) -> Callable[..., None]:
    """A hook on a layer whose quantized weight can have no gradient: what it would be follows from the layer's input
    and the gradient of its output."""

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        def take(gradient: Tensor) -> None:
            with torch.enable_grad():
                weight, again = reduction.layer.with_zeros(args, kwargs)
            reduction.add(torch.autograd.grad(again, weight, gradient.to(again.dtype))[0])

        if torch.is_grad_enabled():  # else a checkpoint will run the layer again
            if not output.requires_grad:  # nothing before it is trained
                output.requires_grad_()
            output.register_hook(take)

    return watch
