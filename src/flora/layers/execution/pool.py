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

from flora.layers.execution.batched import split
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


def form(entries: Sequence[Entry], pads: bool = True) -> list[tuple[Tensor, ...]]:
    """What each entry's layer needs, in the entries' order: (W + ΔW,), (ΔW,), (D, U) or (K,).

    Args:
        pads: whether the ranks of D and U may be filled up with zeros, to what the device likes (``cost.padded``).
    """
    together: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, (name, weight, (core, *_), _, low) in enumerate(entries):
        layout = weight.ndim > 2 and _is_channels_last(weight)
        together[name, low, core.dtype, weight.device][weight.shape, core.shape, weight.dtype, layout].append(n)
    results: dict[int, tuple[Tensor, ...]] = {}
    for (name, low, dtype, device), groups in together.items():
        order = [n for numbers in groups.values() for n in numbers]
        wide = torch.promote_types(dtype, torch.float32)
        made_by, count = _MADE_BY[name]
        with torch.autocast(device.type, enabled=False):
            scales = iter(torch.stack([entries[n].scale for n in order]).to(wide).split([*map(len, groups.values())]))
            made, parameters = [], []
            for (_, ranks, _, layout), numbers in groups.items():
                columns = [*zip(*(entries[n].parameters for n in numbers), strict=True)]
                scale = next(scales).view(-1, *[1] * len(ranks))
                made.append(Group([entries[n].weight for n in numbers], scale, layout, len(columns)))
                parameters += [parameter for column in columns for parameter in column]
            flat = iter(made_by.apply(Work(made, low, wide, name == "merged", pads), *parameters))
            for numbers in groups.values():
                results |= zip(numbers, zip(*split(flat, [len(numbers)] * count), strict=True), strict=True)
    return [results[n] for n in range(len(entries))]


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
