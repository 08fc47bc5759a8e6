"""Products with thin tensors: those that have a rank in the place of a width.

Letters: b batch, i channels, p positions (rows of a matrix, pixels), s a rank, g groups. A thin tensor is (b, s, p).
Instead of batches (b, i, p) all functions take rows (p, i), too, whose thin tensor is (p, s).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _batched(factor: Tensor, tensor: Tensor) -> Tensor:
    """(i, s), or (g · i, s) with all groups' rows, -> (b, i, s) for a tensor (b, i, p) whose b counts groups too."""
    if factor.shape[0] == tensor.shape[1]:
        return factor.expand(tensor.shape[0], -1, -1)
    parts = factor.reshape(1, -1, tensor.shape[1], factor.shape[1])
    return parts.expand(tensor.shape[0] // parts.shape[1], -1, -1, -1).flatten(0, 1)


def project(tensor: Tensor, factor: Tensor) -> Tensor:
    """(b, i, p), (i, s) -> thin (b, s, p): channels onto a factor's columns."""
    if tensor.ndim == 2:
        return tensor.mm(factor)
    return torch.bmm(_batched(factor, tensor).mT, tensor)


def add_lifted_(tensor: Tensor, thin: Tensor, factor: Tensor) -> None:
    """tensor (b, i, p) += factor (i, s) · thin (b, s, p), in place."""
    if tensor.ndim == 2:
        tensor.addmm_(thin, factor.mT)
        return
    factor = _batched(factor, tensor)
    if tensor.stride(-1) == 1:
        tensor.baddbmm_(factor, thin)
    else:
        tensor.mT.baddbmm_(thin.mT, factor.mT)


def correlate(thin: Tensor, tensor: Tensor, factor: Tensor) -> Tensor:
    """thin (b, s, p), (b, i, p) -> the gradient (i, s), or (g · i, s), of the factor that lies between them."""
    if tensor.ndim == 2:
        return tensor.mT.mm(thin)
    gradient = torch.bmm(thin, tensor.mT)
    groups = factor.shape[0] // tensor.shape[1]
    if groups == 1:
        return (gradient[0] if len(gradient) == 1 else gradient.sum(0)).mT
    return gradient.unflatten(0, (-1, groups)).sum(0).mT.flatten(0, 1)
