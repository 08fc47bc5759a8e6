"""The weight-side work of many layers at once: few launches, however many layers.

An ``Entry`` is one adapted weight. ``form`` gives it what its layer needs to run with fewer operations:

    merged      W + ΔW, summed in float32 at least and rounded once to the type that the layer computes in
    delta       ΔW alone in that type, for a layer that adds its product to its own: no small update is rounded away
    factored    D (i, q) and U (q, o) with (D U)ᵀ = ΔW, of a matrix
    kernel      K = s · G ×_3 C ×_4 D (equation 6) in the adapter's type, float32 at least, of a convolution, which
                takes it in the place of core and kernel factors

Entries of one shape, with equal ranks, types and layout, form a ``Group`` (``formed``); their tensors are stacked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.cost import without_autocast
from flora.layers.execution.formed import Dense, Factored, Group, Kernel, Work

# form: what makes it, and how many tensors of each entry
_MADE_BY: dict[str, tuple[type[Function], int]] = {
    "merged": (Dense, 1),
    "delta": (Dense, 1),
    "factored": (Factored, 2),
    "kernel": (Kernel, 1),
}


class Entry(NamedTuple):
    """One adapted weight.

    Attributes:
        form: "merged", "delta", "factored" or "kernel".
        weight: W (I_1, …, I_N), plain and frozen.
        parameters: the core (r_1, …, r_N) and the factors (I_n, r_n); for "factored" those of a matrix (o, i), for
            "kernel" the core and the factors of the kernel modes alone.
        scale: what multiplies the core, a tensor of one number.
        low: the type that the layer computes in.
    """

    form: str
    weight: Tensor
    parameters: tuple[Tensor, ...]
    scale: Tensor
    low: torch.dtype


class Plan(NamedTuple):
    """How entries are formed by one function. It holds no tensor, and serves all entries of these shapes and types.

    Attributes:
        form, low: as in ``Entry``. dtype: the parameters'. device: all tensors'.
        groups: the numbers of the entries of each group, the modes of their cores, and the weights' layout.
        parameters: (entry, number) of each parameter, in the function's order.
        results: per entry, in the order of ``groups``, where its tensors are among the function's results.
    """

    form: str
    low: torch.dtype
    dtype: torch.dtype
    device: torch.device
    groups: list[tuple[list[int], int, bool]]
    parameters: list[tuple[int, int]]
    results: dict[int, list[int]]


def plan(entries: Sequence[Entry]) -> list[Plan]:
    """How to form the entries. One plan serves as long as shapes, types, layouts, devices and forms stay."""
    together: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, (name, weight, (core, *_), _, low) in enumerate(entries):
        layout = weight.ndim > 2 and _is_channels_last(weight)
        together[name, low, core.dtype, weight.device][weight.shape, core.shape, weight.dtype, layout].append(n)
    plans = []
    for (name, low, dtype, device), own in together.items():
        count, groups, parameters = _MADE_BY[name][1], [], []
        results: dict[int, list[int]] = {}
        for (_, ranks, _, layout), numbers in own.items():
            groups.append((numbers, len(ranks), layout))
            parts, size, place = range(len(entries[numbers[0]].parameters)), len(numbers), count * len(results)
            parameters += [(n, part) for part in parts for n in numbers]
            results |= {n: [place + m + size * t for t in range(count)] for m, n in enumerate(numbers)}
        plans.append(Plan(name, low, dtype, device, groups, parameters, results))
    return plans


def form(entries: Sequence[Entry], plans: Sequence[Plan] | None = None, pads: bool = True) -> list[tuple[Tensor, ...]]:
    """What each entry's layer needs, in the entries' order: (W + ΔW,), (ΔW,), (D, U) or (K,).

    Args:
        plans: of entries like these; None if there are none yet.
        pads: whether the ranks of D and U may be filled up with zeros, to what the device likes (``cost.padded``).
    """
    results: list[tuple[Tensor, ...]] = [()] * len(entries)
    for own in plan(entries) if plans is None else plans:
        wide = torch.promote_types(own.dtype, torch.float32)
        with without_autocast(own.device.type):
            scales = torch.stack([entries[n].scale for n in own.results]).to(wide)
            groups, start = [], 0
            for numbers, modes, layout in own.groups:
                scale = scales[start : start + len(numbers)].view(-1, *[1] * modes)
                parts = len(entries[numbers[0]].parameters)
                groups.append(Group([entries[n].weight for n in numbers], scale, layout, parts))
                start += len(numbers)
            work = Work(groups, own.low, wide, own.form == "merged", pads)
            flat = _MADE_BY[own.form][0].apply(work, *[entries[n].parameters[part] for n, part in own.parameters])
            for n, places in own.results.items():
                results[n] = tuple([flat[place] for place in places])
    return results


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
