"""The gradient start for N modes: factors from the HOSVD of the loss gradient of a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flora import tucker
from flora.layers import kinds
from flora.layers.core_space import CoreSpace
from flora.layers.starts import fill_core
from flora.tuner.layer import FloraLayer


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    adapter: str = "default",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> None:
    """Start the adapter's core spaces from the gradient of the loss over ``batches``.

    HOSVD of the gradient gives every factor but the output's; the gradient is projected on them; the leading right
    singular vectors of its output unfolding are the rows of the core; the output factor is zero. The update is zero
    whatever the factors are, so the model's outputs stay as they are and nothing is taken from the weights.

    Args:
        model: with the adapter in it, not merged.
        batches: a few batches of training data.
        adapter: its name.
        loss: ``loss(model, batch)`` -> scalar; by default ``model(**batch).loss``.

    Raises:
        ValueError: no batch, no such adapter, a merged one, or a gradient that is not finite; nothing is changed then.
    """
    layers = [m for m in model.modules() if isinstance(m, FloraLayer) and adapter in m.tucker_space]
    if not layers:
        raise ValueError(f"the model has no FLoRA adapter {adapter!r}")
    if any(layer.merged for layer in layers):
        raise ValueError(f"adapter {adapter!r}: unmerge before initializing")
    gradients = _gradients(model, layers, batches, loss or (lambda model, batch: model(**batch).loss))
    for layer, gradient in zip(layers, gradients, strict=True):
        if not torch.isfinite(gradient).all():
            raise ValueError(f"layer {layer.name!r}: the gradient of shape {list(gradient.shape)} is not finite")
    for layer, gradient in zip(layers, gradients, strict=True):
        _start(layer.space(adapter), gradient, kinds.output_mode(layer.roles))


def _gradients(model: nn.Module, layers: list[FloraLayer], batches: Iterable, loss: Callable) -> list[Tensor]:
    """Mean gradient of every layer's frozen weight, in float32 at least. The model keeps its own gradients."""
    weights = [layer.base_parameter for layer in layers]
    flags = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    seen = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            seen += 1
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total += grad.to_dense() if grad.is_sparse else grad
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if not seen:
        raise ValueError("no batches were given; a few are needed for a gradient")
    return [total / seen for total in sums]


@torch.no_grad()
def _start(space: CoreSpace, gradient: Tensor, output_mode: int) -> None:
    """Factors with orthonormal columns, a core with orthonormal rows: the sizes of every start (``layers.starts``)."""
    factors: list[Tensor | None] = [
        None if mode == output_mode else tucker.leading_vectors(tucker.unfold(gradient, mode), rank)
        for mode, rank in enumerate(space.ranks)
    ]
    unfolded = tucker.unfold(tucker.project(gradient, factors), output_mode)
    rank = space.ranks[output_mode]
    leading = tucker.leading_vectors(unfolded.mT, min(rank, unfolded.shape[1])).mT
    rows = leading.new_zeros(rank, unfolded.shape[1])  # a rank beyond what the input modes can tell apart stays empty
    rows[: leading.shape[0]] = leading
    fill_core(space, rows, output_mode)
    for mode, factor in enumerate(factors):
        if factor is None:
            space.factors[mode].zero_()
        else:
            space.factors[mode].copy_(factor)
