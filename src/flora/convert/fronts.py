"""Ranks from spectra: how much a truncation keeps of a tensor, and which ranks keep the most within a budget.

Let the columns of U_n be all singular vectors of mode n. Then S = D ×_1 U_1ᵀ … ×_N U_Nᵀ has the norm of D, and the
truncated HOSVD at ranks r keeps the leading block of S: energy E(r) = ‖S[:r_1, …, :r_N]‖², error² = ‖D‖² - E(r). HOOI
starts from there and keeps no less. (The modes' spectra alone give only the bound error² ≤ Σ_n Σ_{i > r_n} σ_{n,i}²
(De Lathauwer et al., 2000), which for a matrix is twice the error².)

The front of a tensor is its Pareto front: all ranks at which no cheaper ranks keep as much energy. It is all that must
be remembered of a layer until the ranks are chosen. The budget is spent where it buys the most energy per parameter,
along the concave hulls of the fronts. Up to the first step that does not fit, no other choice of as many parameters
keeps more. Only the remaining budget, less than that step costs, is spent without this guarantee.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flora import tucker
from flora.ranks import Ranks

FINE = 64  # up to here every rank is considered; above, ranks in steps of 1/32 of their size


@dataclass(frozen=True)
class Front:
    """The Pareto front of one tensor D, with P points.

    Args:
        ranks: (P, N).
        parameters: (P,), in ascending order.
        energies: (P,), the part of ‖D‖² that the ranks keep, in ascending order.
        total: ‖D‖².
        spectra: the singular values of every mode's unfolding, in descending order.
    """

    ranks: Tensor
    parameters: Tensor
    energies: Tensor
    total: float
    spectra: list[list[float]]

    def at(self, index: int) -> Ranks:
        """The ranks of one point."""
        return tuple(self.ranks[index].tolist())

    def keeping(self, share: float) -> Ranks:
        """The cheapest ranks that keep this share of the energy. A share of 1 keeps all that exceeds rounding."""
        index = int(torch.searchsorted(self.energies, share * self.total))
        return self.at(min(index, len(self.energies) - 1))


def front_of(tensor: Tensor, sizes: Sequence[int] | None = None) -> Front:
    """The front of a tensor.

    Args:
        tensor: D, or its core in orthonormal bases: float64, not zero.
        sizes: (I_1, …, I_N), if ``tensor`` is a core.
    """
    sizes = tensor.shape if sizes is None else sizes
    total = tensor.square().sum().item()
    long = [mode for mode, size in enumerate(tensor.shape) if size > 1]
    if len(long) <= 2:
        values = _matrix_energies(tensor)
        counts = torch.arange(1, len(values) + 1)
        ranks = torch.stack([counts if mode in long else torch.ones_like(counts) for mode in range(tensor.ndim)], 1)
        energies, squares = values.cumsum(0), [values if n in long else values.sum()[None] for n in range(tensor.ndim)]
    else:
        most = [min(size, tensor.numel() // size) for size in tensor.shape]
        energies = tucker.hosvd(tensor, most)[0].square_()
        squares = [tucker.unfold(energies, mode).sum(1) for mode in range(tensor.ndim)]
        steps = [_steps(size) for size in most]
        for mode, step in enumerate(steps):
            energies = energies.cumsum(mode).index_select(mode, step - 1)
        energies, ranks = energies.flatten(), torch.cartesian_prod(*steps)
    parameters = ranks.prod(1) + ranks @ torch.tensor(sizes)
    spectra = [values.sqrt().tolist() for values in squares]
    rounding = max(tensor.shape) * torch.finfo(torch.float64).eps
    kept = _undominated(parameters, energies, (1 - rounding) * total)
    return Front(ranks[kept], parameters[kept], energies[kept].clamp(max=total), total, spectra)


def _matrix_energies(tensor: Tensor) -> Tensor:
    """Squared singular values, in descending order, of a tensor with at most two modes longer than 1."""
    matrix = tensor.squeeze()
    matrix = matrix.reshape(matrix.shape[0] if matrix.ndim else 1, -1)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def _steps(size: int) -> Tensor:
    steps = list(range(1, min(size, FINE) + 1))
    while steps[-1] < size:
        steps.append(min(size, steps[-1] + steps[-1] // 32))
    return torch.tensor(steps)


def _undominated(costs: Tensor, gains: Tensor, enough: float) -> Tensor:
    """Indices of the points that gain more than every other point of at most their cost, in the order of costs, up to
    the first that gains ``enough``."""
    order = torch.argsort(gains, descending=True, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    best = gains[order].cummax(0).values
    rises = torch.ones_like(best, dtype=torch.bool)
    rises[1:] = best[1:] > best[:-1]
    order = order[rises]
    return order[: int(torch.searchsorted(gains[order], enough)) + 1]


# ------------------------------------------------------------------------------------------- one budget for all tensors


def spend(fronts: Sequence[Front], budget: int, each: bool = False) -> list[Ranks | None]:
    """Ranks for every tensor that together have at most ``budget`` parameters and keep as much energy as possible (see
    the module). In the end no further point of a front fits.

    Args:
        fronts: one per tensor.
        budget: a number of parameters.
        each: every tensor must get ranks. Otherwise a tensor that is not worth its parameters gets None.

    Raises:
        ValueError: if the budget is too small, with the least possible number of parameters.
    """
    costs = [front.parameters.tolist() for front in fronts]
    gains = [front.energies.tolist() for front in fronts]
    if not each:  # a tensor without ranks costs nothing
        costs, gains = [[0, *cost] for cost in costs], [[0.0, *gain] for gain in gains]
    least = sum(cost[0] for cost in costs) if each else min(cost[1] for cost in costs)
    if least > budget:
        raise ValueError(f"a budget of {budget} parameters is too small for these weights: least possible {least}")
    chosen = [0] * len(fronts)
    spare = budget - sum(cost[0] for cost in costs)
    edges = (_hull(i, cost, gain) for i, (cost, gain) in enumerate(zip(costs, gains, strict=True)))
    for _, i, end in heapq.merge(*edges, reverse=True):
        if costs[i][end] - costs[i][chosen[i]] > spare:
            break
        spare -= costs[i][end] - costs[i][chosen[i]]
        chosen[i] = end
    while True:
        ends = [bisect_right(cost, cost[now] + spare) - 1 for cost, now in zip(costs, chosen, strict=True)]
        gained = [gain[end] - gain[now] for gain, now, end in zip(gains, chosen, ends, strict=True)]
        most = max(range(len(fronts)), key=gained.__getitem__)
        if gained[most] <= 0:
            break
        spare -= costs[most][ends[most]] - costs[most][chosen[most]]
        chosen[most] = ends[most]
    shift = 0 if each else 1
    return [None if now < shift else front.at(now - shift) for front, now in zip(fronts, chosen, strict=True)]


def _hull(i: int, costs: list[int], gains: list[float]) -> Iterator[tuple[float, int, int]]:
    """The edges of the upper concave hull of tensor i's front, steepest first: (gain per cost, i, index of the end)."""

    def slope(start: int, end: int) -> float:
        return (gains[end] - gains[start]) / (costs[end] - costs[start])

    hull: list[int] = []
    for new in range(len(costs)):
        while len(hull) > 1 and slope(*hull[-2:]) <= slope(hull[-1], new):
            hull.pop()
        hull.append(new)
    for start, end in pairwise(hull):
        yield slope(start, end), i, end


def lora_energy(spectra: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> float:
    """The most energy that plain low-rank products keep with at most ``budget`` parameters.

    Args:
        spectra: the singular values of every matrix.
        costs: the parameters per rank of every matrix.
    """
    steps = [(value**2 / cost, cost) for values, cost in zip(spectra, costs, strict=True) for value in values]
    kept = 0.0
    for gain, cost in sorted(steps, reverse=True):
        if cost <= budget:
            kept, budget = kept + gain * cost, budget - cost
    return kept
