"""Ranks from spectra: what a truncation keeps of a tensor, and which ranks keep the most under a budget.

With full orthonormal bases U_n of the modes' singular vectors, S = D ×_1 U_1ᵀ … ×_N U_Nᵀ is as long as D, and the
truncated HOSVD of ranks r keeps its leading block: energy E(r) = ‖S[:r_1, …, :r_N]‖², error² = ‖D‖² - E(r). (The
modes' spectra alone only bound it, error² ≤ Σ_n Σ_{i > r_n} σ_{n,i}² (De Lathauwer et al., 2000): twice too much for a
matrix.) HOOI, which starts from there, keeps no less.

A front is the ranks of one tensor that no cheaper ones beat: all that has to be remembered of a layer. Between layers
the budget goes where it buys the most energy per parameter, along the fronts' concave hulls. As long as the next step
still fits, what is chosen is the best there is for the parameters it takes; only what is then left of the budget, less
than that step, is spent without such a guarantee.
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

FINE = 64  # ranks up to here are all looked at; beyond, steps of a 32nd part do


@dataclass(frozen=True)
class Front:
    """Ranks (P, N), their parameters (P,), rising, and the energy they keep (P,), rising. ``total``: ‖D‖². ``spectra``:
    the singular values of every mode's unfolding, falling."""

    ranks: Tensor
    parameters: Tensor
    energies: Tensor
    total: float
    spectra: list[list[float]]

    def at(self, index: int) -> Ranks:
        return tuple(self.ranks[index].tolist())

    def keeping(self, share: float) -> Ranks:
        """The cheapest ranks that keep this share of the energy; all that is more than rounding for a share of 1."""
        index = int(torch.searchsorted(self.energies, share * self.total))
        return self.at(min(index, len(self.energies) - 1))


def front(tensor: Tensor, sizes: Sequence[int] | None = None) -> Front:
    """The front of a float64 tensor that is not zero; ``sizes`` are the I_n where it stands in bases of its modes."""
    sizes = tensor.shape if sizes is None else sizes
    total = tensor.square().sum().item()
    long = [mode for mode, size in enumerate(tensor.shape) if size > 1]
    if len(long) <= 2:
        values = _matrix_energies(tensor)
        steps = torch.arange(1, len(values) + 1)
        ranks = torch.stack([steps if mode in long else torch.ones_like(steps) for mode in range(tensor.ndim)], 1)
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
    """Squared singular values, falling, of a tensor with at most two modes longer than 1."""
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
    """Indices of what gains more than all that costs no more, by cost, up to the first that gains enough."""
    order = torch.argsort(gains, descending=True, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    best = gains[order].cummax(0).values
    rises = torch.ones_like(best, dtype=torch.bool)
    rises[1:] = best[1:] > best[:-1]
    order = order[rises]
    return order[: int(torch.searchsorted(gains[order], enough)) + 1]


# -------------------------------------------------------------------------------------------------- one budget for all


def spend(fronts: Sequence[Front], budget: int, each: bool = False) -> list[Ranks | None]:
    """Ranks for every tensor, which together have at most ``budget`` parameters and keep as much energy as they can; no
    further point of a front fits. None for a tensor that gets nothing; no tensor does if ``each`` must have ranks.

    Raises ValueError where the budget is too small, with the least possible number.
    """
    costs = [front.parameters.tolist() for front in fronts]
    gains = [front.energies.tolist() for front in fronts]
    if not each:  # what is left out costs nothing
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
    """The edges of tensor i's upper concave hull, steepest first: (gain per cost, i, index of its end)."""

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
    """The most energy that plain low-rank products keep with at most ``budget`` parameters: matrices by their singular
    values, ``costs`` parameters a rank."""
    steps = [(value**2 / cost, cost) for values, cost in zip(spectra, costs, strict=True) for value in values]
    kept = 0.0
    for gain, cost in sorted(steps, reverse=True):
        if cost <= budget:
            kept, budget = kept + gain * cost, budget - cost
    return kept
