"""FLoRA's weight-side work of a step for all adapted layers of a model at once: few launches, however many layers.

A prototype for GPUs (README.md has its times). `AllLayers` runs before the model's forward. It forms what each layer
needs, and the layer itself does nothing but plain operations:

    factored    y = F.linear(x, W, b).addmm_(x.mm(D), U)        D (i, q), U (q, o), with (D U)ᵀ = s · A G Bᵀ
    merged      y = F.linear(x, W', b), or the convolution      W' = W + s · G ×₁ A ×₂ B ×₃ …, in the compute type

Layers with weights of one shape, with equal ranks and memory formats, form a `Group`; their tensors are stacked.

Letters: L layers of a group; o and i outputs and inputs (i per group of channels); r and s their ranks, q the smaller
one; A (o, r) the left factor, B (i, s) the right one; k kernel taps, c the product of the kernel ranks, n = i · k.
"wide" is the type of the adapter's parameters, "low" the compute type under autocast or of a bf16 model.

Not differentiable twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from batched import cast_all, product, rows_backward, split, stack_all, unstack, update_rows
from torch import Tensor, nn
from torch.autograd import Function


class AdaptedLayer(nn.Module):
    """A frozen Linear or convolution and its core space."""

    def __init__(self, base: nn.Module, core: Tensor, factors: Iterable[Tensor], scale: float) -> None:
        """core: (r, s, …), one rank per dimension of the weight. factors: (I_n, r_n) per dimension."""
        super().__init__()
        self.base = base
        self.core = nn.Parameter(core)
        self.factors = nn.ParameterList(factors)
        self.scale = scale


class FactoredLinear(AdaptedLayer):
    """(…, i) -> (…, o): the frozen layer plus two thin products."""

    down: Tensor  # (i, q); `AllLayers` sets both before each forward
    up: Tensor  # (q, o)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.to(self.down.dtype).flatten(0, -2)
        output = F.linear(rows, self.base.weight, self.base.bias).addmm_(rows.mm(self.down), self.up)
        return output.view(*input.shape[:-1], -1)


class MergedLayer(AdaptedLayer):
    """The base layer, linear or convolution, with W' in place of its weight."""

    weight: Tensor  # W'; `AllLayers` sets it before each forward

    def forward(self, input: Tensor) -> Tensor:
        run = F.linear if isinstance(self.base, nn.Linear) else self.base._conv_forward
        return run(input, self.weight, self.base.bias)


@dataclass
class Group:
    """Layers whose tensors can be stacked.

    scales (L, r, s, …): each layer's scale, expanded to its core, so that one multi-tensor product scales all cores.
    """

    layers: list[AdaptedLayer]
    scales: Tensor
    channels_last: bool

    @classmethod
    def of(cls, layers: list[AdaptedLayer], channels_last: bool) -> Group:
        core = layers[0].core
        scales = torch.tensor([layer.scale for layer in layers], dtype=core.dtype, device=core.device)
        return cls(layers, scales.view(-1, *[1] * core.ndim).expand(-1, *core.shape).contiguous(), channels_last)

    def lay_out(self, weight: Tensor) -> Tensor:
        """A weight of this group, its dimensions in the order in which they lie in memory."""
        return weight.movedim(1, -1) if self.channels_last else weight

    def lay_back(self, weight: Tensor) -> Tensor:
        """Undo `lay_out`."""
        return weight.movedim(-1, 1) if self.channels_last else weight


class AllLayers:
    """The forward pre-hook of a model: sets `down` and `up`, or `weight`, of all its layers of one class.

        work = AllLayers([layer for layer in model.modules() if isinstance(layer, MergedLayer)])
        model.register_forward_pre_hook(work)

    Its tensors belong to one forward, and to the backward of that forward. A library should also drop them from the
    layers when the forward ends: here they keep the graph of a step alive until the next.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], multiple: int = 1) -> None:
        """layers: all `FactoredLinear`, or all `MergedLayer`. multiple: pad q to a multiple of it (factored only)."""
        by_form = defaultdict(list)
        for layer in layers:
            weight = layer.base.weight
            channels_last = weight.ndim > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
            by_form[weight.shape, layer.core.shape, channels_last].append(layer)
        self.groups = [Group.of(own, channels_last) for (_, _, channels_last), own in by_form.items()]
        self.factored = isinstance(layers[0], FactoredLinear)
        self.multiple = multiple
        # stacked parameter by parameter: the cores of a group, its left factors, its right factors, …
        names = [(group.layers, n) for group in self.groups for n in range(-1, group.scales.ndim - 1)]
        self.parameters = [layer.core if n < 0 else layer.factors[n] for own, n in names for layer in own]

    def __call__(self, *_: Any) -> None:
        first = self.groups[0].layers[0]
        device = first.core.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.base.weight.dtype
        with torch.autocast(device, enabled=False):
            if self.factored:
                results = iter(Factors.apply(self.groups, low, self.multiple, *self.parameters))
            else:
                results = iter(Merged.apply(self.groups, low, *self.parameters))
        for group in self.groups:
            for name in ("down", "up") if self.factored else ("weight",):
                for layer in group.layers:
                    setattr(layer, name, next(results))


def parameter_lists(groups: Sequence[Group], parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters of all layers -> one list per group and parameter, as `AllLayers` orders them."""
    return split(parameters, [len(group.layers) for group in groups for _ in range(group.scales.ndim)])


class Factors(Function):
    """Cores and factors of all linear layers -> per group the L matrices D (i, q), then the L matrices U (q, o).

    For g groups that is 2 + g launches forward and 3 + 2 g backward, and 2 to 4 more where q is padded.
    """

    @staticmethod
    def forward(ctx: Any, groups: list[Group], low: torch.dtype, multiple: int, *parameters: Tensor) -> Any:
        stacks = stack_all(parameter_lists(groups, parameters), low)
        torch._foreach_mul_(stacks[::3], [group.scales.to(low) for group in groups])
        results = []
        for core, left, right in split(stacks, [3] * len(groups)):
            if core.shape[1] <= core.shape[2]:
                up, down = left, torch.bmm(core, right.mT)
            else:
                up, down = torch.bmm(left, core), right.mT
            if padding := -up.shape[2] % multiple:
                up, down = F.pad(up, (0, padding)), F.pad(down, (0, 0, 0, padding))
            results += [down.mT, up.mT]
        ctx.groups, ctx.wide = groups, parameters[0].dtype
        ctx.save_for_backward(*stacks)
        return tuple(unstack(results))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts = split(ctx.saved_tensors, [3] * len(ctx.groups))
        low, wide = parts[0][0].dtype, ctx.wide
        lists = split((g.mT for g in gradients), [len(group.layers) for group in ctx.groups for _ in range(2)])
        # Of dU and dD, one is a factor's gradient as it stands (final), the other goes into two more products (inner).
        left_is_up = [core.shape[1] <= core.shape[2] for core, _, _ in parts]
        inner = stack_all([lists[2 * n + (not as_is)] for n, as_is in enumerate(left_is_up)], low)
        final = stack_all([lists[2 * n + as_is] for n, as_is in enumerate(left_is_up)], wide)
        results = []
        for as_is, (core, left, right), d_inner, d_final in zip(left_is_up, parts, inner, final, strict=True):
            rank = min(core.shape[1:])
            if as_is:
                d_down = d_inner[:, :rank]
                results += [product(d_down, right, wide), d_final[..., :rank], product(d_down.mT, core, wide)]
            else:
                d_up = d_inner[..., :rank]
                results += [product(left.mT, d_up, wide), product(d_up, core.mT, wide), d_final[:, :rank].mT]
        torch._foreach_mul_(results[::3], [group.scales for group in ctx.groups])
        return None, None, None, *unstack(results)


class Merged(Function):
    """Cores and factors of all layers -> W' of all layers.

    W' is summed in the wide type and rounded once to ``low``. Backward projects the dense gradients of W' in ``low``,
    with sums in float32. Linear layers and convolutions of any kernel, groups and memory format.
    """

    @staticmethod
    def forward(ctx: Any, groups: list[Group], low: torch.dtype, *parameters: Tensor) -> Any:
        wide, lists = parameters[0].dtype, parameter_lists(groups, parameters)
        weights = [[group.lay_out(layer.base.weight) for layer in group.layers] for group in groups]
        if all(weight.dtype == wide for own in weights for weight in own):
            stacks = stack_all([*lists, *weights], wide)
        else:  # a copy of mixed types runs tensor by tensor
            stacks = [*stack_all(lists, wide), *stack_all(weights, wide)]
        parts, totals = split(stacks, [group.scales.ndim for group in groups]), stacks[len(lists) :]
        torch._foreach_mul_([core for core, *_ in parts], [group.scales for group in groups])
        saved = []
        for group, (core, left, right, *kernels), total in zip(groups, parts, totals, strict=True):
            rows, *inner = update_rows(core, right, kernels, group.channels_last)
            total.view(*left.shape[:2], -1).baddbmm_(left, rows)
            saved.append([rows, *inner, core, left, right, *kernels])
        ctx.groups, ctx.sizes = groups, [len(own) for own in saved]
        ctx.save_for_backward(*(tensor for own in saved for tensor in own))
        results = zip(groups, cast_all(totals, low), strict=True)
        return tuple(group.lay_back(weight) for group, stack in results for weight in stack.unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = split(ctx.saved_tensors, ctx.sizes)
        rows, wide, low = [own.pop(0) for own in saved], saved[0][0].dtype, gradients[0].dtype
        inner = [[own.pop(0), own.pop(0)] if len(own) > 3 else [] for own in saved]
        lists = split(gradients, [len(group.layers) for group in ctx.groups])
        laid = [[group.lay_out(g) for g in own] for group, own in zip(ctx.groups, lists, strict=True)]
        dense = [stack.flatten(2) for stack in stack_all(laid, low)]  # (L, o, n)
        narrow_rows, narrow_left = split(cast_all([*rows, *(left for _, left, *_ in saved)], low), [len(rows)] * 2)
        results = []
        for n, (core, _, right, *kernels) in enumerate(saved):
            d_left, d_rows = product(dense[n], narrow_rows[n].mT, wide), product(narrow_left[n].mT, dense[n], wide)
            channels_last = ctx.groups[n].channels_last
            d_core, *d_rest = rows_backward(d_rows, core, right, kernels, inner[n], channels_last)
            results.append([d_core, d_left, *d_rest])
        torch._foreach_mul_([d_core for d_core, *_ in results], [group.scales for group in ctx.groups])
        return None, None, *unstack(stack for own in results for stack in own)
