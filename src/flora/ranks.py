"""From what the user asks (a rank, one a mode, a budget) to ranks and parameter counts. Integers only.

A weight is described by its ``shape`` (I_1, …, I_N) and its ``roles``, one a mode: "out", "in", "kernel" or "other".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One weight to be given ranks: its shape, the role of each mode, and the ranks if they are fixed already."""

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    fixed: Ranks | None = None


def parameter_count(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Trainable parameters of one core space: the core's, and I_n · r_n for each factor (paper section 4.1)."""
    return prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def default_kernel_rank(size: int) -> int:
    """Half of the mode, rounded up: 1 for 1, 2 for 3 (the paper's r3), 3 for 5, 4 for 7."""
    return (size + 1) // 2


def uniform_ranks(weight: Weight, r: int, kernel_rank: int | None) -> Ranks:
    """Rank ``r`` for every mode but the kernel's, which get ``kernel_rank``; never above the mode's size."""

    def rank(size: int, role: str) -> int:
        if role != "kernel":
            return min(r, size)
        return default_kernel_rank(size) if kernel_rank is None else min(kernel_rank, size)

    return tuple(rank(size, role) for size, role in zip(weight.shape, weight.roles, strict=True))


def given_ranks(weight: Weight, r: int | Sequence[int], kernel_rank: int | None) -> Ranks:
    """The ranks that the user asked for with ``r``, an int or one rank a mode, clipped to the modes' sizes."""
    if isinstance(r, int):
        return uniform_ranks(weight, r, kernel_rank)
    if len(r) != len(weight.shape):
        raise ValueError(
            f"{len(r)} ranks {list(r)} for a weight of {len(weight.shape)} modes, shape {list(weight.shape)}; "
            "give one rank a mode, or a single number"
        )
    return tuple(min(rank, size) for rank, size in zip(r, weight.shape, strict=True))


def solve_budget(weights: Sequence[Weight], budget: int, kernel_rank: int | None) -> list[Ranks]:
    """Ranks for every weight such that all together have at most ``budget`` parameters, and as near it as can be.

    The largest common rank that fits comes first, as a user of a single rank would choose it. What is left is spent
    weight by weight on the next rank, then mode by mode, until no single step fits any more.

    Raises ValueError where even rank 1 everywhere is over the budget, with the least possible number.
    """

    def at(level: int) -> list[Ranks]:
        return [w.fixed or uniform_ranks(w, level, kernel_rank) for w in weights]

    def total(ranks: Sequence[Ranks]) -> int:
        return sum(parameter_count(w.shape, r) for w, r in zip(weights, ranks, strict=True))

    least = at(1) if kernel_rank is not None else [w.fixed or (1,) * len(w.shape) for w in weights]
    if total(least) > budget:
        raise ValueError(
            f"a budget of {budget} parameters is too small for these weights: least possible {total(least)}"
        )
    if total(at(1)) > budget:  # the kernel modes' default ranks do not fit: fill up from rank 1 instead
        return _fill_modes(weights, least, budget - total(least), kernel_rank)
    low, high = 1, max(max(w.shape) for w in weights) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(at(middle)) <= budget else (low, middle)
    solved = at(low)
    spare = budget - total(solved)
    for i, (weight, upper) in enumerate(zip(weights, at(low + 1), strict=True)):
        cost = parameter_count(weight.shape, upper) - parameter_count(weight.shape, solved[i])
        if cost <= spare:
            solved[i], spare = upper, spare - cost
    return _fill_modes(weights, solved, spare, kernel_rank)


def _fill_modes(weights: Sequence[Weight], ranks: list[Ranks], spare: int, kernel_rank: int | None) -> list[Ranks]:
    """Spend ``spare`` parameters on single modes, one rank at a time and the same for all, while any step fits. A
    kernel rank that the user has chosen stays."""
    ranks = list(ranks)
    progress = True
    while progress:
        progress = False
        for i, weight in enumerate(weights):
            if weight.fixed:
                continue
            for mode, size in enumerate(weight.shape):
                if ranks[i][mode] == size or (weight.roles[mode] == "kernel" and kernel_rank is not None):
                    continue
                cost = size + prod(ranks[i]) // ranks[i][mode]
                if cost <= spare:
                    ranks[i] = tuple(rank + (n == mode) for n, rank in enumerate(ranks[i]))
                    spare -= cost
                    progress = True
    return ranks
