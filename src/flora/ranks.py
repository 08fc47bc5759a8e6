"""From a user's request (one rank, one rank per mode, or a budget) to ranks and parameter counts. Integers only.

A weight has a shape (I_1, …, I_N) and one role per mode: "out", "in", "kernel" or "other".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One weight that needs ranks.

    Args:
        shape: (I_1, …, I_N).
        roles: one per mode: "out", "in", "kernel" or "other".
        fixed: the weight's ranks, if a budget does not decide them.
        cores: how many weights of this shape share the factors, each with a core of its own.
    """

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    fixed: Ranks | None = None
    cores: int = 1

    def count(self, ranks: Sequence[int]) -> int:
        """Trainable parameters at these ranks."""
        return parameter_count(self.shape, ranks, self.cores)


def parameter_count(shape: Sequence[int], ranks: Sequence[int], cores: int = 1) -> int:
    """Trainable parameters of one core space: r_1 · … · r_N for the core and I_n · r_n per factor (section 4.1)."""
    return cores * prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def fits(ranks: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether there is one rank per mode, each from 1 to the mode's size."""
    return len(ranks) == len(shape) and all(1 <= rank <= size for rank, size in zip(ranks, shape, strict=True))


def default_kernel_rank(size: int) -> int:
    """Half of the mode, rounded up: 1 for 1, 2 for 3 (the paper's r3), 3 for 5, 4 for 7."""
    return (size + 1) // 2


def uniform_ranks(weight: Weight, r: int, kernel_rank: int | None) -> Ranks:
    """Rank ``r`` for every mode except the kernel's, which get ``kernel_rank``. No rank exceeds its mode's size.

    Args:
        kernel_rank: None for ``default_kernel_rank``.
    """

    def rank(size: int, role: str) -> int:
        if role != "kernel":
            return min(r, size)
        return default_kernel_rank(size) if kernel_rank is None else min(kernel_rank, size)

    return tuple(rank(size, role) for size, role in zip(weight.shape, weight.roles, strict=True))


def clip_ranks(weight: Weight, r: int | Sequence[int], kernel_rank: int | None) -> Ranks:
    """The ranks that ``r`` asks for, clipped to the modes' sizes.

    Args:
        r: as ``FloraConfig.r``: one number (see ``uniform_ranks``), or one rank per mode.

    Raises:
        ValueError: if ``r`` has another number of ranks than the weight has modes.
    """
    if isinstance(r, int):
        return uniform_ranks(weight, r, kernel_rank)
    if len(r) != len(weight.shape):
        raise ValueError(
            f"{len(r)} ranks {list(r)} for a weight of {len(weight.shape)} modes, shape {list(weight.shape)}; "
            "give one rank per mode, or a single number"
        )
    return tuple(min(rank, size) for rank, size in zip(r, weight.shape, strict=True))


def usable_ranks(ranks: Ranks) -> Ranks:
    """Each rank cut to the product of the others: along a mode, a core has no more independent slices than that."""
    while (cut := tuple(min(rank, prod(ranks) // rank) for rank in ranks)) != ranks and len(ranks) > 1:
        ranks = cut
    return ranks


def solve_budget(weights: Sequence[Weight], budget: int, kernel_rank: int | None) -> list[Ranks]:
    """Ranks for every weight that together have at most ``budget`` parameters, and as nearly that many as possible.

    1. Every weight gets the same rank: the largest that fits, as a user would choose it.
    2. As many weights as possible get the next rank, the cheapest ones first.
    3. Single modes get one rank more, as long as the other modes can use it (``usable_ranks``).
    4. Single modes get ranks that the other modes cannot use, until no single step fits.

    Raises:
        ValueError: if the least possible ranks exceed the budget, with the least possible number of parameters.
    """

    alike = Counter(weights)

    def at(weight: Weight, r: int) -> Ranks:
        """The least possible ranks at 0."""
        if r == 0:
            return weight.fixed or uniform_ranks(weight, 1, 1 if kernel_rank is None else kernel_rank)
        return weight.fixed or usable_ranks(uniform_ranks(weight, r, kernel_rank))

    def total(r: int) -> int:
        return sum(count * weight.count(at(weight, r)) for weight, count in alike.items())

    if total(0) > budget:
        raise ValueError(f"a budget of {budget} parameters is too small for these weights: least possible {total(0)}")
    r, too_large = 0, max(max(w.shape) for w in weights) + 1
    while too_large - r > 1:
        middle = (r + too_large) // 2
        if total(middle) <= budget:
            r = middle
        else:
            too_large = middle
    ranks, spare = [at(weight, r) for weight in weights], budget - total(r)

    def cost_of_next(i: int) -> int:
        return weights[i].count(at(weights[i], r + 1)) - weights[i].count(ranks[i])

    for i in sorted(range(len(weights)), key=cost_of_next):
        cost = cost_of_next(i)
        if 0 < cost <= spare:
            ranks[i], spare = at(weights[i], r + 1), spare - cost
    for surplus in (False, True):
        ranks, spare = _raise_single_modes(weights, ranks, spare, kernel_rank, surplus)
    return ranks


def _raise_single_modes(
    weights: Sequence[Weight], ranks: Sequence[Ranks], spare: int, kernel_rank: int | None, surplus: bool
) -> tuple[list[Ranks], int]:
    """Raise single ranks by one, in turn over all weights and modes, until no step fits. Kernel ranks that the user
    chose stay. ``surplus`` allows ranks above the product of the others.

    Returns:
        the ranks, and the number of parameters that are left.
    """
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
                if chosen or ranks[i][mode] == size or (ranks[i][mode] >= others and not surplus):
                    continue
                cost = size + weight.cores * others
                if cost <= spare:
                    ranks[i] = tuple(rank + (n == mode) for n, rank in enumerate(ranks[i]))
                    spare -= cost
                    progress = True
    return ranks, spare
