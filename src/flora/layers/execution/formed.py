"""What a pool forms, as autograd functions over the layers of all groups at once.

The backward pass keeps thin tensors only, and projects the dense gradients. For a second derivative it repeats the work
with plain operations. Letters as in ``batched``; "wide" is float32 or the adapter's own type if that is wider, "low"
the type that the layers compute in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from flora.layers.execution.batched import (
    cast_all,
    fold,
    fold_backward,
    product,
    rows_backward,
    split,
    stack_all,
    unstack,
    update_rows,
)
from flora.layers.execution.cost import padded, without_autocast
from flora.tucker import reconstruct

Gradients = Sequence[Sequence[Tensor | None]]
Plain = Callable[["Group", Tensor, Sequence[Tensor]], list[Tensor]]
Project = Callable[["Work", "Group", Sequence[Tensor], Gradients], list[Tensor]]


@dataclass(frozen=True)
class Group:
    """Entries whose tensors can be stacked.

    Attributes:
        weights: L weights W.
        scales: (L, 1, …), to multiply the stacked cores.
        channels_last: the weights' layout.
        parts: how many parameters an entry has.
    """

    weights: list[Tensor]
    scales: Tensor
    channels_last: bool
    parts: int

    def lay_out(self, weight: Tensor) -> Tensor:
        """A weight of this group, its modes in the order in which they lie in memory."""
        return weight.movedim(1, -1) if self.channels_last else weight

    def lay_back(self, weight: Tensor) -> Tensor:
        """Undo ``lay_out``."""
        return weight.movedim(-1, 1) if self.channels_last else weight


class Work(NamedTuple):
    """What one function is to form.

    Attributes:
        groups: the entries.
        low, wide: types.
        adds: whether W is added to ΔW.
        pads: whether ranks may be filled up with zeros.
    """

    groups: list[Group]
    low: torch.dtype
    wide: torch.dtype
    adds: bool
    pads: bool


def _parts(work: Work, parameters: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Group, list[Tensor]]]:
    """All parameters -> each group with its scaled cores (L, r, s, …) and its factors (L, I_n, r_n), in ``dtype``."""
    lists = split(parameters, [len(group.weights) for group in work.groups for _ in range(group.parts)])
    stacks = split(stack_all(lists, dtype), [group.parts for group in work.groups])
    pairs = zip(work.groups, stacks, strict=True)
    return [(group, [core * group.scales.to(dtype), *factors]) for group, (core, *factors) in pairs]


def _without(gradients: list[Tensor], used: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Stacked gradients -> those of single parameters, in their type, or autograd would cast them one by one; None for
    a layer that took no part in the output."""
    stacks = (stack.to(dtype).unbind(0) for stack in gradients)
    return [g if own else None for stack in stacks for g, own in zip(stack, used, strict=True)]


def _keep(ctx: Any, work: Work, parameters: Sequence[Tensor], saved: Sequence[Sequence[Tensor]]) -> None:
    """Note for ``_backward`` the work, the parameters and what was made of each group's."""
    # parameters as they are: to save and unpack so many takes time, and only a second derivative wants them
    ctx.work, ctx.sizes, ctx.parameters = work, [len(own) for own in saved], parameters
    ctx.versions = [parameter._version for parameter in parameters]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[tensor for own in saved for tensor in own])


def _backward(ctx: Any, gradients: Sequence[Tensor | None], plain: Plain, project: Project) -> tuple[Any, ...]:
    """A function's backward pass.

    Args:
        plain: (group, scaled core, factors) of one entry -> its outputs, by plain operations.
        project: (work, group, what was saved of it, the gradients of each output) -> the stacked gradients of the
            scaled cores and of the factors.
    """
    work, parameters, kept = ctx.work, ctx.parameters, ctx.saved_tensors
    if torch.is_grad_enabled():
        if ctx.versions != [parameter._version for parameter in parameters]:
            raise RuntimeError("parameters have changed since the forward pass, which a second derivative needs")
        return None, *_differentiable(work.groups, parameters, gradients, plain)
    outputs = len(gradients) // sum(len(group.weights) for group in work.groups)
    lists = iter(split(gradients, [len(group.weights) for group in work.groups for _ in range(outputs)]))
    results: list[Tensor | None] = []
    with without_autocast(parameters[0].device.type):
        for group, saved in zip(work.groups, split(kept, ctx.sizes), strict=True):
            own = [*islice(lists, outputs)]
            used = [g is not None for g in own[0]]
            if any(used):
                d_core, *d_factors = project(work, group, saved, own)
                results += _without([d_core * group.scales, *d_factors], used, parameters[0].dtype)
            else:
                results += [None] * (len(used) * group.parts)
    return None, *results


def _stacked(gradients: Sequence[Tensor | None], dtype: torch.dtype, lay_out: Callable[[Tensor], Tensor]) -> Tensor:
    """L gradients, zero where there is none -> (L, …)."""
    like = next(g for g in gradients if g is not None)
    return stack_all([[lay_out(torch.zeros_like(like) if g is None else g) for g in gradients]], dtype)[0]


class Dense(Function):
    """Cores and factors of all entries -> W + ΔW, or ΔW alone, of each. Matrices, and convolutions of any kernel,
    groups and layout. Dense gradients are projected in their own type, with sums in float32."""

    @staticmethod
    def forward(ctx: Any, work: Work, *parameters: Tensor) -> Any:
        totals, saved = [], []
        if work.adds:
            weights = [[group.lay_out(weight) for weight in group.weights] for group in work.groups]
            totals = stack_all(weights, work.wide)
        for n, (group, (core, left, right, *kernels)) in enumerate(_parts(work, parameters, work.wide)):
            rows, *inner = update_rows(core, right, kernels, group.channels_last)
            if work.adds:
                totals[n].view(*left.shape[:2], -1).baddbmm_(left, rows)
            else:
                like = group.lay_out(group.weights[0])
                totals.append(torch.bmm(left, rows).view(len(group.weights), *like.shape))
            saved.append([core, left, right, *kernels, rows, *inner])
        _keep(ctx, work, parameters, saved)
        results = zip(work.groups, cast_all(totals, work.low), strict=True)
        return tuple(group.lay_back(weight) for group, stack in results for weight in stack.unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, gradients, _delta, _project_dense)


def _delta(group: Group, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    return [reconstruct(core, factors)]


def _project_dense(work: Work, group: Group, saved: Sequence[Tensor], gradients: Gradients) -> list[Tensor]:
    (core, left, right, *kernels), (rows, *inner) = saved[: group.parts], saved[group.parts :]
    dense = _stacked(gradients[0], work.low, group.lay_out).flatten(2)  # (L, o, n)
    d_left = product(dense, rows.mT.to(work.low), work.wide)
    d_rows = product(left.mT.to(work.low), dense, work.wide)
    d_core, *d_rest = rows_backward(d_rows, core, right, kernels, inner, group.channels_last)
    return [d_core, d_left, *d_rest]


class Factored(Function):
    """Cores and factors of all matrices -> per group the L matrices D (i, q), then the L matrices U (q, o)."""

    @staticmethod
    def forward(ctx: Any, work: Work, *parameters: Tensor) -> Any:
        results, saved = [], []
        for _, (core, left, right) in _parts(work, parameters, work.low):
            if core.shape[1] <= core.shape[2]:
                up, down = left, torch.bmm(core, right.mT)
            else:
                up, down = torch.bmm(left, core), right.mT
            if padding := padded(up.shape[2], up.dtype, up.device.type) - up.shape[2] if work.pads else 0:
                up, down = F.pad(up, (0, padding)), F.pad(down, (0, 0, 0, padding))
            results += [down.mT, up.mT]
            saved.append([core, left, right])
        _keep(ctx, work, parameters, saved)
        return tuple(unstack(results))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, gradients, _down_and_up, _project_thin)


def _down_and_up(group: Group, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    left, right = factors
    return [right @ core.mT, left.mT] if core.shape[0] <= core.shape[1] else [right, (left @ core).mT]


def _project_thin(work: Work, group: Group, saved: Sequence[Tensor], gradients: Gradients) -> list[Tensor]:
    core, left, right = saved
    d_down, d_up = (_stacked(own, work.low, lambda g: g.mT) for own in gradients)  # (L, q, i), (L, o, q)
    rank = min(core.shape[1:])
    d_down, d_up = d_down[:, :rank], d_up[..., :rank]
    if core.shape[1] <= core.shape[2]:
        return [product(d_down, right, work.wide), d_up, product(d_down.mT, core, work.wide)]
    return [product(left.mT, d_up, work.wide), product(d_up, core.mT, work.wide), d_down.mT]


class Kernel(Function):
    """Cores and kernel factors of all convolutions -> K (r, s, k …) of each."""

    @staticmethod
    def forward(ctx: Any, work: Work, *parameters: Tensor) -> Any:
        results, saved = [], []
        for _, (core, *kernels) in _parts(work, parameters, work.wide):
            kernel, basis = fold(core, kernels)
            results.append(kernel.view(*core.shape[:3], *(factor.shape[1] for factor in kernels)))
            saved.append([core, *kernels, basis])
        _keep(ctx, work, parameters, saved)
        return tuple(unstack(results))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, gradients, _kernel, _project_kernel)


def _kernel(group: Group, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    whole = [torch.eye(rank, dtype=core.dtype, device=core.device) for rank in core.shape[:2]]
    return [reconstruct(core, [*whole, *factors])]


def _project_kernel(work: Work, group: Group, saved: Sequence[Tensor], gradients: Gradients) -> list[Tensor]:
    core, *kernels, basis = saved
    d_kernel = _stacked(gradients[0], work.wide, lambda g: g.flatten(2).flatten(0, 1))
    return fold_backward(d_kernel, core, kernels, basis)


def _differentiable(
    groups: Sequence[Group], parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], plain: Plain
) -> list[Tensor | None]:
    """The gradients of ``parameters``, themselves differentiable: entry by entry, by plain operations."""
    lists = iter(split(parameters, [len(group.weights) for group in groups for _ in range(group.parts)]))
    outputs: list[Tensor] = []
    for group in groups:
        own = list(zip(*(next(lists) for _ in range(group.parts)), strict=True))
        each = [plain(group, core * scale, factors) for (core, *factors), scale in zip(own, group.scales, strict=True)]
        outputs += [tensor for column in zip(*each, strict=True) for tensor in column]
    pairs = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            narrow = gradient[tuple(slice(size) for size in output.shape)]  # padded ranks
            pairs.append((output, narrow.to(output.dtype)))
    used, given = zip(*pairs, strict=True)
    return list(torch.autograd.grad(used, parameters, given, create_graph=True, allow_unused=True))
