"""How an update runs: *factored*, thin products added into the base layer's output, or *merged*, the base layer with
W + delta (paper section 4, equations 5 to 7).

``matrix`` and ``convolution`` are one autograd function each, for base layer and update together, so that no full-size
tensor is made for the update alone. What they compute is differentiable again.

Letters: b batch, o and i channels of the output and the input, p positions (rows of a product, pixels), r and s the
ranks of a weight's first and second mode, k the kernel modes. A *thin* tensor (b, r, p) has a rank for channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from flora.tucker import add_tucker

EXECUTIONS = ("auto", "factored", "merged")
LOW_PRECISION = (torch.float16, torch.bfloat16)

# ------------------------------------------------------------------------------------------------------ cost model

TOUCH = 20
FRESH, LARGE, FRESH_AND_LARGE = 60, 2**23, 240
DENSE = 0.5


def merges(shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int = 1) -> bool:
    """``execution="auto"``: whether a layer runs merged, in single precision.

    The cost model: cost is the number of operations of the products, plus ``TOUCH`` = 20 for every number of a
    full-size tensor that is read and written in place, plus ``FRESH`` = 60 for every number of a new one (240 beyond
    2²³ numbers, 32 MiB: new memory each time, and out of every cache). Beside what both need,

        factored   two thin products for each position, the core's between them, and the output touched once,
        merged     two products for each weight, and W + delta as a new tensor.

    So many positions (batch × sequence, batch × pixels) merge, and large weights do not. Half precision never merges:
    W + delta would round small updates away. ``benchmarks/speed.py`` holds the model to measured times.

    Args:
        shape, ranks: the weight's, (I_1, I_2, k …) and (r, s, …).
        positions: how many there are in the tensor whose channels are the first mode, and in the second mode's; the
            batch counts.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    weights, core = first * second * size, 2 * r * s * size
    merged = weights * (2 * r + (FRESH if weights <= LARGE else FRESH_AND_LARGE)) + second * core
    factored = positions[0] * (first * (2 * r + TOUCH) + groups * core) + positions[1] * groups * second * 2 * s
    return merged < factored


def wants_dense(shape: Sequence[int], ranks: Sequence[int], positions: Sequence[int], groups: int) -> bool:
    """Whether a convolution's full weight gradient costs less than projecting first: depthwise kernels, narrow layers.

    An operation of the full-size convolution counts ``DENSE`` = 0.5, since it runs nearer to the processor's peak.
    Arguments as in ``merges``.
    """
    (first, second), (r, s), size = shape[:2], ranks[:2], prod(shape[2:])
    dense = DENSE * positions[0] * first * second * size
    projected = positions[0] * (2 * first * r + 3 * groups * r * s * size) + positions[1] * groups * second * 3 * s
    return dense < projected


def can_fuse() -> bool:
    """Whether the autograd functions may run: compilers and tracers want plain operations, and torch.func's transforms
    such as are not in place."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not followed and not torch._C._are_functorch_transforms_active()


def of_one_type(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Sequence[Tensor]
) -> list[Tensor | None] | None:
    """The tensors (x, weight, bias, core, *factors), under autocast in its type; None where several types meet."""
    tensors = [x, weight, bias, core, *factors]
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
    return tensors if x.dtype == weight.dtype == core.dtype else None


# --------------------------------------------------------------------------------------------------- thin products


def _batched(factor: Tensor, tensor: Tensor) -> Tensor:
    """(i, s), or (g · i, s) with all groups' rows, -> (b, i, s) for a tensor (b, i, p) whose b counts groups too."""
    if factor.shape[0] == tensor.shape[1]:
        return factor.expand(tensor.shape[0], -1, -1)
    parts = factor.reshape(1, -1, tensor.shape[1], factor.shape[1])
    return parts.expand(tensor.shape[0] // parts.shape[1], -1, -1, -1).flatten(0, 1)


def _project(tensor: Tensor, factor: Tensor) -> Tensor:
    """(b, i, p), (i, s) -> thin (b, s, p): channels onto a factor's columns."""
    return torch.bmm(_batched(factor, tensor).mT, tensor)


def _add_lifted_(tensor: Tensor, thin: Tensor, factor: Tensor) -> None:
    """tensor (b, i, p) += factor (i, s) · thin (b, s, p), in place."""
    factor = _batched(factor, tensor)
    if tensor.stride(-1) == 1:
        tensor.baddbmm_(factor, thin)
    else:
        tensor.mT.baddbmm_(thin.mT, factor.mT)


def _correlate(thin: Tensor, tensor: Tensor, factor: Tensor) -> Tensor:
    """thin (b, s, p), (b, i, p) -> the gradient (i, s), or (g · i, s), of the factor that lies between them."""
    gradient = torch.bmm(thin, tensor.mT)
    groups = factor.shape[0] // tensor.shape[1]
    if groups == 1:
        return gradient.sum(0).mT
    return gradient.unflatten(0, (-1, groups)).sum(0).mT.flatten(0, 1)


# -------------------------------------------------------------------------------------------------------- matrices


def matrix(
    x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, left: Tensor, right: Tensor, execution: str
) -> Tensor:
    """``x (W + left · core · rightᵀ)ᵀ + bias``: (…, i) -> (…, o).

    Args:
        weight: (o, i).
        core: (r, s), the scale in it. left: (o, r). right: (i, s).
    """
    rows = x.reshape(-1, x.shape[-1])
    if execution == "auto":
        rank, positions = min(core.shape), rows.shape[0]
        merged = x.dtype not in LOW_PRECISION and merges(weight.shape, (rank, rank), (positions, positions))
    else:
        merged = execution == "merged"
    return _Matrix.apply(rows, weight, bias, core, left, right, merged).view(*x.shape[:-1], weight.shape[0])


def _parts(rows: Tensor) -> Tensor:
    """(p, i) -> (b, i, p / b), a view: a processor's threads share a batch of products better than one thin product."""
    parts = 4 if rows.device.type == "cpu" and rows.shape[0] % 4 == 0 else 1
    return rows.view(parts, -1, rows.shape[1]).mT


def _fold(core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U (o, q) and D (i, q) with U Dᵀ = left · core · rightᵀ, and q the smaller of the ranks."""
    return (left @ core, right) if core.shape[1] <= core.shape[0] else (left, right @ core.mT)


def _unfold(du: Tensor, dd: Tensor, core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of U and D -> those of core, left and right."""
    if core.shape[1] <= core.shape[0]:
        return left.mT @ du, du @ core.mT, dd
    return dd.mT @ right, du, dd @ core


class _Matrix(Function):
    """y = x Wᵀ + b + (x D) Uᵀ, D down to the rank and U up again. For the gradient g of y, with the thin t = g U,

    dx = g W + t Dᵀ,    dD = xᵀ t,    dU = gᵀ (x D).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, core, left, right, merged):
        up, down = _fold(core, left, right)
        if merged:
            thin, y = None, F.linear(x, torch.addmm(weight, up, down.mT), bias)
        else:
            thin, y = _project(_parts(x), down), F.linear(x, weight, bias)
            _add_lifted_(_parts(y), thin, up)
        ctx.save_for_backward(x, weight, core, left, right, thin)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, core, left, right, thin = ctx.saved_tensors
        up, down = _fold(core, left, right)
        if thin is None or torch.is_grad_enabled():  # a gradient that is differentiated again needs it made here
            thin = _project(_parts(x), down)
        given = _parts(g.contiguous())
        t = _project(given, up)
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            _add_lifted_(_parts(dx), t, down)
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        du, dd = _correlate(thin, given, up), _correlate(t, _parts(x), down)
        return dx, None, db, *_unfold(du, dd, core, left, right), None


# ---------------------------------------------------------------------------------------------------- convolutions


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
    way = _way(x, weight.shape, kernel.shape, geometry, execution)
    return _Convolution.apply(x, weight, bias, kernel, first, second, geometry, way)


def _way(x: Tensor, shape: Sequence[int], ranks: Sequence[int], geometry: Geometry, execution: str) -> str:
    """One of "factored"; "merged"; "dense", which is merged with the full weight's gradient formed."""
    inputs = x.shape[0] * x.shape[2:].numel()
    stride = prod(geometry.stride)  # all that an estimate needs to know of the output's size
    positions = (inputs, inputs * stride) if geometry.transposed else (inputs // stride, inputs)
    problem = (shape, ranks, positions, geometry.groups)
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
    if thin.ndim == 4 and thin.device.type == "cpu":  # a processor pads few channels, unless they come last
        return thin.contiguous(memory_format=torch.channels_last)
    return thin


def _columns(image: Tensor) -> Tensor:
    """Thin (b, r, …) -> (b, r, p), channels last or not."""
    return image.flatten(2)


def _add_by_group_(y: Tensor, thin: Tensor, factor: Tensor, groups: int) -> Tensor:
    """y (b, g · i, …) += factor (i, s) · thin (b · g, s, p), in place where the layout allows; returns y."""
    y = y.contiguous() if groups > 1 else y
    _add_lifted_(_by_group(y, groups), thin, factor)
    return y


def _gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]) -> list[Tensor]:
    """A convolution's gradients of x and of the weight, those that are wanted."""
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, (*wanted, False))[:2]


def _weights(weight: Tensor, kernel: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """W + delta; in half precision, where that would lose small updates, W and delta to be convolved one by one."""
    rows = torch.matmul(second, kernel.flatten(2)).flatten(1)
    if weight.dtype in LOW_PRECISION:
        return weight, (first @ rows).view(weight.shape)
    return (torch.addmm(weight.flatten(1), first, rows).view(weight.shape),)


def _project_weight(dweight: Tensor, kernel: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The full weight's gradient -> those of kernel and factors."""
    rows, slices = dweight.flatten(1), kernel.flatten(2)
    dfirst = rows @ torch.matmul(second, slices).flatten(1).mT
    rows = (first.mT @ rows).unflatten(1, (second.shape[0], -1))  # (r, I_2, k)
    return torch.matmul(second.mT, rows).view(kernel.shape), dfirst, torch.bmm(rows, slices.mT).sum(0)


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The full weight's gradient."""
    if x.device.type == "cpu" and x.ndim == 4 and geometry.groups > 1 and prod(weight.shape[2:]) > 9:
        # oneDNN is fast with large depthwise kernels only where channels come last: four times, the copies included
        g, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (g, x))
    return _gradients(g, x, weight, geometry, (False, True))[1]


class _Convolution(Function):
    """y = W * x + B (K * Aᵀ x), where * convolves, and A and B are the factors of inputs and outputs. For the gradient
    g of y, with the thin a = Aᵀ x and c = Bᵀ g, and ' for adjoints,

        dx = W' * g + A t,    t = K' * c,    dA = x tᵀ,    dB = g (K * a)ᵀ,    dK = the kernel's gradient for a and c:

    dx is the base layer's, and all else is thin. The "dense" way forms dW instead, and projects that.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, kernel, first, second, geometry, way):
        ctx.geometry, ctx.way = geometry, way
        ctx.save_for_backward(x, weight, kernel, first, second)
        if way != "factored":
            merged, *beside = _weights(weight, kernel, first, second)
            y = torch.convolution(x, merged, bias, *geometry)
            return y if not beside else y + torch.convolution(x, *beside, None, *geometry)
        inner, outer = (first, second) if geometry.transposed else (second, first)
        a = _image(_project(_by_group(x, geometry.groups), inner), x)
        thin = _columns(torch.convolution(a, kernel, None, *geometry.thin))
        return _add_by_group_(torch.convolution(x, weight, bias, *geometry), thin, outer, geometry.groups)

    @staticmethod
    def backward(ctx, g):
        x, weight, kernel, first, second = ctx.saved_tensors
        geometry, groups = ctx.geometry, ctx.geometry.groups
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad

        dx = db = None
        if ctx.way == "dense":
            if wants_x:
                merged, *beside = _weights(weight, kernel, first, second)
                dx = _gradients(g, x, merged, geometry, (True, False))[0]
                dx = dx if not beside else dx + _gradients(g, x, *beside, geometry, (True, False))[0]
            dweight = _weight_gradient(g, x, weight, geometry)
            dkernel, dfirst, dsecond = _project_weight(dweight, kernel, first, second)
        else:
            inner, outer = (first, second) if geometry.transposed else (second, first)
            columns, given = _by_group(x, groups), _by_group(g, groups)
            a, c = _image(_project(columns, inner), x), _image(_project(given, outer), g)
            t, dkernel = _gradients(c, a, kernel, geometry.thin, (True, True))
            t, thin = _columns(t), _columns(torch.convolution(a, kernel, None, *geometry.thin))
            dinner, douter = _correlate(t, columns, inner), _correlate(thin, given, outer)
            dfirst, dsecond = (dinner, douter) if geometry.transposed else (douter, dinner)
            if wants_x:
                dx = _gradients(g, x, weight, geometry, (True, False))[0]
                dx = _add_by_group_(dx, t, inner, groups)
        if wants_bias:
            db = g.sum((0, *range(2, g.ndim)))
        return dx, None, db, dkernel, dfirst, dsecond, None, None


# ------------------------------------------------------------------------------------ an update that acts as a weight


def add_updates(weight: Tensor, spaces: Iterable[tuple[Tensor, Sequence[Tensor]]], in_place: bool = False) -> Tensor:
    """``weight + Σ core ×_1 factors[0] …``: summed in float32 at least, whatever autocast says, and rounded once.

    ``in_place`` may overwrite the weight, where that spares a tensor of its size; the sum is what is returned.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        for core, factors in spaces:
            core, *factors = (tensor.to(weight.device, wide) for tensor in (core, *factors))
            total = add_tucker(total, core, factors, in_place and total.is_contiguous())
    return total.to(weight.dtype)


def drop_ranks(factors: Sequence[Tensor], mode: int, p: float) -> list[Tensor]:
    """The factors with each rank of one mode dropped with probability ``p``, the others scaled up to make up for it.

    Dropout of the input is not defined where the update acts as a weight, or where the input is a row's number; this
    is its nearest relative there.
    """
    keep = F.dropout(factors[mode].new_ones(factors[mode].shape[1]), p)
    return [factor * keep if n == mode else factor for n, factor in enumerate(factors)]
