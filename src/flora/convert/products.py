"""An update as an exact product of two matrices, and back: the form that LoRA and LoCon share.

A weight's update, unfolded along its output mode, is a product B A of (out, q) and (q, inputs · kernel). The core is
folded into the side with more ranks, so q is the smaller of the output's rank and the product of the other ranks. For a
linear layer that is min(r_out, r_in). For a convolution it is mostly r_out: then B is the output factor, and A is
K ∘ (input factor), (r_out, in, k …), where K = G ×_3 C ×_4 D is the core at the kernel's size (equation 6).

Letters: q the rank of a product, e the number of matrices in a stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flora import tucker
from flora.convert.adapter import Adapter, Update, finite
from flora.layers.kinds import output_mode
from flora.layers.sites import Site

Product = tuple[Tensor, Tensor]


def product(update: Update) -> Product:
    """B (out, q) and A (q, in, k …), with the scale in B. Of a stack of matrices: (out, q, e) and (q, e, in).

    Raises ValueError if they are not finite in the update's dtype.
    """
    kind = update.site.kind
    core, factors = update.scaled_space()
    if kind.lora_form == "parameter" and core.ndim == 3:
        left, right = _stack_product(core, factors, update.site.is_transposed)
    else:
        mode = 0 if kind.lora_form == "parameter" else output_mode(kind.roles)
        left, right = tucker.as_product(core, factors, mode)
    pair = left.to(update.dtype), right.to(update.dtype)
    finite(f"layer {update.site.name!r}", dict(zip("BA", pair, strict=True)))
    return pair


def _stack_product(core: Tensor, factors: list[Tensor], is_transposed: bool) -> Product:
    cores = torch.tensordot(factors[0], core, 1)  # (e, r_out, r_in)
    outer, inner = factors[1:]
    if is_transposed:
        cores, outer, inner = cores.mT, inner, outer
    experts, r_out, r_in = cores.shape
    if r_in <= r_out:
        return torch.einsum("or,ers->ose", outer, cores), inner.mT.unsqueeze(1).expand(-1, experts, -1)
    return outer.unsqueeze(2).expand(-1, -1, experts), torch.einsum("ers,is->rei", cores, inner)


def pad_rank(pair: Product, rank: int) -> Product:
    """The same product at a larger rank, filled up with zeros."""
    left, right = pair
    missing = rank - left.shape[1]
    return (
        torch.cat([left, left.new_zeros(left.shape[0], missing, *left.shape[2:])], dim=1),
        torch.cat([right, right.new_zeros(missing, *right.shape[1:])], dim=0),
    )


# ------------------------------------------------------------------------------------------------------------- and back


def from_product(left: Tensor, right: Tensor, transposed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Core and factors of a product of (out, q) and (q, in, k …).

    Args:
        transposed: whether the weight is (in, out, k …) and not (out, in, k …).
    """
    rank, inputs, *kernel = right.shape
    width = rank * math.prod(kernel)
    core, others = right, [torch.eye(size, dtype=right.dtype) for size in (inputs, *kernel)]
    if width < inputs:  # keep the numbers in the input's factor: an identity there would be larger than everything else
        core = torch.eye(width, dtype=right.dtype).view(rank, *kernel, width).movedim(-1, 1)
        others[0] = right.movedim(1, 0).reshape(inputs, width)
    core, factors = cut_ranks(core, [left, *others])
    return (core.mT, factors[::-1]) if transposed else (core, factors)


def cut_ranks(core: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``tucker.cut_ranks``, computed in float64 and rounded once, to float32 at least. Without a rank to cut, the same
    tensors."""
    if all(factor.shape[1] <= factor.shape[0] for factor in factors):
        return core, list(factors)
    dtype = torch.promote_types(core.dtype, torch.float32)
    core, factors = tucker.cut_ranks(core.double(), [factor.double() for factor in factors])
    return core.to(dtype), [factor.to(dtype) for factor in factors]


def from_stack(a: Tensor, b: Tensor, rank: int, is_transposed: bool) -> tuple[Tensor, list[Tensor]]:
    """Core and factors of a stack of matrices in PEFT's layout: A (e · q, in), the expert varying slowest, and
    B (out, q · e), the expert varying fastest."""
    experts = a.shape[0] // rank
    core = torch.eye(rank, dtype=torch.float64)[None]
    spaces = []
    for n, (right, left) in enumerate(zip(a.split(rank), b.unflatten(1, (rank, experts)).unbind(2), strict=True)):
        expert = torch.zeros(experts, 1, dtype=torch.float64)
        expert[n] = 1
        matrices = (right.mT, left) if is_transposed else (left, right.mT)
        spaces.append((core, [expert, *(matrix.double() for matrix in matrices)]))
    core, factors = tucker.block_sum(spaces, [1.0] * experts)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return core.to(dtype), [factor.to(dtype) for factor in factors]


def keys_by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """A LoCon file's keys by their layer, the part before the first dot, and by their end, the part after it."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        name, _, end = key.partition(".")
        layers.setdefault(name, {})[end] = key
    return layers


# ------------------------------------------------------------------------------------------------- updates without form


def beside_obstacle(site: Site) -> str | None:
    """Why an adapter that runs beside the layer cannot do the same as this update; None if it can."""
    return None if site.beside else "the layer does more with its weight than a plain one"


def refuse(adapter: Adapter, obstacles: dict[Site, str], form: str, advice: str) -> None:
    """Raise ValueError that lists all layers with an obstacle, if there are any."""
    if obstacles:
        lines = [f"  {site.name}: {reason}" for site, reason in list(obstacles.items())[:10]]
        more = [f"  and {len(obstacles) - 10} more"] if len(obstacles) > 10 else []
        head = f"{adapter.folder}: {len(obstacles)} of {len(adapter.sites)} weights have no exact {form}:"
        raise ValueError("\n".join([head, *lines, *more, advice]))
