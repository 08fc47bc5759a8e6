"""An update as a product of two matrices, exactly, and back: the form that LoRA and LoCon share.

A weight's update, unfolded along its output mode, is a product B A of (out, q) and (q, inputs · kernel). The core is
folded into the side that has more ranks, so q is the smaller of the output's rank and of the other ranks' product: for
a linear layer min(r_out, r_in); for a convolution mostly r_out, with A = K ∘ (input factor), (r_out, in, k …), where
K = G ×_3 C ×_4 D is the core at the kernel's size (equation 6), and with B the output factor.

Letters: q the rank of a product, e the matrices of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flora import tucker
from flora.convert.adapter import Adapter, Update
from flora.layers.kinds import RAW, output_mode
from flora.layers.sites import Site

Product = tuple[Tensor, Tensor]


def product(update: Update) -> Product:
    """(B, A): (out, q) and (q, in, k …), the scale in B; of a stack (out, q, e) and (q, e, in)."""
    core, factors = update.exact()
    if update.site.kind is RAW and core.ndim == 3:
        left, right = _stack_product(core, factors, update.site.is_transposed)
    else:
        mode = 0 if update.site.kind is RAW else output_mode(update.site.kind.roles)
        left, right = tucker.as_product(core, factors, mode)
    return left.to(update.dtype), right.to(update.dtype)


def _stack_product(core: Tensor, factors: list[Tensor], is_transposed: bool) -> Product:
    cores = torch.tensordot(factors[0], core, 1)  # (e, r_out, r_in)
    outer, inner = factors[1:]
    if is_transposed:
        cores, outer, inner = cores.mT, inner, outer
    experts, r_out, r_in = cores.shape
    if r_in <= r_out:
        return torch.einsum("or,ers->ose", outer, cores), inner.mT.unsqueeze(1).expand(-1, experts, -1)
    return outer.unsqueeze(2).expand(-1, -1, experts), torch.einsum("ers,is->rei", cores, inner)


def padded(pair: Product, rank: int) -> Product:
    """The product with zeros up to ``rank``."""
    left, right = pair
    missing = rank - left.shape[1]
    return (
        torch.cat([left, left.new_zeros(left.shape[0], missing, *left.shape[2:])], dim=1),
        torch.cat([right, right.new_zeros(missing, *right.shape[1:])], dim=0),
    )


# --------------------------------------------------------------------------------------------------------- and back


def from_product(left: Tensor, right: Tensor, transposed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """(out, q), (q, in, k …) -> core and factors of their product, (out, in, k …); of (in, out) if ``transposed``."""
    rank, inputs, *kernel = right.shape
    width = rank * math.prod(kernel)
    core, others = right, [torch.eye(size, dtype=right.dtype) for size in (inputs, *kernel)]
    if width < inputs:  # the numbers go into the input's factor, or that would be the largest of all
        core = torch.eye(width, dtype=right.dtype).view(rank, *kernel, width).movedim(-1, 1)
        others[0] = right.movedim(1, 0).reshape(inputs, width)
    core, factors = cut(core, [left, *others])
    return (core.mT, factors[::-1]) if transposed else (core, factors)


def cut(core: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``tucker.cut_ranks``, in float64 where there is something to cut."""
    if all(factor.shape[1] <= factor.shape[0] for factor in factors):
        return core, list(factors)
    cores, wide = tucker.cut_ranks(core.double(), [factor.double() for factor in factors])
    return cores.to(core.dtype), [factor.to(core.dtype) for factor in wide]


def from_stack(a: Tensor, b: Tensor, rank: int, is_transposed: bool) -> tuple[Tensor, list[Tensor]]:
    """PEFT's layout of a stack, A (e · q, in), expert slowest, and B (out, q · e), expert fastest."""
    experts = a.shape[0] // rank
    parts = []
    for n, (right, left) in enumerate(zip(a.split(rank), b.unflatten(1, (rank, experts)).unbind(2), strict=True)):
        one = torch.zeros(experts, 1, dtype=a.dtype)
        one[n] = 1
        parts.append(
            (torch.eye(rank, dtype=a.dtype)[None], [one, *((right.mT, left) if is_transposed else (left, right.mT))])
        )
    core, factors = tucker.block_sum([(c.double(), [f.double() for f in fs]) for c, fs in parts], [1.0] * experts)
    return core.to(a.dtype), [factor.to(a.dtype) for factor in factors]


# ------------------------------------------------------------------------------------------------ what has no such form


def outside_obstacle(site: Site) -> str | None:
    """Why no adapter that runs beside the layer can do the same; None if one can."""
    return None if site.beside else "the layer does more with its weight than a plain one"


def refuse(source: Adapter, reasons: dict[Site, str], what: str, advice: str) -> None:
    """Raise ValueError with all the layers that have a reason, if any has."""
    if reasons:
        lines = [f"  {site.name}: {reason}" for site, reason in list(reasons.items())[:10]]
        more = [f"  and {len(reasons) - 10} more"] if len(reasons) > 10 else []
        head = f"{source.folder}: {len(reasons)} of {len(source.sites)} weights have no {what} that loads and is exact:"
        raise ValueError("\n".join([head, *lines, *more, advice]))
