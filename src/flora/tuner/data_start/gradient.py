"""``init="gradient"``: a start from the gradient of the loss over a few batches.

For every adapted weight, D is the gradient of the mean loss, so the first step follows it as well as the ranks allow.
A weight's gradient is taken as soon as autograd has it. That of a linear layer and of a quantized weight is not left to
autograd: it follows from the layer's input and the gradient of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flora.layers.execution.cost import LOW_PRECISION
from flora.tuner.data_start.loss import Loss, finite_loss
from flora.tuner.data_start.reduction import (
    Products,
    Reduction,
    Start,
    averaged,
    distributed,
    most,
    together,
    two_passes,
)
from flora.tuner.layer import FloraLayer


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
    # Adam's numbers do not fit into half precision
    masters = [p.detach().float() if p.dtype in LOW_PRECISION else p for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        when = f", in step {step} of the warm-up (warmup_rate={rate})"
        with together():
            value = finite_loss(model, batches, step % len(batches), loss, when)
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients = _of_all_processes(parameters, gradients)
        if all(gradient is None for gradient in gradients):
            return
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)


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
        for weight in plain:
            weight.requires_grad_(True)
        for reduction in reductions:
            handles += _take_gradients(reduction)
        for number in range(most(len(batches))):
            with together():
                value = finite_loss(model, batches, number, loss) if number < len(batches) else None
            if value is not None and value.requires_grad:  # else no layer gets a gradient, which the reductions report
                value.backward()
    finally:
        for handle in handles:
            handle.remove()
        for weight in plain:
            weight.grad = None


def _take_gradients(reduction: Reduction) -> list[Any]:
    """Hook a reduction into its layer. Returns the handles of the hooks."""
    layer, base, weight = reduction.layer, reduction.layer.get_base_layer(), reduction.layer.base_parameter
    watcher = partial(base.register_forward_hook, _watcher(reduction), with_kwargs=True)
    if layer.is_quantized:
        return [watcher()]
    handles = [weight.register_post_accumulate_grad_hook(_taker(reduction))]
    if Products.suit(layer):  # a call of the layer needs no gradient of the weight. Whoever else reads the weight does
        handles += [
            base.register_forward_pre_hook(lambda *_: _need_gradient(weight, False)),
            watcher(),
            base.register_forward_hook(lambda *_: _need_gradient(weight, True)),
        ]
    return handles


def _need_gradient(weight: Tensor, needed: bool) -> None:
    weight.requires_grad_(needed)


def _taker(reduction: Reduction) -> Callable[[Tensor], None]:
    """A hook that adds a batch's gradient, and frees it."""

    def take(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None:
            reduction.add(gradient)

    return take


def _watcher(reduction: Reduction) -> Callable[..., Tensor | None]:
    """A hook on a layer that adds the gradient of its weight, which has none of its own."""
    layer = reduction.layer

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # a checkpoint will run the layer again
            return None
        x = layer.input_of(args, kwargs)
        version = x._version

        def take(gradient: Tensor) -> None:
            if x._version != version:
                raise ValueError(f"the input of layer {layer.name!r} was changed in place after its call")
            reduction.add(_gradient_of_weight(layer, x, gradient))

        is_first = not output.requires_grad  # nothing before the layer is trained
        output.requires_grad_().register_hook(take)
        return output.clone() if is_first else None  # a leaf may not be changed in place, as an activation might do

    return watch


def _gradient_of_weight(layer: FloraLayer, x: Tensor, gradient: Tensor) -> Products | Tensor:
    """From the layer's input and the gradient of its output."""
    if Products.suit(layer):
        return Products.of(gradient, x)
    with torch.enable_grad():
        weight, again = layer.with_zeros(x)
    return torch.autograd.grad(again, weight, gradient.to(again.dtype))[0]
