"""A matrix and its update as one autograd function: the update alone makes no full-size tensor.

Letters: p rows of the input, o and i its output and input features, r and s the ranks. The gradient is
differentiable, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.batched import cast_all
from flora.layers.execution.cost import LOW_PRECISION, merges, without_autocast
from flora.layers.execution.thin import add_lifted_, correlate, project

PARTS, FEW = 4, 2**16


def matrix(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor | None, left: Tensor, right: Tensor, execution: str
) -> Tensor:
    """``x (W + left · core · rightᵀ)ᵀ + bias``: (…, i) -> (…, o).

    Args:
        weight: (o, i).
        core: (r, s), the scale in it; None if it is folded into a factor. left: (o, r). right: (i, s). They may be of a
            wider type than x: work on weights alone is done in that type.
    """
    core = core if core is None or core.dtype == left.dtype else core.to(left.dtype)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if execution == "auto":
        rank, positions = min(left.shape[1], right.shape[1]), rows.shape[0]
        problem = (x.device.type, weight.shape, (rank, rank), (positions, positions))
        merged = x.dtype not in LOW_PRECISION and merges(*problem)
    else:
        merged = execution == "merged"
    if merged or (torch.is_grad_enabled() and not (left.dtype == x.dtype and _are_few(rows, max(weight.shape)))):
        y = _Matrix.apply(rows, weight, bias, core, left, right, merged)
    elif torch.is_grad_enabled():
        y = _Few.apply(rows, weight, bias, core, left, right)
    else:
        y = _without_gradients(rows, weight, bias, core, left, right)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _without_gradients(
    rows: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor | None, left: Tensor, right: Tensor
) -> Tensor:
    """The same by plain operations, the fewest for one row: a linear layer and two or three thin products."""
    left, right, *rest = cast_all([left, right] if core is None else [left, right, core], rows.dtype)
    core = rest[0] if rest else None
    if core is not None and rows.shape[0] < right.shape[0]:  # less work than folding the core into a factor
        return F.linear(rows, weight, bias).addmm_(rows.mm(right).mm(core.mT), left.mT)
    up, down = _fold(core, left, right)
    return F.linear(rows, weight, bias).addmm_(rows.mm(down), up.mT)


def thin_linear(x: Tensor, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x (left · core · rightᵀ)ᵀ`` by plain operations: (…, i) -> (…, o). With gradients the core is folded into a
    factor, on weights alone: one thin tensor less is kept."""
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # a trace is one for both
        return F.linear(F.linear(F.linear(x, right.to(x.dtype).transpose(-2, -1)), core.to(x.dtype)), left.to(x.dtype))
    up, down = _fold(core, left, right)
    return F.linear(F.linear(x, down.to(x.dtype).transpose(-2, -1)), up.to(x.dtype))


def _are_few(rows: Tensor, width: int) -> bool:
    """Whether thin products of these rows (p, i) run whole. On a CPU a batch of them takes 0.8 to 0.95 of the time,
    unless there are so few numbers that calls count more. ``width`` is the larger of i and o."""
    positions = rows.shape[0]
    return positions * width <= FEW or rows.device.type != "cpu" or positions % PARTS != 0


def _parts(rows: Tensor, width: int) -> Tensor:
    """(p, i) as it is, or (b, i, p / b), a view."""
    return rows if _are_few(rows, width) else rows.view(PARTS, -1, rows.shape[1]).mT


def _fold(core: Tensor | None, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U (o, q) and D (i, q) with U Dᵀ = left · core · rightᵀ, and q the smaller of the ranks."""
    if core is None:
        return left, right
    return (left @ core, right) if core.shape[1] <= core.shape[0] else (left, right @ core.mT)


def _folded(core: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """U and D in this type."""
    return cast_all([*_fold(core, left, right)], dtype)


def _unfold(
    du: Tensor, dd: Tensor, core: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of U and D -> those of core, left and right."""
    if core is None:
        return None, du, dd
    if core.shape[1] <= core.shape[0]:
        return left.mT @ du, du @ core.mT, dd
    return dd.mT @ right, du, dd @ core


class _Matrix(Function):
    """y = x Wᵀ + b + (x D) Uᵀ, D down to the rank and U up again. For the gradient g of y, with the thin t = g U,

    dx = g W + t Dᵀ,    dD = xᵀ t,    dU = gᵀ (x D).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, core, left, right, merged = inputs
        width = max(weight.shape)
        with without_autocast(x.device.type):
            up, down = _folded(core, left, right, x.dtype)
            if merged:
                thin, y = None, F.linear(x, torch.addmm(weight, up, down.mT), bias)
            else:
                thin, y = project(_parts(x, width), down), F.linear(x, weight, bias)
                add_lifted_(_parts(y, width), thin, up)
        # products in one type are formed again; casts are kept, as autocast keeps LoRA's
        kept = (None, None) if left.dtype == x.dtype else (up, down)
        ctx.save_for_backward(x, weight, core, left, right, *kept, thin)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, core, left, right, up, down, thin = ctx.saved_tensors
        dx = db = None
        width = max(weight.shape)
        with without_autocast(g.device.type):
            again = torch.is_grad_enabled()  # a second derivative needs all computed here
            if up is None or again:
                up, down = _folded(core, left, right, x.dtype)
            if thin is None or again:
                thin = project(_parts(x, width), down)
            given = _parts(g.contiguous(), width)
            t = project(given, up)
            if ctx.needs_input_grad[0]:
                dx = g @ weight
                add_lifted_(_parts(dx, width), t, down)
            if ctx.needs_input_grad[2]:
                db = g.sum(0)
            du, dd = cast_all([correlate(thin, given, up), correlate(t, _parts(x, width), down)], left.dtype)
            dcore, dleft, dright = _unfold(du, dd, core, left, right)
        return dx, None, db, dcore, dleft, dright, None


class _Few(Function):
    """The same, all of one type, for few rows: nothing but products, since Python counts as much as they do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, core, left, right = inputs
        with without_autocast(x.device.type):
            up, down = _fold(core, left, right)
            thin = x.mm(down)
            ctx.save_for_backward(x, weight, core, left, right, thin)
            return F.linear(x, weight, bias).addmm_(thin, up.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, core, left, right, thin = ctx.saved_tensors
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        with without_autocast(g.device.type):
            up, down = _fold(core, left, right)
            if torch.is_grad_enabled():  # a second derivative needs all computed here
                thin = x.mm(down)
            t = g.mm(up)
            dx = g.mm(weight).addmm_(t, down.mT) if wants_x else None
            own = _unfold(g.mT.mm(thin), x.mT.mm(t), core, left, right)
            return dx, None, g.sum(0) if wants_bias else None, *own
