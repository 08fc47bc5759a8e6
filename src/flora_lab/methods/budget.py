"""The one definition of "equal parameters", for comparisons and benchmarks.

A method with one size (a rank, a width) gets the size whose trainable parameters, without the head's, are nearest to
the budget: the lower of two that are equally near, and at most a quarter above the budget. FLoRA (one rank per mode and
weight) and LoKr (a rank and a factor) have finer steps and stay within the budget. No size exceeds the full rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NoReturn

from flora_lab.methods.common import CannotAdapt

MOST_ABOVE = 1.25  # times the budget


def nearest_size(count: Callable[[int], int], budget: int, full: int, name: str = "rank", step: int = 1) -> int:
    """The multiple of ``step`` up to ``full`` whose ``count`` of parameters is nearest to the budget.

    Raises CannotAdapt where even the smallest size is more than a quarter above the budget.
    """

    @cache
    def parameters(steps: int) -> int:
        return count(step * steps)

    full = max(1, full // step)
    below = largest_size(parameters, budget, full)
    above = parameters(below + 1) if below < full else math.inf
    if above > MOST_ABOVE * budget:
        return step * below or too_small(above, budget, f"{name} {step}")
    nearer = not below or above - budget < budget - parameters(below)
    return step * (below + 1 if nearer else below)


def largest_size(count: Callable[[int], int], budget: int, full: int) -> int:
    """The largest size up to ``full`` whose ``count``, which grows with it, is within the budget; else 0."""
    count = cache(count)
    if count(1) > budget:
        return 0
    if count(1) == count(full):  # a rank pattern fixes every rank
        return 1
    if count(full) <= budget:
        return full
    low, high = 1, full
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2)  # ranks are low
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low


def too_small(least: int, budget: int, size: str = "rank 1") -> NoReturn:
    raise CannotAdapt(f"{size} has {least:,} parameters, above the budget of {budget:,}")


def size_note(size: int, full: int) -> str:
    """For the notes: "8", or "64 (full)"."""
    return f"{size} (full)" if size == full else f"{size}"
