"""ΔW in a compiler's graph under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.convolution import fold_one, fold_one_backward, project_weight, rows_of


def delta_in_graph(core: Tensor, factors: Sequence[Tensor], low: torch.dtype) -> Tensor:
    """``core ×_1 factors[0] …``, formed in the core's type and rounded once to ``low``, and its gradient likewise.

    Compilers trace the backward pass of plain operations under the autocast that the model runs in, whatever their
    forward says: every product on weights would cast its operands. A function's own backward pass can turn it off.
    """
    return _Delta.apply(low, core, *factors)


class _Delta(Function):
    """ΔW = A R; of a matrix R = G Bᵀ, of a convolution as in ``convolution``."""

    @staticmethod
    def forward(ctx: Any, low: torch.dtype, *parameters: Tensor) -> Tensor:
        core, first, second, *kernels = parameters
        with torch.autocast(core.device.type, enabled=False):
            kernel, basis = fold_one(core, kernels) if kernels else (core, core)
            rows = rows_of(kernel, second) if kernels else core @ second.mT
            ctx.save_for_backward(kernel, basis, rows, *parameters)
            return (first @ rows.flatten(1)).view([factor.shape[0] for factor in parameters[1:]]).to(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernel, basis, rows, core, first, second, *kernels = ctx.saved_tensors
        with torch.autocast(core.device.type, enabled=False):
            dense = gradients[0].to(core.dtype).flatten(1)
            if not kernels:
                drows = first.mT @ dense
                return None, drows @ second, dense @ rows.mT, drows.mT @ core
            dkernel, dfirst, dsecond = project_weight(dense, kernel, first, second, rows)
            dcore, dkernels = fold_one_backward(dkernel, core, kernels, basis)
            return None, dcore, dfirst, dsecond, *dkernels
