"""Stacked experts: W' of all experts once per forward, and one gradient for the whole stack.

The loop over experts reads `weight[e]`. On a parameter each such slice has a gradient of the full stack's size; on a
list of matrices from one `unbind` all gradients are collected in one stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from batched import product
from torch import Tensor, nn
from torch.autograd import Function


class Matrices(list):
    """Stands in for a stacked weight (E, o, i). An index may be a tensor."""

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(int(index))


class MergedStack(Function):
    """W' = W + A_e R_e per expert e, rounded once to ``low``; W (E, o, i), A (E, o, q), R (E, q, i).

    Backward projects the dense gradient in ``low``, with sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, rows: Tensor, low: torch.dtype) -> Tensor:
        ctx.save_for_backward(left, rows)
        return torch.baddbmm(weight.to(left.dtype), left, rows).to(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dense,) = gradients
        left, rows = ctx.saved_tensors
        d_left = product(dense, rows.mT.to(dense.dtype), left.dtype)
        d_rows = product(left.mT.to(dense.dtype), dense, left.dtype)
        return None, d_left, d_rows, None


class MergedExperts(nn.Module):
    """A module with stacked parameters, some of them adapted."""

    def __init__(self, base: nn.Module, spaces: Mapping[str, tuple[Tensor, Sequence[Tensor], float]]) -> None:
        """spaces: per name of a parameter (E, o, i): core (e, r, s); factors (E, e), (o, r), (i, s); scale."""
        super().__init__()
        self.base = base
        self.cores = nn.ParameterDict({name: core for name, (core, _, _) in spaces.items()})
        self.factors = nn.ModuleDict({name: nn.ParameterList(factors) for name, (_, factors, _) in spaces.items()})
        self.scales = {name: scale for name, (_, _, scale) in spaces.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        merged = {name: Matrices(self.merge(name).unbind(0)) for name in self.scales}
        vars(self.base).update(merged)  # found before the parameters of these names
        try:
            return self.base(*args, **kwargs)
        finally:
            for name in merged:
                del vars(self.base)[name]

    def merge(self, name: str) -> Tensor:
        """W' (E, o, i) of an adapted parameter, in the compute type."""
        weight, core, (expert, left, right) = self.base._parameters[name], self.cores[name], self.factors[name]
        device = core.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            cores = (expert @ core.flatten(1)).view(-1, *core.shape[1:]) * self.scales[name]  # (E, r, s)
            left, right = left.expand(len(cores), -1, -1), right.expand(len(cores), -1, -1)
            if core.shape[1] <= core.shape[2]:
                return MergedStack.apply(weight, left, torch.bmm(cores, right.mT), low)
            return MergedStack.apply(weight, torch.bmm(left, cores), right.mT, low)
