"""How a core space starts, and the scale that suits every start and every backbone.

Names: a weight W of shape (I_1, …, I_N) has the output mode o; F is its fan-in, the product of all I_n but I_o. A core
space has the core G (r_1, …, r_N) and the factors A⁽ⁿ⁾ (I_n, r_n). Every start leaves one part zero, so that delta is.

The scale. Adam moves an entry by about the learning rate η in a step, whatever its gradient, so the sizes of the
numbers decide how fast the update grows and turns.

*Growth.* In the first step only the zero part moves, its entries to ±η. With orthonormal columns in every inner factor
and a core whose output unfolding is g times orthonormal rows, delta = s g · A⁽ᵒ⁾ Vᵀ with V (F, r_o) orthonormal, hence

    rms(delta) = s g η √(r_o / F),    and    rms(delta) / rms(W) = c η √r_o    for    s = c · rms(W) · √F / g.

Shape, order and backbone drop out, whatever F means to the layer. LoRA with alpha = 2 r, Kaiming's A of rms 1/√(3 F)
and a weight of rms 1/√F grows by 1.15 η √r in the same step, and by up to 2 η √r for PyTorch's own linear
layers, whose rms is 1/√(3 F).

*Turning.* An inner column of length 1 with I_n entries turns by η √I_n in a step, as a row of LoRA's A, of length 1/√3,
turns by η √(3 F). Columns with entries of order one would turn by η only: they are all but frozen, and the update keeps
the random subspace of its start. So inner factors start with columns of length one, and s takes up the rest.

*Calm.* LoRA's update is a product of two parts that grow. A core with rows of length one would be a third: each of many
steps in one direction adds up to η √(r_o p) to its norm, p the product of the other ranks, and training can break down
at a rate that LoRA bears. So the core's entries start with a mean square of one, g = √max(r_o, p): a step changes them
by η of their size, and the update grows as LoRA's does. The core learns, too, but more slowly than the factors.

*Small weights.* After t steps in one direction both parts have grown. LoRA's update then has a size of 2 √r (η t)²,
whatever the weight's; this one has c · rms(W) √F · √r_o (η t)². So that a small weight learns no more slowly than with
LoRA, its rms counts as 2 / √F at least, which puts 2 c in the place of LoRA's 2.

*Where an output does not sum over F numbers.* Growth is exact for every weight. F has a meaning in two places only: the
bound 2 / √F, and LoRA's turning. An attention's packed projection (3 d, d) has F = d, what an output sums over. So has
each weight of stack="layers", which has its own core and s; only the turning is shared. Experts as one parameter
(E, in, out) have F = E · in, and an output sums over ``in``: the bound is √E too low, so that a weight below 2 / √in
learns up to √E more slowly than with LoRA. An embedding has F = its vocabulary, and an output reads one row. The bound
is too low to matter, and a step has c η √r_o of the weight's size, where PEFT's LoRA moves the rows of the batch by
2 η √r whatever their size: faster by √2 / rms(W). The inner factor turns by η √(rows in the batch).

*Starts from data.* Their directions are those in which the gradient, or the inputs, agree from batch to batch. There a
step of Adam is followed by others of the same sign more often than in a random direction, and the update grows faster
at the same c. They have half of it: on text the whole is too much (docs/search).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from flora.layers.core_space import CoreSpace
from flora.layers.weights.sharded import part_like

GROWTH = math.sqrt(2)  # the c above
GROWTH_FROM_DATA = GROWTH / 2
LEAST = 2.0  # the least rms(W) · √F; docs/search has other values of all three


def unified_scale(size: float, shape: Sequence[int], ranks: Sequence[int], output_mode: int, init: str) -> float:
    """``scale="auto"``: one rule for every start and backbone, in place of the paper's s in {0.04, 0.4, 4}.

    With it, the first step of a learning rate η moves the weight by c · η · √q of its size, where q is the smaller of
    r_o and the product of the other ranks, c is ``Start.growth``, and the size is rms(W), but ``LEAST`` / √F at least.
    For ``init="factor"`` that is s = c · max(rms(W) · √F, ``LEAST``) / √max(r_o, p), p the product of the other ranks.

    Args:
        size: rms(W).
        shape: of W.
    """
    size = max(size, LEAST * math.sqrt(shape[output_mode] / prod(shape)))
    chosen = STARTS[init]
    return chosen.growth * size * math.sqrt(_width(ranks, output_mode)) / chosen.reach(shape, ranks, output_mode)


def sample(weight: Tensor) -> Tensor:
    """A view of some 2¹⁶ evenly spread numbers, whose root mean square is the weight's to half a percent."""
    numbers = weight.detach().reshape(-1)
    return numbers[:: numbers.numel() >> 16 | 1]  # an odd step, so as not to follow a column


def rms(tensors: Sequence[Tensor]) -> list[float]:
    """The root mean square of each. The host waits once for each device and type."""
    sizes = [0.0] * len(tensors)
    for (_, dtype), own in _alike((tensor.device, _wide(tensor.dtype)) for tensor in tensors):
        norms = torch.stack(torch._foreach_norm([tensors[n] for n in own], 2, dtype)).tolist()
        for n, norm in zip(own, norms, strict=True):
            sizes[n] = norm / math.sqrt(tensors[n].numel())
    return sizes


def _alike(keys: Iterable[Hashable]) -> list[tuple[Any, list[int]]]:
    """Each key with the positions at which it stands."""
    positions: dict[Hashable, list[int]] = {}
    for n, key in enumerate(keys):
        positions.setdefault(key, []).append(n)
    return list(positions.items())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _width(ranks: Sequence[int], output_mode: int) -> int:
    """The rank of the core's output unfolding."""
    return min(ranks[output_mode], prod(ranks) // ranks[output_mode])


@torch.no_grad()
def start(spaces: Sequence[CoreSpace], init: str, output_modes: Sequence[int]) -> None:
    """Fill core spaces, but none on the meta device; ``init`` is a key of ``STARTS``."""
    STARTS[init].fill([own for own in zip(spaces, output_modes, strict=True) if not own[0].core.is_meta])
    for space in spaces:
        space.is_new = False


@dataclass(frozen=True)
class Start:
    """One way to start.

    Args:
        fill: fills core spaces, each given with its output mode.
        reach: (shape, ranks, output mode) -> rms(delta) at s = 1 when the entries of the zero part are ±1.
        from_data: whether ``flora.initialize`` fills it anew.
    """

    fill: Callable[[Sequence[tuple[CoreSpace, int]]], None]
    reach: Callable[[Sequence[int], Sequence[int], int], float]
    from_data: bool = False

    @property
    def growth(self) -> float:
        """The c of ``scale="auto"``."""
        return GROWTH_FROM_DATA if self.from_data else GROWTH


def orthonormal(shapes: Sequence[Sequence[int]], like: Sequence[Tensor]) -> list[Tensor]:
    """Random matrices with orthonormal columns, or rows if wider than tall. Those of one shape are made together.

    Args:
        like: tensors with whose device and type, float32 at least, they are made.
    """
    matrices: list[Tensor] = list(like)
    groups = _alike((*shape, tensor.device, _wide(tensor.dtype)) for shape, tensor in zip(shapes, like, strict=True))
    stacks = [torch.empty(len(own), *shape, device=at, dtype=dtype) for (*shape, at, dtype), own in groups]
    for (_, own), stack in zip(groups, stacks, strict=True):
        for n, matrix in zip(own, stack.unbind(), strict=True):
            matrices[n] = matrix
    for matrix in matrices:  # each by itself, and in order: a seed gives a layer the same numbers whatever comes after
        matrix.normal_()
    for (_, own), stack in zip(groups, stacks, strict=True):
        for n, matrix in zip(own, _orthonormalized(stack).unbind(), strict=True):
            matrices[n] = matrix
    return matrices


def _orthonormalized(stack: Tensor) -> Tensor:
    """Gaussian matrices (L, rows, columns) -> orthonormal ones, of uniform distribution."""
    rows, columns = stack.shape[1:]
    if rows >= 4 * columns:  # well conditioned, so Cholesky's two products do for QR's many small steps
        triangles = torch.linalg.cholesky_ex(stack.mT @ stack).L
        return torch.linalg.solve_triangular(triangles.mT, stack, upper=True, left=False)
    orthonormal, triangles = torch.linalg.qr(stack if rows >= columns else stack.mT)
    orthonormal *= triangles.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return orthonormal if rows >= columns else orthonormal.mT


def fill_core(space: CoreSpace, rows: Tensor, output_mode: int) -> None:
    """Set the core, also a distributed one: its output unfolding becomes ``rows``, scaled to entries of order one.

    ``rows`` (r_o, product of the other ranks) has orthonormal rows, or orthonormal columns if it is tall.
    """
    first, *others = space.ranks[output_mode], *space.ranks[:output_mode], *space.ranks[output_mode + 1 :]
    core = (math.sqrt(max(rows.shape)) * rows).to(space.core.dtype).reshape(first, *others).movedim(0, output_mode)
    space.core.copy_(part_like(core, space.core))


def _factor(spaces: Sequence[tuple[CoreSpace, int]]) -> None:
    """LoRA's: only the output factor is zero. Everything else is orthonormal, so that every column of the output factor
    sees another part of the input."""
    outputs, targets = list[Tensor](), list[Tensor]()
    cores: list[int] = []  # their positions among the targets
    for space, output_mode in spaces:
        inner = list(space.factors)
        outputs.append(inner.pop(output_mode))
        targets += inner
        cores.append(len(targets))
        targets.append(space.core.movedim(output_mode, 0))
    shapes = [(len(target), target.numel() // len(target)) for target in targets]
    matrices = orthonormal(shapes, targets)
    if cores:
        torch._foreach_zero_(outputs)
        # entries of order one, as in `fill_core`
        torch._foreach_mul_([matrices[n] for n in cores], [math.sqrt(max(shapes[n])) for n in cores])
        torch._foreach_copy_(targets, [m.reshape(target.shape) for m, target in zip(matrices, targets, strict=True)])


def _each(fill: Callable[[CoreSpace, int], None]) -> Callable[[Sequence[tuple[CoreSpace, int]]], None]:
    """A start that fills one space after the other."""

    def fill_all(spaces: Sequence[tuple[CoreSpace, int]]) -> None:
        for space, output_mode in spaces:
            fill(space, output_mode)

    return fill_all


@_each
def _core(space: CoreSpace, output_mode: int) -> None:
    """The paper's: core zero, factors random Gaussian (section 4, after LoRA's section 3.1), here with columns of about
    length one."""
    space.core.zero_()
    for factor in space.factors:
        factor.normal_(std=factor.shape[0] ** -0.5)


@_each
def _official(space: CoreSpace, output_mode: int) -> None:
    """The authors' first code: core zero, factors by Kaiming's uniform rule with a = √5."""
    space.core.zero_()
    for factor in space.factors:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


@_each
def _official_normal(space: CoreSpace, output_mode: int) -> None:
    """The authors' later code: core zero, factors N(0, 0.02²). It takes s = alpha / r."""
    space.core.zero_()
    for factor in space.factors:
        factor.normal_(std=0.02)


@_each
def _random(space: CoreSpace, output_mode: int) -> None:
    """Nothing zero, for ``init_weights=False``. Under "auto" delta has 0.3 · ``GROWTH`` of the weight's size."""
    torch._foreach_copy_(space.factors, orthonormal([factor.shape for factor in space.factors], space.factors))
    space.core.normal_(std=0.3 * math.sqrt(space.shape[output_mode] / _width(space.ranks, output_mode)))


def _reach_of_factor(shape: Sequence[int], ranks: Sequence[int], output_mode: int) -> float:
    return math.sqrt(prod(ranks) * shape[output_mode] / prod(shape))


def _reach_of_core(shape: Sequence[int], ranks: Sequence[int], output_mode: int) -> float:
    return math.sqrt(prod(ranks) / prod(shape))


STARTS = {
    "core": Start(_core, _reach_of_core),
    "factor": Start(_factor, _reach_of_factor),
    # like "factor" until flora.initialize has seen a batch
    "activations": Start(_factor, _reach_of_factor, from_data=True),
    "gradient": Start(_factor, _reach_of_factor, from_data=True),
    "official": Start(_official, lambda shape, ranks, output_mode: 3 ** (-len(shape) / 2)),
    "official-normal": Start(_official_normal, lambda shape, ranks, output_mode: prod(0.02 * r**0.5 for r in ranks)),
    "random": Start(_random, _reach_of_factor),
}
