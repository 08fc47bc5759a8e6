"""A stand-in for a weight that has an update: W + delta, formed only where something asks for all of it.

A model that keeps experts in one stacked parameter (E, out, in) takes out one expert's matrix at a time and multiplies
by it. The stand-in follows it there: a slice of a core space is a core space of one mode less, and a product with a
matrix is ``matrix.matrix``. Neither the stack's delta nor its gradient is ever formed. Any other operation gets the
dense tensor. Where launches dominate (``cost.cheapest``), W + delta of all matrices is formed at once instead, and one
gradient for the whole stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map_only

from flora.layers.core_space import add_updates
from flora.layers.execution.batched import product
from flora.layers.execution.cost import Weight, computing_dtype, of_one_type, pooled
from flora.layers.execution.lazy import PLACE_AND_SHAPE, getters
from flora.layers.execution.matrix import matrix


class StandIn(Tensor):
    """``weight + core ×_1 factors[0] …`` in the place of the frozen ``weight``; the scale is in the core."""

    weight: Tensor
    core: Tensor
    factors: Sequence[Tensor]
    execution: str
    formed: Tensor | None
    matrices: tuple[Tensor, ...] | None

    @staticmethod
    def of(weight: Tensor, core: Tensor, factors: Sequence[Tensor], execution: str) -> StandIn:
        """A stand-in for ``weight`` (I_1, …, I_N) with the update of a scaled core and factors."""
        new = weight.detach().as_subclass(StandIn)
        new.weight, new.core, new.factors, new.execution = weight, core, factors, execution
        new.formed = new.matrices = None
        return new

    def dense(self) -> Tensor:
        """W + delta itself, formed once."""
        if self.formed is None:
            self.formed = add_updates(self.weight, [(self.core, self.factors)])
        return self.formed

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in PLACE_AND_SHAPE:
                return function(*args, **kwargs)
            if function in _FOLLOWED and kwargs.keys() <= _NAMED:
                followed = _FOLLOWED[function](*args, **kwargs)
                if followed is not None:
                    return followed
            args, kwargs = tree_map_only(StandIn, StandIn.dense, (args, kwargs))
            return function(*args, **kwargs)


class Refused(Tensor):
    """A stand-in that has a place and a shape, and raises ValueError for everything else that is asked of it."""

    why: str

    @staticmethod
    def of(weight: Tensor, why: str) -> Refused:
        """A stand-in for ``weight`` with the error's message."""
        new = weight.detach().as_subclass(Refused)
        new.why = why
        return new

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in PLACE_AND_SHAPE:
            raise ValueError(next(one.why for one in tree_leaves((args, kwargs)) if isinstance(one, Refused)))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _index(w: StandIn, index: Any) -> Tensor | None:
    number = index.item() if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() else index
    if isinstance(number, bool) or not isinstance(number, int) or w.core.ndim < 2:
        return None
    return _slice(w, number)


def _slice(w: StandIn, number: int) -> Tensor:
    if w.core.ndim == 3:
        if w.matrices is None and _form_of_stack(w) == "merged":
            w.matrices = merged_stack(w.weight, w.core, w.factors).unbind(0)
        if w.matrices is not None:
            return w.matrices[number]
    core = (w.factors[0][number] @ w.core.flatten(1)).view(w.core.shape[1:])
    return StandIn.of(w.weight[number], core, w.factors[1:], w.execution)


def _form_of_stack(w: StandIn) -> str | None:
    place = w.weight.device.type
    stack = Weight(place, "stack", w.weight.shape, w.weight.dtype, computing_dtype(w.weight), torch.is_grad_enabled())
    return pooled(stack, w.execution)


def _slices(w: StandIn, dim: int = 0) -> tuple[Tensor, ...] | None:
    return tuple(_slice(w, number) for number in range(len(w.weight))) if dim == 0 and w.core.ndim > 1 else None


def _iterate(w: StandIn) -> Iterator[Tensor] | None:
    slices = _slices(w)
    return None if slices is None else iter(slices)


def _transpose(w: StandIn, *modes: int) -> StandIn | None:
    if w.core.ndim != 2 or modes not in ((), (0, 1), (1, 0), (-1, -2), (-2, -1)):
        return None
    return StandIn.of(w.weight.mT, w.core.mT, w.factors[::-1], w.execution)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if isinstance(input, StandIn) or not isinstance(weight, StandIn) or weight.core.ndim != 2:
        return None
    tensors = of_one_type(input, weight.weight, bias, weight.core)
    left, right = weight.factors
    return None if tensors is None else matrix(*tensors, weight.core, left, right, weight.execution)


def _matmul(input: Tensor, other: Tensor) -> Tensor | None:
    transposed = _transpose(other) if isinstance(other, StandIn) else None
    return None if transposed is None else _linear(input, transposed)


_NAMED = {"bias", "dim"}  # the keyword arguments that the functions below accept

_FOLLOWED: dict[Callable, Callable] = {
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.unbind, torch.unbind), _slices),
    Tensor.__iter__: _iterate,
    **dict.fromkeys((*getters("T", "mT"), Tensor.t, torch.t), _transpose),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _transpose),
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
}


def merged_stack(weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``weight + core ×_1 factors[0] …`` of stacked matrices (E, o, i), in the type that the layer computes in."""
    experts, left, right = factors
    device = weight.device.type
    low = computing_dtype(weight)
    with torch.autocast(device, enabled=False):
        cores = (experts @ core.flatten(1)).view(-1, *core.shape[1:])  # (E, r, s)
        left, right = left.expand(len(cores), -1, -1), right.expand(len(cores), -1, -1)
        if core.shape[1] <= core.shape[2]:
            return _MergedStack.apply(weight, left, torch.bmm(cores, right.mT), low)
        return _MergedStack.apply(weight, torch.bmm(left, cores), right.mT, low)


class _MergedStack(Function):
    """W' = W + A_e R_e per matrix e, summed in A's type at least in float32 and rounded once; W (E, o, i), A (E, o, q),
    R (E, q, i). The dense gradient is projected in its own type, with sums in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: Tensor, rows: Tensor, low: torch.dtype) -> Tensor:
        wide = torch.promote_types(left.dtype, torch.float32)
        ctx.save_for_backward(left, rows)
        return torch.baddbmm(weight.to(wide), left.to(wide), rows.to(wide)).to(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dense,) = gradients
        left, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # a product with a type of its own has no derivative
            dense = dense.to(left.dtype)
            return None, torch.bmm(dense, rows.mT), torch.bmm(left.mT, dense), None
        d_left = product(dense, rows.mT.to(dense.dtype), left.dtype)
        d_rows = product(left.mT.to(dense.dtype), dense, left.dtype)
        return None, d_left, d_rows, None
