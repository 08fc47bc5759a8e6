"""From what the user asks (a rank, one per mode, a budget) to ranks and parameter counts. Integers only.

A weight is described by its ``shape`` (I_1, …, I_N) and its ``roles``, one per mode: "out", "in", "kernel" or "other".
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


def fits(ranks: Sequence[int], shape: Sequence[int]) -> bool:
    """One rank a mode, each from 1 to the mode's size."""
    return len(ranks) == len(shape) and all(1 <= rank <= size for rank, size in zip(ranks, shape, strict=True))


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
    """The ranks that the user asked for with ``r``, an int or one rank per mode, clipped to the modes' sizes."""
    if isinstance(r, int):
        return uniform_ranks(weight, r, kernel_rank)
    if len(r) != len(weight.shape):
        raise ValueError(
            f"{len(r)} ranks {list(r)} for a weight of {len(weight.shape)} modes, shape {list(weight.shape)}; "
            "give one rank per mode, or a single number"
        )
    return tuple(min(rank, size) for rank, size in zip(r, weight.shape, strict=True))


def useful(ranks: Ranks) -> Ranks:
    """Each rank cut to the product of the others: a core can have no more independent slices along a mode than that."""
    while (cut := tuple(min(rank, prod(ranks) // rank) for rank in ranks)) != ranks and len(ranks) > 1:
        ranks = cut
    return ranks


def solve_budget(weights: Sequence[Weight], budget: int, kernel_rank: int | None) -> list[Ranks]:
    """Ranks for every weight such that all together have at most ``budget`` parameters, and as near it as can be.

    The largest common rank that fits comes first, as a user of a single rank would choose it. What is left gives as
    many weights as possible, the cheapest first, the next rank; then goes to single modes; and only in the end to ranks
    beyond what the other modes can use, until no single step fits any more.

    Raises ValueError where even rank 1 everywhere is over the budget, with the least possible number.
    """

    def at(weight: Weight, level: int) -> Ranks:
        return weight.fixed or useful(uniform_ranks(weight, level, kernel_rank))

    def total(ranks: Sequence[Ranks]) -> int:
        return sum(parameter_count(w.shape, r) for w, r in zip(weights, ranks, strict=True))

    ones = [w.fixed or uniform_ranks(w, 1, 1) for w in weights]
    least = ones if kernel_rank is None else [w.fixed or uniform_ranks(w, 1, kernel_rank) for w in weights]
    if total(least) > budget:
        raise ValueError(
            f"a budget of {budget} parameters is too small for these weights: least possible {total(least)}"
        )
    low, high = 0, max(max(w.shape) for w in weights) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = total([at(w, middle) for w in weights]) <= budget
        low, high = (middle, high) if fits else (low, middle)
    solved = [at(w, low) for w in weights] if low else least
    spare = budget - total(solved)

    def next_rank(i: int) -> tuple[int, Ranks]:
        more = at(weights[i], low + 1)
        return parameter_count(weights[i].shape, more) - parameter_count(weights[i].shape, solved[i]), more

    for i in sorted(range(len(weights)), key=lambda i: next_rank(i)[0]):
        cost, more = next_rank(i)
        if 0 < cost <= spare:
            solved[i], spare = more, spare - cost
    for beyond in (False, True):
        solved, spare = _fill_modes(weights, solved, spare, kernel_rank, beyond)
    return solved


def _fill_modes(
    weights: Sequence[Weight], ranks: list[Ranks], spare: int, kernel_rank: int | None, beyond: bool
) -> tuple[list[Ranks], int]:
    """Spend ``spare`` parameters on single modes, one rank at a time and the same for all, while any step fits. A
    kernel rank that the user has chosen stays; a rank that the other modes can't use is raised only with ``beyond``."""
    ranks = list(ranks)
    progress = True
    while progress:
        progress = False
        for i, weight in enumerate(weights):
            if weight.fixed:
                continue
            for mode, size in enumerate(weight.shape):
                others = prod(ranks[i]) // ranks[i][mode]
                chosen = weight.roles[mode] == "kernel" and kernel_rank is not None
                if chosen or ranks[i][mode] == size or (ranks[i][mode] >= others and not beyond):
                    continue
                if size + others <= spare:
                    ranks[i] = tuple(rank + (n == mode) for n, rank in enumerate(ranks[i]))
                    spare -= size + others
                    progress = True
    return ranks, spare
