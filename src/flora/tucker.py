"""Tucker algebra on plain tensors (paper section 3.3, equation 4).

Axes, named once. A tensor of order N has modes n = 0 … N-1 of sizes (I_1, …, I_N); its core has sizes (r_1, …, r_N);
factor n is (I_n, r_n).

    X = G ×_1 A1 ×_2 A2 … ×_N AN        X[i1, …, iN] = Σ_{j1 … jN} G[j1, …, jN] A1[i1, j1] … AN[iN, jN]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-n unfolding: (I_1, …, I_N) -> (I_n, product of the other sizes), the other modes in their order."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor ×_n matrix``: (…, I_n, …) and (J, I_n) -> (…, J, …)."""
    last = tensor.ndim - 1  # neither -1 nor .mT, which torch cannot export to ONNX
    return torch.matmul(tensor.movedim(mode, last), matrix.transpose(0, 1)).movedim(last, mode)


def _last_product(core: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All products but one: two matrices whose product is ``core ×_1 factors[0] … ×_N factors[N-1]`` in memory.

    Each product takes the mode at one end and appends the result's at the other: after N of them all modes are in order
    again, and no tensor is ever permuted in memory. The last one is that of the first or the last mode, of which grows
    more, so that the tensors before it stay small.
    """
    growth = [factor.shape[0] / factor.shape[1] for factor in factors]
    if growth[-1] > growth[0]:
        for factor in factors[:-1]:
            core = torch.mm(core.reshape(factor.shape[1], -1).transpose(0, 1), factor.transpose(0, 1))
        return core.reshape(factors[-1].shape[1], -1).transpose(0, 1), factors[-1].transpose(0, 1)
    for factor in reversed(factors[1:]):
        core = torch.mm(factor, core.reshape(-1, factor.shape[1]).transpose(0, 1))
    return factors[0], core.reshape(-1, factors[0].shape[1]).transpose(0, 1)


def reconstruct(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``core ×_1 factors[0] … ×_N factors[N-1]``: (r_1, …, r_N) -> (I_1, …, I_N) (equation 4)."""
    return torch.mm(*_last_product(core, factors)).reshape([factor.shape[0] for factor in factors])


def add_tucker(tensor: Tensor, core: Tensor, factors: Sequence[Tensor], in_place: bool = False) -> Tensor:
    """``tensor + core ×_1 factors[0] … ×_N factors[N-1]``. The last product adds, so no second full tensor is formed.

    Args:
        tensor: (I_1, …, I_N).
        core, factors: (r_1, …, r_N), and (I_n, r_n) per mode.
        in_place: overwrite ``tensor``, which must be contiguous.
    """
    left, right = _last_product(core, factors)
    target = tensor.reshape(left.shape[0], right.shape[1])
    return torch.addmm(target, left, right, out=target if in_place else None).reshape(tensor.shape)


def as_product(core: Tensor, factors: Sequence[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """The Tucker tensor, unfolded along ``mode``, as an exact product of two matrices.

    Returns:
        left (I_mode, q) and right (q, the other sizes in their order); q is the smaller of r_mode and the product of
        the other ranks.
    """
    others = [factor for n, factor in enumerate(factors) if n != mode]
    slices = core.movedim(mode, 0)
    width = prod(slices.shape[1:])
    if width < slices.shape[0]:
        left = factors[mode] @ slices.flatten(1)
        slices = torch.eye(width, dtype=core.dtype, device=core.device).view(width, *slices.shape[1:])
    else:
        left = factors[mode]
    for n, factor in enumerate(others):
        slices = mode_product(slices, factor, n + 1)
    return left, slices.contiguous()


def project(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """``tensor ×_n factors[n]ᵀ`` for every mode whose factor is not None: (I_1, …, I_N) -> (r_1, …, r_N)."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = mode_product(tensor, factor.mT, mode)
    return tensor


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors of a matrix: (I, J) -> (I, rank), orthonormal columns.

    If J < rank, further orthonormal columns complete the basis. ``rank`` must not exceed I.
    """
    rows, columns = matrix.shape
    if columns <= rows:
        vectors = torch.linalg.svd(matrix, full_matrices=rank > columns).U
    else:  # the Gram matrix is the smaller problem
        vectors = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)
    return vectors[:, :rank].contiguous()


def hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Truncated higher-order SVD: (I_1, …, I_N) -> core (r_1, …, r_N) and orthonormal factors (I_n, r_n).

    Its error is at most √N times the least possible at these ranks (De Lathauwer, De Moor and Vandewalle, 2000a).
    """
    factors = [leading_vectors(unfold(tensor, mode), rank) for mode, rank in enumerate(ranks)]
    return project(tensor, factors), factors


def hooi(tensor: Tensor, ranks: Sequence[int], iterations: int = 10) -> tuple[Tensor, list[Tensor]]:
    """Higher-order orthogonal iteration: (I_1, …, I_N) -> core (r_1, …, r_N) and orthonormal factors (I_n, r_n).

    Starts from the truncated HOSVD, then sets each factor in turn to its optimum given the others. The error never
    grows from one iteration to the next (De Lathauwer, De Moor and Vandewalle, 2000b).
    """
    _, factors = hosvd(tensor, ranks)
    for _ in range(iterations):
        for mode, rank in enumerate(ranks):
            others = [None if n == mode else factor for n, factor in enumerate(factors)]
            factors[mode] = leading_vectors(unfold(project(tensor, others), mode), rank)
    return project(tensor, factors), factors


def block_sum(
    spaces: Sequence[tuple[Tensor, Sequence[Tensor]]], weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Exact weighted sum of Tucker tensors of one shape: cores on the block diagonal, factors side by side.

    Args:
        spaces: one (core, factors) pair per tensor.
        weights: one number per tensor.

    Returns:
        core and factors. Each rank is the sum of the tensors' ranks, cut to the mode's size (``cut_ranks``).
    """
    cores = [weight * core for (core, _), weight in zip(spaces, weights, strict=True)]
    core = cores[0].new_zeros([sum(sizes) for sizes in zip(*(c.shape for c in cores), strict=True)])
    start = [0] * core.ndim
    for block in cores:
        core[tuple(slice(s, s + size) for s, size in zip(start, block.shape, strict=True))] = block
        start = [s + size for s, size in zip(start, block.shape, strict=True)]
    factors = [torch.cat(columns, dim=1) for columns in zip(*(factors for _, factors in spaces), strict=True)]
    return cut_ranks(core, factors)


def orthonormal(
    core: Tensor, factors: Sequence[Tensor], modes: Iterable[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The same tensor with orthonormal factors: QR of each factor, its triangle multiplied into the core.

    A rank above its mode's size is cut to that size. With all factors orthonormal, the tensor's norm is the core's.

    Args:
        modes: the modes to change; None for all.
    """
    factors = list(factors)
    for mode in range(len(factors)) if modes is None else modes:
        factors[mode], triangle = torch.linalg.qr(factors[mode])
        core = mode_product(core, triangle, mode)
    return core, factors


def cut_ranks(core: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same tensor, with every rank above its mode's size cut to that size."""
    return orthonormal(core, factors, [n for n, factor in enumerate(factors) if factor.shape[1] > factor.shape[0]])


def truncate(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Approximate a tensor: (I_1, …, I_N) -> core (r_1, …, r_N) and orthonormal factors (I_n, r_n).

    With at most two modes longer than 1 this is the truncated SVD, the nearest tensor of these ranks. With more it is
    ``hooi``.
    """
    long = sorted((mode for mode, size in enumerate(tensor.shape) if size > 1), key=lambda mode: tensor.shape[mode])
    if len(long) > 2:
        return hooi(tensor, ranks)
    factors = [tensor.new_ones(1, 1) for _ in ranks]
    core = tensor
    for mode in long:  # the shorter mode first, so that the other one's problem is small
        factors[mode] = leading_vectors(unfold(core, mode), ranks[mode])
        core = mode_product(core, factors[mode].mT, mode)
    return core, factors


def round_ranks(core: Tensor, factors: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """``truncate`` a Tucker tensor to lower ranks, without forming the full tensor."""
    core, bases = orthonormal(core, factors)
    core, inner = truncate(core, [min(rank, size) for rank, size in zip(ranks, core.shape, strict=True)])
    return core, [basis @ factor for basis, factor in zip(bases, inner, strict=True)]
