"""How an update of each kind of layer runs beside the layer, without W + delta.

*Factored* functions take (layer, core, factors) and then what the layer's own ``forward`` takes. They return what the
update adds to the layer's output. *Fused* functions take (layer, weight, bias, core, factors, input, execution), core
and factors of any type and the rest of one, and return the output of layer and update together. A pool may have folded
the core: into the factors of a matrix, and it is None; with the kernel factors of a convolution, and two factors are
left. *Plain* functions take (layer, input, weight, bias) and are the layer with that weight, in one operation. The
scale is in the core. The order of the factors is the order of the weight's modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.layers.execution.convolution import Geometry, convolution, fold_one
from flora.layers.execution.matrix import matrix, thin_linear

Factors = Sequence[Tensor]
Bias = Tensor | None

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear(layer: Any, core: Tensor, factors: Factors, input: Tensor) -> Tensor:
    """Equation 7: input (…, i) -> (…, o)."""
    return thin_linear(input, core, *factors)


def linear_transposed(layer: Any, core: Tensor, factors: Factors, x: Tensor) -> Tensor:
    """The same for transformers' Conv1D, whose weight is (in, out)."""
    input_factor, output_factor = factors
    return thin_linear(x, core.transpose(-2, -1), output_factor, input_factor)


def linear_fused(
    layer: Any, weight: Tensor, bias: Bias, core: Tensor | None, factors: Factors, input: Tensor, execution: str
) -> Tensor:
    """Layer and update of a linear layer: (…, i) -> (…, o)."""
    output_factor, input_factor = factors
    return matrix(input, weight, bias, core, output_factor, input_factor, execution)


def linear_transposed_fused(
    layer: Any, weight: Tensor, bias: Bias, core: Tensor | None, factors: Factors, x: Tensor, execution: str
) -> Tensor:
    """Layer and update of transformers' Conv1D: (…, i) -> (…, o)."""
    input_factor, output_factor = factors
    return matrix(x, weight.mT, bias, None if core is None else core.mT, output_factor, input_factor, execution)


def linear_plain(layer: Any, input: Tensor, weight: Tensor, bias: Bias) -> Tensor:
    """A linear layer with this weight (o, i)."""
    return F.linear(input, weight, bias)


def linear_transposed_plain(layer: Any, input: Tensor, weight: Tensor, bias: Bias) -> Tensor:
    """transformers' Conv1D with this weight (i, o)."""
    return F.linear(input, weight.mT, bias)


def conv_plain(layer: Any, input: Tensor, weight: Tensor, bias: Bias) -> Tensor:
    """A convolution with this weight and the layer's own options."""
    return layer._conv_forward(input, weight, bias)


def conv_transposed_plain(layer: Any, input: Tensor, weight: Tensor, bias: Bias) -> Tensor:
    """A transposed convolution with this weight and the layer's own options."""
    run = _TRANSPOSED[weight.ndim - 2]
    return run(input, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)


def _pointwise(input: Tensor, weight: Tensor, spatial: int, groups: int) -> Tensor:
    """1×…×1 convolution by ``weight`` (out, in/groups)."""
    weight = weight.to(input.dtype)
    return _CONV[spatial](input, weight.reshape(*weight.shape, *[1] * spatial), groups=groups)


def _kernel(core: Tensor, kernel_factors: Sequence[Tensor]) -> Tensor:
    """G ×_3 C ×_4 D (equation 6): (r, r', r_3, …) -> (r, r', k, …)."""
    if not torch.compiler.is_compiling():  # keeps less for the backward pass; a compiler decides itself what to keep
        return fold_one(core, kernel_factors)[0]
    *inner, last = kernel_factors
    kernel, size = core @ last.transpose(-2, -1), last.shape[0]
    for factor in reversed(inner):
        slices = kernel.reshape(-1, factor.shape[1], size)
        kernel, size = torch.bmm(factor.expand(len(slices), -1, -1), slices), size * factor.shape[0]
    return kernel.reshape(*core.shape[:2], *[factor.shape[0] for factor in kernel_factors])


def _by_groups(weight: Tensor, groups: int) -> Tensor:
    """All groups' copies of (out, …), one after the other."""
    return weight if groups == 1 else weight.repeat(groups, *[1] * (weight.ndim - 1))


def conv(layer: Any, core: Tensor, factors: Factors, input: Tensor) -> Tensor:
    """Equation 6: a pointwise convolution down, the core's with the layer's own options, a pointwise one up."""
    output_factor, input_factor, *kernel_factors = factors
    spatial, groups = len(kernel_factors), layer.groups
    thin = _pointwise(input, _by_groups(input_factor.transpose(-2, -1), groups), spatial, groups)
    kernel = _by_groups(_kernel(core, kernel_factors), groups).to(input.dtype)
    thin = layer._conv_forward(thin, kernel, None)
    return _pointwise(thin, output_factor, spatial, groups)


def conv_fused(
    layer: Any, weight: Tensor, bias: Bias, core: Tensor, factors: Factors, input: Tensor, execution: str
) -> Tensor:
    """Layer and update of a convolution with any padding mode: (b, g · i, …) -> (b, o, …)."""
    padding = layer._reversed_padding_repeated_twice  # numbers for both ends of each mode, even if given as "same"
    if layer.padding_mode != "zeros" or padding[::2] != padding[1::2]:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input, padding = F.pad(input, padding, mode=mode), [0] * len(padding)
    no_output_padding = (0,) * len(layer.stride)
    stride, padding, dilation = tuple(layer.stride), tuple(padding[::-2]), tuple(layer.dilation)
    geometry = Geometry(stride, padding, dilation, False, no_output_padding, layer.groups)
    return _convolve(weight, bias, core, factors, input, geometry, execution)


def conv_transposed_fused(
    layer: Any, weight: Tensor, bias: Bias, core: Tensor, factors: Factors, input: Tensor, execution: str
) -> Tensor:
    """Layer and update of a transposed convolution: (b, i, …) -> (b, g · o, …)."""
    stride, padding, dilation = tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation)
    geometry = Geometry(stride, padding, dilation, True, tuple(layer.output_padding), layer.groups)
    return _convolve(weight, bias, core, factors, input, geometry, execution)


def _convolve(
    weight: Tensor, bias: Bias, core: Tensor, factors: Factors, input: Tensor, geometry: Geometry, execution: str
) -> Tensor:
    single = input.ndim < weight.ndim  # a sample without a batch
    x = input.unsqueeze(0) if single else input
    output = convolution(x, weight, bias, core, factors, geometry, execution)
    return output.squeeze(0) if single else output


def conv_transposed(
    layer: Any, core: Tensor, factors: Factors, input: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """As ``conv``, for a transposed convolution, whose weight is (in, out/groups, k …)."""
    input_factor, output_factor, *kernel_factors = factors
    spatial, groups = len(kernel_factors), layer.groups
    down = input_factor.reshape(groups, -1, input_factor.shape[1]).transpose(-2, -1).flatten(0, 1)  # (g·r, i/g)
    thin = _pointwise(input, down, spatial, groups)
    kernel = _by_groups(_kernel(core, kernel_factors), groups).to(input.dtype)
    options = (layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation)
    padding = layer._output_padding(thin, output_size, *options)
    thin = _TRANSPOSED[spatial](thin, kernel, None, layer.stride, layer.padding, padding, groups, layer.dilation)
    return _pointwise(thin, _by_groups(output_factor, groups), spatial, groups)


def embedding(layer: Any, core: Tensor, factors: Factors, input: Tensor) -> Tensor:
    """Rows of the first factor, looked up and multiplied: indices (…) -> (…, o)."""
    row_factor, output_factor = factors
    update = F.linear(F.linear(F.embedding(input, row_factor), core.transpose(-2, -1)), output_factor)
    if layer.padding_idx is not None:  # as in the base layer, the padding row gets no gradient
        update = update.where((input != layer.padding_idx).unsqueeze(-1), update.detach())
    if hasattr(layer, "embed_scale"):
        update = update * layer.embed_scale
    return update


def embedding_plain(layer: Any, input: Tensor, weight: Tensor, bias: Bias) -> Tensor:
    """A lookup in this table (n, o), which has no bias."""
    output = F.embedding(input, weight, layer.padding_idx)
    return output * layer.embed_scale if hasattr(layer, "embed_scale") else output


def embedding_bag(
    layer: Any,
    core: Tensor,
    factors: Factors,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Bags of rows of the first factor, multiplied: (b, n) or (n,) with offsets -> (b, o)."""
    row_factor, output_factor = factors
    bags = F.embedding_bag(
        input,
        row_factor,
        offsets,
        mode=layer.mode,
        per_sample_weights=per_sample_weights
        if per_sample_weights is None
        else per_sample_weights.to(row_factor.dtype),
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )
    return F.linear(F.linear(bags, core.transpose(-2, -1)), output_factor)
