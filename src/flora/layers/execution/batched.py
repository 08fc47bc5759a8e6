"""Products and copies for the tensors of many layers at once.

Letters: L layers; o and i sizes of a weight's first and second mode (i per group of channels), r and s their ranks, q
the smaller one; k kernel taps, c the product of the kernel ranks, n = i · k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from flora.layers.versions import torch_since

SUMS_IN_FLOAT32 = torch_since(2, 8)  # bmm(…, out_dtype=), on CUDA only


def split(tensors: Iterable[Any], sizes: Iterable[int]) -> list[list[Any]]:
    """A flat sequence -> lists of these sizes, in order."""
    rest = iter(tensors)
    return [list(islice(rest, size)) for size in sizes]


def unstack(stacks: Iterable[Tensor]) -> list[Tensor]:
    """Stacks (L, …) -> the tensors of all of them, in order."""
    return [tensor for stack in stacks for tensor in stack.unbind(0)]


def stack_all(lists: Sequence[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Lists of L tensors of one shape -> stacks (L, …) in ``dtype``; on CUDA one multi-tensor copy for all lists."""
    if not lists[0][0].is_cuda:
        return [torch.stack(own).to(dtype) for own in lists]
    stacks = [own[0].new_empty((len(own), *own[0].shape), dtype=dtype) for own in lists]
    # a copy of mixed types would run tensor by tensor
    for kind in {own[0].dtype for own in lists}:
        pairs = [(stack, own) for stack, own in zip(stacks, lists, strict=True) if own[0].dtype == kind]
        slots = [slot for stack, _ in pairs for slot in stack.unbind(0)]
        torch._foreach_copy_(slots, [tensor for _, own in pairs for tensor in own])
    return stacks


def cast_all(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same tensors in ``dtype``, contiguous if they are cast: one multi-tensor copy, or none. While autograd
    records, they are cast one by one, since that copy has no derivative."""
    if tensors[0].dtype == dtype:
        return tensors
    if torch.is_grad_enabled():
        return [tensor.to(dtype) for tensor in tensors]
    results = [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for batches of matrices, returned in ``dtype``. On CUDA a float32 result is never rounded to a's type."""
    if a.dtype != dtype == torch.float32 and a.is_cuda and SUMS_IN_FLOAT32:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a, b).to(dtype)


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product (L, k, c) of kernel factors (L, k_m, r_m)."""
    basis = factors[0]
    for factor in factors[1:]:
        basis = (basis[:, :, None, :, None] * factor[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    return basis


def _kronecker_backward(d_basis: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of ``kronecker`` -> those of its factors."""
    if len(factors) == 1:
        return [d_basis]
    first, rest = factors[0], kronecker(factors[1:])
    (count, k, r), (_, taps, ranks) = first.shape, rest.shape
    pairs = d_basis.view(count, k, taps, r, ranks).transpose(2, 3).contiguous().view(count, k * r, taps * ranks)
    d_first = torch.bmm(pairs, rest.reshape(count, -1, 1)).view(first.shape)
    d_rest = torch.bmm(pairs.transpose(1, 2), first.reshape(count, -1, 1)).view(rest.shape)
    return [d_first, *_kronecker_backward(d_rest, factors[1:])]


def fold(core: Tensor, kernels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The core (L, r, s, …) times the kernel factors, K = G ×_3 C ×_4 D of equation 6: (L, r · s, k). And their
    Kronecker product."""
    basis = kronecker(kernels)
    return torch.bmm(core.flatten(3).flatten(1, 2), basis.transpose(1, 2)), basis


def fold_backward(d_kernel: Tensor, core: Tensor, kernels: Sequence[Tensor], basis: Tensor) -> list[Tensor]:
    """The gradient of K -> those of core and kernels."""
    d_basis = torch.bmm(d_kernel.transpose(1, 2), core.flatten(3).flatten(1, 2))
    return [torch.bmm(d_kernel, basis).view(core.shape), *_kronecker_backward(d_basis, kernels)]


def update_rows(core: Tensor, right: Tensor, kernels: Sequence[Tensor], channels_last: bool) -> list[Tensor]:
    """R (L, r, n) with A R the update; for a convolution also what ``rows_backward`` needs.

    Args:
        core: (L, r, s, …), the scale in it. right: (L, i, s). kernels: (L, k_m, r_m) per kernel mode.
        channels_last: n counts kernel taps before inputs, as the weight lies in memory.
    """
    if not kernels:
        return [torch.bmm(core, right.mT)]
    count, r, s = core.shape[:3]
    kernel, basis = fold(core, kernels)
    thin = kernel.view(count, r, s, -1).transpose(1, 2).reshape(count, s, -1)  # (L, s, r · k)
    taps = torch.bmm(right, thin).view(count, right.shape[1], r, -1)  # (L, i, r, k)
    rows = taps.permute(0, 2, 3, 1) if channels_last else taps.transpose(1, 2)
    return [rows.reshape(count, r, -1), basis, thin]


def rows_backward(
    d_rows: Tensor,
    core: Tensor,
    right: Tensor,
    kernels: Sequence[Tensor],
    inner: Sequence[Tensor],
    channels_last: bool,
) -> list[Tensor]:
    """The gradient of R -> those of core, right and kernels. ``inner``: what ``update_rows`` returned beside R."""
    if not kernels:
        return [torch.bmm(d_rows, right), torch.bmm(d_rows.mT, core)]
    basis, thin = inner
    (count, r, s), i = core.shape[:3], right.shape[1]
    if channels_last:
        d_taps = d_rows.view(count, r, -1, i).permute(0, 3, 1, 2)
    else:
        d_taps = d_rows.view(count, r, i, -1).transpose(1, 2)
    d_taps = d_taps.reshape(count, i, -1)
    d_right = torch.bmm(d_taps, thin.mT)
    d_kernel = torch.bmm(right.mT, d_taps).view(count, s, r, -1).transpose(1, 2).reshape(count, r * s, -1)
    d_core, *d_kernels = fold_backward(d_kernel, core, kernels, basis)
    return [d_core, d_right, *d_kernels]
