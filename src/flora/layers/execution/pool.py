"""The weight-side work of many layers at once: few launches, however many layers.

An ``Entry`` is one adapted weight. ``form`` gives it what its layer needs to run as plain operations:

    merged      W + ΔW, summed in float32 at least and rounded once to the type that the layer computes in
    delta       ΔW alone in that type, for a layer that adds its product to its own: no small update is rounded away
    factored    D (i, q) and U (q, o) with (D U)ᵀ = ΔW, of a matrix

Entries of one shape, with equal ranks, types and layout, form a ``Group``; their tensors are stacked. The backward pass
keeps thin tensors only, and projects the dense gradients. For a second derivative it repeats the work with plain
operations. Letters as in ``batched``; "wide" is float32 or the adapter's own type if that is wider, "low" the type that
the layers compute in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.batched import cast_all, product, rows_backward, split, stack_all, unstack, update_rows
from flora.layers.execution.cost import padded
from flora.tucker import reconstruct

Formed = Tensor | tuple[Tensor, Tensor]


class Entry(NamedTuple):
    """One adapted weight.

    Attributes:
        form: "merged", "delta" or "factored".
        weight: W (I_1, …, I_N), plain and frozen.
        parameters: the core (r_1, …, r_N) and the factors (I_n, r_n); for "factored" those of a matrix (o, i).
        scale: what multiplies the core, a tensor of one number.
        low: the type that the layer computes in.
    """

    form: str
    weight: Tensor
    parameters: tuple[Tensor, ...]
    scale: Tensor
    low: torch.dtype


@dataclass(frozen=True)
class Group:
    """Entries whose tensors can be stacked.

    Attributes:
        weights: L weights W.
        scales: (L, 1, …), to multiply the stacked cores.
        channels_last: the weights' layout.
    """

    weights: list[Tensor]
    scales: Tensor
    channels_last: bool

    @property
    def modes(self) -> int:
        """The number of an entry's parameters: its core and one factor per mode."""
        return self.scales.ndim

    def lay_out(self, weight: Tensor) -> Tensor:
        """A weight of this group, its modes in the order in which they lie in memory."""
        return weight.movedim(1, -1) if self.channels_last else weight

    def lay_back(self, weight: Tensor) -> Tensor:
        """Undo ``lay_out``."""
        return weight.movedim(-1, 1) if self.channels_last else weight


def form(entries: Sequence[Entry], pads: bool = True) -> list[Formed]:
    """What each entry's layer needs, in the entries' order.

    Args:
        pads: whether the ranks of D and U may be filled up with zeros, to what the device likes (``cost.padded``).
    """
    together: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, (name, weight, (core, *_), _, low) in enumerate(entries):
        layout = weight.ndim > 2 and _is_channels_last(weight)
        together[name, low, core.dtype, weight.device][weight.shape, core.shape, weight.dtype, layout].append(n)
    results: dict[int, Formed] = {}
    for (name, low, dtype, device), groups in together.items():
        order = [n for numbers in groups.values() for n in numbers]
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device.type, enabled=False):
            scales = iter(torch.stack([entries[n].scale for n in order]).to(wide).split([*map(len, groups.values())]))
            made, parameters = [], []
            for (_, ranks, _, layout), numbers in groups.items():
                scale = next(scales).view(-1, *[1] * len(ranks))
                made.append(Group([entries[n].weight for n in numbers], scale, layout))
                parameters += [
                    p for column in zip(*(entries[n].parameters for n in numbers), strict=True) for p in column
                ]
            if name == "factored":
                flat = iter(_Factored.apply(made, low, wide, pads, *parameters))
                for numbers in groups.values():
                    downs, ups = split(flat, [len(numbers)] * 2)
                    results |= zip(numbers, zip(downs, ups, strict=True), strict=True)
            else:
                results |= zip(order, _Dense.apply(made, low, wide, name == "merged", *parameters), strict=True)
    return [results[n] for n in range(len(entries))]


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def _stacks(groups: Sequence[Group], parameters: Sequence[Tensor], dtype: torch.dtype) -> list[list[Tensor]]:
    """All parameters -> per group the scaled cores (L, r, s, …) and the factors (L, I_n, r_n), in ``dtype``."""
    lists = split(parameters, [len(group.weights) for group in groups for _ in range(group.modes)])
    stacks = split(stack_all(lists, dtype), [group.modes for group in groups])
    return [[core * group.scales.to(dtype), *factors] for group, (core, *factors) in zip(groups, stacks, strict=True)]


def _without(gradients: list[Tensor], used: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Stacked gradients -> those of single parameters, in their type, or autograd would cast them one by one; None for
    a layer that took no part in the output."""
    stacks = (stack.to(dtype).unbind(0) for stack in gradients)
    return [g if own else None for stack in stacks for g, own in zip(stack, used, strict=True)]


def _dense_gradients(group: Group, gradients: Sequence[Tensor | None], low: torch.dtype) -> Tensor:
    """L gradients of W', zero where there is none -> (L, o, n)."""
    like = next(g for g in gradients if g is not None)
    laid = [group.lay_out(torch.zeros_like(like) if g is None else g) for g in gradients]
    return stack_all([laid], low)[0].flatten(2)


class _Dense(Function):
    """Cores and factors of all entries -> W + ΔW, or ΔW alone (``merged``), of each. Matrices, and convolutions of any
    kernel, groups and layout. Dense gradients are projected in their own type, with sums in float32."""

    @staticmethod
    def forward(
        ctx: Any, groups: list[Group], low: torch.dtype, wide: torch.dtype, merged: bool, *parameters: Tensor
    ) -> Any:
        parts = _stacks(groups, parameters, wide)
        totals, saved = [], []
        if merged:
            totals = stack_all([[group.lay_out(weight) for weight in group.weights] for group in groups], wide)
        for n, (group, (core, left, right, *kernels)) in enumerate(zip(groups, parts, strict=True)):
            rows, *inner = update_rows(core, right, kernels, group.channels_last)
            if merged:
                totals[n].view(*left.shape[:2], -1).baddbmm_(left, rows)
            else:
                like = group.lay_out(group.weights[0])
                totals.append(torch.bmm(left, rows).view(len(group.weights), *like.shape))
            saved.append([core, left, right, *kernels, rows, *inner])
        ctx.groups, ctx.low, ctx.wide, ctx.sizes = groups, low, wide, [len(own) for own in saved]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *(tensor for own in saved for tensor in own))
        results = zip(groups, cast_all(totals, low), strict=True)
        return tuple(group.lay_back(weight) for group, stack in results for weight in stack.unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        groups: list[Group] = ctx.groups
        count = len(ctx.saved_tensors) - sum(ctx.sizes)
        parameters, saved = ctx.saved_tensors[:count], split(ctx.saved_tensors[count:], ctx.sizes)
        if torch.is_grad_enabled():
            return None, None, None, None, *_differentiable(groups, parameters, gradients, _delta)
        lists = split(gradients, [len(group.weights) for group in groups])
        results: list[Tensor | None] = []
        with torch.autocast(groups[0].scales.device.type, enabled=False):
            for group, own, tensors in zip(groups, lists, saved, strict=True):
                used = [g is not None for g in own]
                if not any(used):
                    results += [None] * (len(own) * group.modes)
                    continue
                (core, left, right, *kernels), (rows, *inner) = tensors[: group.modes], tensors[group.modes :]
                dense = _dense_gradients(group, own, ctx.low)
                d_left = product(dense, rows.mT.to(ctx.low), ctx.wide)
                d_rows = product(left.mT.to(ctx.low), dense, ctx.wide)
                d_core, *d_rest = rows_backward(d_rows, core, right, kernels, inner, group.channels_last)
                results += _without([d_core * group.scales, d_left, *d_rest], used, parameters[0].dtype)
        return None, None, None, None, *results


class _Factored(Function):
    """Cores and factors of all matrices -> per group the L matrices D (i, q), then the L matrices U (q, o)."""

    @staticmethod
    def forward(
        ctx: Any, groups: list[Group], low: torch.dtype, wide: torch.dtype, pads: bool, *parameters: Tensor
    ) -> Any:
        parts = _stacks(groups, parameters, low)
        results = []
        for core, left, right in parts:
            if core.shape[1] <= core.shape[2]:
                up, down = left, torch.bmm(core, right.mT)
            else:
                up, down = torch.bmm(left, core), right.mT
            if padding := padded(up.shape[2], up.dtype, up.device.type) - up.shape[2] if pads else 0:
                up, down = F.pad(up, (0, padding)), F.pad(down, (0, 0, 0, padding))
            results += [down.mT, up.mT]
        ctx.groups, ctx.low, ctx.wide = groups, low, wide
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *(tensor for own in parts for tensor in own))
        return tuple(unstack(results))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        groups: list[Group] = ctx.groups
        count = len(ctx.saved_tensors) - 3 * len(groups)
        parameters, parts = ctx.saved_tensors[:count], split(ctx.saved_tensors[count:], [3] * len(groups))
        if torch.is_grad_enabled():
            return None, None, None, None, *_differentiable(groups, parameters, gradients, _down_and_up)
        lists = split(gradients, [len(group.weights) for group in groups for _ in range(2)])
        results: list[Tensor | None] = []
        with torch.autocast(groups[0].scales.device.type, enabled=False):
            for n, (group, (core, left, right)) in enumerate(zip(groups, parts, strict=True)):
                downs, ups = lists[2 * n], lists[2 * n + 1]
                used = [g is not None for g in downs]
                if not any(used):
                    results += [None] * (3 * len(used))
                    continue
                d_down, d_up = (_thin_gradients(own, ctx.low) for own in (downs, ups))  # (L, q, i), (L, o, q)
                rank = min(core.shape[1:])
                d_down, d_up = d_down[:, :rank], d_up[..., :rank]
                if core.shape[1] <= core.shape[2]:
                    d_core, d_left, d_right = product(d_down, right, ctx.wide), d_up, product(d_down.mT, core, ctx.wide)
                else:
                    d_core, d_left, d_right = (
                        product(left.mT, d_up, ctx.wide),
                        product(d_up, core.mT, ctx.wide),
                        d_down.mT,
                    )
                results += _without([d_core * group.scales, d_left, d_right], used, parameters[0].dtype)
        return None, None, None, None, *results


def _thin_gradients(gradients: Sequence[Tensor | None], low: torch.dtype) -> Tensor:
    """L gradients of D or U -> their transposes, stacked."""
    like = next(g for g in gradients if g is not None)
    return stack_all([[(torch.zeros_like(like) if g is None else g).mT for g in gradients]], low)[0]


def _delta(group: Group, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    return [reconstruct(core, factors)]


def _down_and_up(group: Group, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    left, right = factors
    return [right @ core.mT, left.mT] if core.shape[0] <= core.shape[1] else [right, (left @ core).mT]


def _differentiable(
    groups: Sequence[Group], parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], one: Any
) -> list[Tensor | None]:
    """The gradients of ``parameters``, themselves differentiable: ``one`` entry at a time, by plain operations."""
    lists = iter(split(parameters, [len(group.weights) for group in groups for _ in range(group.modes)]))
    outputs: list[Tensor] = []
    for group in groups:
        own = list(zip(*(next(lists) for _ in range(group.modes)), strict=True))
        each = [one(group, core * scale, factors) for (core, *factors), scale in zip(own, group.scales, strict=True)]
        outputs += [tensor for column in zip(*each, strict=True) for tensor in column]
    pairs = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            narrow = gradient[tuple(slice(size) for size in output.shape)]  # padded ranks
            pairs.append((output, narrow.to(output.dtype)))
    used, given = zip(*pairs, strict=True)
    return list(torch.autograd.grad(used, parameters, given, create_graph=True, allow_unused=True))
