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
    """The same tensors in ``dtype``: one multi-tensor copy, or none."""
    if tensors[0].dtype == dtype:
        return tensors
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for batches of matrices, returned in ``dtype``. On CUDA a float32 result is never rounded to a's type."""
    if a.dtype != dtype == torch.float32 and a.is_cuda and SUMS_IN_FLOAT32:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a, b).to(dtype)


def update_rows(core: Tensor, right: Tensor, kernels: Sequence[Tensor], channels_last: bool) -> list[Tensor]:
    """R (L, r, n) with A R the update; for a convolution also what ``rows_backward`` needs.

    Args:
        core: (L, r, s, …), the scale in it. right: (L, i, s). kernels: (L, k_m, r_m) per kernel mode.
        channels_last: n counts kernel taps before inputs, as the weight lies in memory.
    """
    if not kernels:
        return [torch.bmm(core, right.mT)]
    count, r, s = core.shape[:3]
    basis = kernels[0]  # the Kronecker product of the kernel factors: (L, k, c)
    for factor in kernels[1:]:
        basis = (basis[:, :, None, :, None] * factor[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    thin = torch.bmm(core.transpose(1, 2).reshape(count, s * r, -1), basis.mT).view(count, s, -1)  # (L, s, r · k)
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
    d_thin = torch.bmm(right.mT, d_taps).view(count, s * r, -1)
    d_core = torch.bmm(d_thin, basis).view(count, s, r, *core.shape[3:]).transpose(1, 2).contiguous()
    d_basis = torch.bmm(d_thin.mT, core.transpose(1, 2).reshape(count, s * r, -1))
    return [d_core, d_right, *_kernel_gradients(d_basis, kernels)]


def _kernel_gradients(d_basis: Tensor, kernels: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the Kronecker product (L, k, c) -> those of its factors (L, k_m, r_m)."""
    if len(kernels) == 1:
        return [d_basis]
    taps, ranks = "abcd"[: len(kernels)], "wxyz"[: len(kernels)]
    d_basis = d_basis.view(-1, *(f.shape[1] for f in kernels), *(f.shape[2] for f in kernels))
    terms = [f"L{tap}{rank}" for tap, rank in zip(taps, ranks, strict=True)]
    results = []
    for n in range(len(kernels)):
        others = ",".join(terms[:n] + terms[n + 1 :])
        results.append(torch.einsum(f"L{taps}{ranks},{others}->{terms[n]}", d_basis, *kernels[:n], *kernels[n + 1 :]))
    return results
