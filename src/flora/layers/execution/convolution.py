"""A convolution and its update as one autograd function: the update alone makes no full-size tensor.

Letters: b batch, o and i channels of the output and the input, p pixels, r and s the ranks of the weight's first and
second mode, k the kernel modes. The gradient is differentiable, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.batched import cast_all, fold, fold_backward
from flora.layers.execution.cost import LOW_PRECISION, merges, wants_dense, without_autocast
from flora.layers.execution.thin import add_lifted_, correlate, project

KEEP = 8


class Geometry(NamedTuple):
    """A convolution's options, as ``torch.convolution`` takes them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@lru_cache(1024)
def _ungrouped(geometry: Geometry) -> Geometry:
    """The options for thin images, whose groups count as samples."""
    return geometry._replace(groups=1)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    factors: Sequence[Tensor],
    geometry: Geometry,
    execution: str,
) -> Tensor:
    """The convolution of x (b, g · i, …) with ``W + core ×_1 factors[0] …`` (equation 6), plus bias.

    Args:
        weight: (I_1, I_2, k …) in PyTorch's order: the inputs come second, in a transposed convolution first.
        core, factors: (r, s, …), the scale in it, and (I_n, r_n); or K (r, s, k …) and the first two factors alone.
            They may be of a wider type than x: work on weights alone is done in that type.
    """
    route = _route(x.device.type, x.dtype, x.shape, weight.shape, core.shape, geometry, execution)
    return _Convolution.apply(x, weight, bias, geometry, route, core, *factors)


@lru_cache(4096)
def _route(
    device: str,
    dtype: torch.dtype,
    input: Sequence[int],
    shape: Sequence[int],
    ranks: Sequence[int],
    geometry: Geometry,
    execution: str,
) -> str:
    """ "factored", "merged", or "dense": merged, and the full weight's gradient is formed and projected."""
    inputs = input[0] * prod(input[2:])
    stride = prod(geometry.stride)  # enough for an estimate of the output's size
    positions = (inputs, inputs * stride) if geometry.transposed else (inputs // stride, inputs)
    problem = (device, shape, ranks, positions, geometry.groups)
    if execution != "factored" and wants_dense(*problem):
        return "dense"
    if execution == "auto":
        return "merged" if dtype not in LOW_PRECISION and merges(*problem) else "factored"
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


def _gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]) -> list[Any]:
    """A convolution's gradients of x and of the weight; None for one that is not wanted."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, (*wanted, False))[:2]


def fold_one(core: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """``batched.fold`` for one layer: K (r, s, k …) and the kernel factors' Kronecker product. Without kernel factors
    the core is K."""
    if not kernels:
        return core, None
    kernel, basis = fold(core[None], [factor[None] for factor in kernels])
    return kernel.view(*core.shape[:2], *(factor.shape[0] for factor in kernels)), basis


def fold_one_backward(
    dkernel: Tensor, core: Tensor, kernels: Sequence[Tensor], basis: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of K -> those of core and kernels."""
    if basis is None:
        return dkernel.view(core.shape), []
    folded = dkernel.contiguous().flatten(2).flatten(0, 1)[None]
    own = fold_backward(folded, core[None], [factor[None] for factor in kernels], basis)
    return own[0][0], [gradient[0] for gradient in own[1:]]


def rows_of(kernel: Tensor, second: Tensor) -> Tensor:
    """R (r, I_2, k) with ΔW = A R."""
    return torch.bmm(second.expand(len(kernel), -1, -1), kernel.flatten(2))


def _weights(weight: Tensor, first: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """W + ΔW. In half precision, which would round small updates away, W and ΔW to be convolved one by one."""
    if weight.dtype in LOW_PRECISION:
        return weight, (first @ rows.flatten(1)).to(weight.dtype).view(weight.shape)
    return torch.addmm(weight.flatten(1), first, rows.flatten(1)).view(weight.shape), None


def project_weight(
    dweight: Tensor, kernel: Tensor, first: Tensor, second: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The full weight's gradient (I_1, n) -> those of K and both factors."""
    drows = (first.mT @ dweight).view(rows.shape)
    dkernel = torch.bmm(second.mT.expand(len(drows), -1, -1), drows)
    return dkernel, dweight @ rows.flatten(1).mT, torch.bmm(drows, kernel.flatten(2).mT).sum(0)


class _Convolution(Function):
    """y = W * x + B (K * Aᵀ x), where * convolves, and A and B are the factors of inputs and outputs. For the gradient
    g of y, with the thin a = Aᵀ x and c = Bᵀ g, and ' for adjoints,

        dx = W' * g + A t,    t = K' * c,    dA = x tᵀ,    dB = g (K * a)ᵀ,    dK = the kernel's gradient for a and c:

    W' * g is the base layer's own gradient, and all else is thin. a and K * a are kept for the backward pass if they
    have at most an eighth (``KEEP``) of the numbers of x, which is kept anyway; else they are formed again. The "dense"
    route forms dW instead and projects it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, geometry, route, core, first, second, *kernels = inputs
        ctx.geometry, ctx.route = geometry, route
        kept: tuple[Tensor | None, Tensor | None] = None, None
        with without_autocast(x.device.type):
            kernel, basis = fold_one(core, kernels)
            if route == "factored":
                low, inner, outer = _thin_weights(x, kernel, first, second, geometry)
                a, lifted = _thin_images(x, low, inner, geometry)
                y = torch.convolution(x, weight, bias, *geometry)
                y = _add_by_group_(y, lifted, outer, geometry.groups)
                if KEEP * (a.numel() + lifted.numel()) <= x.numel():
                    kept = a, lifted
            else:
                merged, beside = _weights(weight, first, rows_of(kernel, second))
                y = torch.convolution(x, merged, bias, *geometry)
                y = y if beside is None else y.add_(torch.convolution(x, beside, None, *geometry))
        ctx.save_for_backward(x, weight, kernel, basis, *kept, core, first, second, *kernels)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        saved = ctx.saved_tensors  # read once: within a checkpoint a second time is an error
        x, weight, kernel, basis, a, lifted, core, first, second, *kernels = saved
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        with without_autocast(g.device.type):
            if torch.is_grad_enabled():  # a second derivative needs them computed here
                (kernel, basis), a, lifted = fold_one(core, kernels), None, None
            given = (g, x, weight, kernel, first, second, ctx.geometry, wants_x)
            own = _through_weight(*given) if ctx.route == "dense" else _through_thin(*given, a, lifted)
            dx, dkernel, dfirst, dsecond = own
            dcore, dkernels = fold_one_backward(dkernel, core, kernels, basis)
            db = g.sum((0, *range(2, g.ndim))) if wants_bias else None
        return dx, None, db, None, None, dcore, dfirst, dsecond, *dkernels


def _through_weight(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel: Tensor,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
    wants_x: bool,
) -> tuple[Any, ...]:
    """The gradients of x, K and both factors; the full weight's is formed and projected."""
    rows = rows_of(kernel, second)
    merged, beside = _weights(weight, first, rows) if wants_x else (weight, None)
    # oneDNN forms this gradient of large depthwise kernels four times as fast if channels come last, copies included
    last = x.device.type == "cpu" and x.ndim == 4 and geometry.groups > 1 and prod(weight.shape[2:]) > 9
    dx, dweight = _gradients(g, x, merged, geometry, (wants_x, not last))
    if last:
        g_last, x_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (g, x))
        dweight = _gradients(g_last, x_last, weight, geometry, (False, True))[1]
    if beside is not None:
        dx = dx + _gradients(g, x, beside, geometry, (True, False))[0]
    dense = dweight.to(first.dtype, memory_format=torch.contiguous_format).flatten(1)
    return dx, *project_weight(dense, kernel, first, second, rows)


def _thin_weights(
    x: Tensor, kernel: Tensor, first: Tensor, second: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """K, the inputs' and the outputs' factor, in the type of x."""
    kernel, first, second = cast_all([kernel, first, second], x.dtype)
    return (kernel, first, second) if geometry.transposed else (kernel, second, first)


def _thin_images(x: Tensor, kernel: Tensor, inner: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """a (b · g, s, …) and K * a (b · g, r, p)."""
    a = _image(project(_by_group(x, geometry.groups), inner), x)
    return a, _columns(torch.convolution(a, kernel, None, *_ungrouped(geometry)))


def _through_thin(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    kernel: Tensor,
    first: Tensor,
    second: Tensor,
    geometry: Geometry,
    wants_x: bool,
    a: Tensor | None,
    lifted: Tensor | None,
) -> tuple[Any, ...]:
    """The same by thin products and convolutions. ``a``, ``lifted``: what the forward pass kept of a and K * a."""
    wide, groups, dx = first.dtype, geometry.groups, None
    low, inner, outer = _thin_weights(x, kernel, first, second, geometry)
    columns, given = _by_group(x, groups), _by_group(g, groups)
    c = _image(project(given, outer), g)
    if a is None or lifted is None:
        a, lifted = _thin_images(x, low, inner, geometry)
    t, dkernel = _gradients(c, a, low, _ungrouped(geometry), (True, True))
    t = _columns(t)
    dinner, douter = correlate(t, columns, inner), correlate(lifted, given, outer)
    if wants_x:
        dx = _gradients(g, x, weight, geometry, (True, False))[0]
        dx = _add_by_group_(dx, t, inner, groups)
    dfirst, dsecond = (dinner, douter) if geometry.transposed else (douter, dinner)
    return dx, *cast_all([dkernel, dfirst, dsecond], wide)
