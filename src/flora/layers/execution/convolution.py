"""A convolution and its update as one autograd function: the update alone makes no full-size tensor.

Letters: b batch, o and i channels of the output and the input, p pixels, r and s the ranks of the weight's first and
second mode, k the kernel modes. The gradient is differentiable, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.cost import LOW_PRECISION, merges, wants_dense
from flora.layers.execution.thin import add_lifted_, correlate, project


class Geometry(NamedTuple):
    """A convolution's options, as ``torch.convolution`` takes them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def thin(self) -> Geometry:
        """The same for thin images, whose groups count as samples."""
        return self._replace(groups=1)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: Tensor,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
    execution: str,
) -> Tensor:
    """The convolution of x (b, g · i, …) with ``W + kernel ×_1 first ×_2 second``, plus bias.

    Args:
        weight: (I_1, I_2, k …) in PyTorch's order: the inputs come second, in a transposed convolution first.
        kernel: G ×_3 C ×_4 D of equation 6, (r, s, k …), the scale in it.
        first, second: the factors (I_1, r) and (I_2, s).
    """
    route = _route(x, weight.shape, kernel.shape, geometry, execution)
    return _Convolution.apply(x, weight, bias, kernel, first, second, geometry, route)


def _route(x: Tensor, shape: Sequence[int], ranks: Sequence[int], geometry: Geometry, execution: str) -> str:
    """ "factored", "merged", or "dense": merged, and the full weight's gradient is formed and projected."""
    inputs = x.shape[0] * x.shape[2:].numel()
    stride = prod(geometry.stride)  # enough for an estimate of the output's size
    positions = (inputs, inputs * stride) if geometry.transposed else (inputs // stride, inputs)
    problem = (x.device.type, shape, ranks, positions, geometry.groups)
    if execution != "factored" and wants_dense(*problem):
        return "dense"
    if execution == "auto":
        return "merged" if x.dtype not in LOW_PRECISION and merges(*problem) else "factored"
    return execution


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(b, g · i, …) -> (b · g, i, p)."""
    return x.reshape(-1, x.shape[1] // groups, *x.shape[2:]).flatten(2)


def _image(thin: Tensor, like: Tensor) -> Tensor:
    """Thin (b, r, p) -> (b, r, …) with the pixels of ``like``."""
    thin = thin.unflatten(2, like.shape[2:])
    if thin.ndim == 4 and thin.device.type == "cpu":  # oneDNN pads few channels unless they come last
        return thin.contiguous(memory_format=torch.channels_last)
    return thin


def _columns(image: Tensor) -> Tensor:
    """Thin (b, r, …) -> (b, r, p), channels last or not."""
    return image.flatten(2)


def _add_by_group_(y: Tensor, thin: Tensor, factor: Tensor, groups: int) -> Tensor:
    """y (b, g · i, …) += factor (i, s) · thin (b · g, s, p), in place if the layout allows; returns y."""
    y = y.contiguous() if groups > 1 else y
    add_lifted_(_by_group(y, groups), thin, factor)
    return y


def _gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]) -> list[Tensor]:
    """A convolution's gradients of x and of the weight; None for one that is not wanted."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, (*wanted, False))[:2]


def _weights(weight: Tensor, kernel: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
    """W + delta. In half precision, which would round small updates away, W and delta to be convolved one by one."""
    rows = torch.matmul(second, kernel.flatten(2)).flatten(1)
    if weight.dtype in LOW_PRECISION:
        return weight, (first @ rows).view(weight.shape)
    return torch.addmm(weight.flatten(1), first, rows).view(weight.shape), None


def _project_weight(dweight: Tensor, kernel: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The full weight's gradient -> the gradients of kernel and factors."""
    rows, slices = dweight.flatten(1), kernel.flatten(2)
    dfirst = rows @ torch.matmul(second, slices).flatten(1).mT
    rows = (first.mT @ rows).unflatten(1, (second.shape[0], -1))  # (r, I_2, k)
    return torch.matmul(second.mT, rows).view(kernel.shape), dfirst, torch.bmm(rows, slices.mT).sum(0)


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The full weight's gradient."""
    if x.device.type == "cpu" and x.ndim == 4 and geometry.groups > 1 and prod(weight.shape[2:]) > 9:
        # oneDNN is four times as fast with large depthwise kernels if channels come last, copies included
        g, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (g, x))
    return _gradients(g, x, weight, geometry, (False, True))[1]


class _Convolution(Function):
    """y = W * x + B (K * Aᵀ x), where * convolves, and A and B are the factors of inputs and outputs. For the gradient
    g of y, with the thin a = Aᵀ x and c = Bᵀ g, and ' for adjoints,

        dx = W' * g + A t,    t = K' * c,    dA = x tᵀ,    dB = g (K * a)ᵀ,    dK = the kernel's gradient for a and c:

    W' * g is the base layer's own gradient, and all else is thin. The "dense" route forms dW instead and projects it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, kernel, first, second, geometry, route = inputs
        ctx.geometry, ctx.route = geometry, route
        ctx.save_for_backward(x, weight, kernel, first, second)
        if route != "factored":
            merged, beside = _weights(weight, kernel, first, second)
            y = torch.convolution(x, merged, bias, *geometry)
            return y if beside is None else y + torch.convolution(x, beside, None, *geometry)
        inner, outer = (first, second) if geometry.transposed else (second, first)
        a = _image(project(_by_group(x, geometry.groups), inner), x)
        thin = _columns(torch.convolution(a, kernel, None, *geometry.thin))
        return _add_by_group_(torch.convolution(x, weight, bias, *geometry), thin, outer, geometry.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, kernel, first, second = ctx.saved_tensors
        geometry, groups = ctx.geometry, ctx.geometry.groups
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad

        dx = db = None
        if ctx.route == "dense":
            if wants_x:
                merged, beside = _weights(weight, kernel, first, second)
                dx = _gradients(g, x, merged, geometry, (True, False))[0]
                dx = dx if beside is None else dx + _gradients(g, x, beside, geometry, (True, False))[0]
            dweight = _weight_gradient(g, x, weight, geometry)
            dkernel, dfirst, dsecond = _project_weight(dweight, kernel, first, second)
        else:
            inner, outer = (first, second) if geometry.transposed else (second, first)
            columns, given = _by_group(x, groups), _by_group(g, groups)
            a, c = _image(project(columns, inner), x), _image(project(given, outer), g)
            t, dkernel = _gradients(c, a, kernel, geometry.thin, (True, True))
            t, thin = _columns(t), _columns(torch.convolution(a, kernel, None, *geometry.thin))
            dinner, douter = correlate(t, columns, inner), correlate(thin, given, outer)
            dfirst, dsecond = (dinner, douter) if geometry.transposed else (douter, dinner)
            if wants_x:
                dx = _gradients(g, x, weight, geometry, (True, False))[0]
                dx = _add_by_group_(dx, t, inner, groups)
        if wants_bias:
            db = g.sum((0, *range(2, g.ndim)))
        return dx, None, db, dkernel, dfirst, dsecond, None, None
