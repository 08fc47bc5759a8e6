"""What a layer gives to its model's pool, and how it runs with what the pool has formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flora.layers.core_space import CoreSpace
from flora.layers.execution.cost import Weight, adds_in_place, computing_dtype, of_one_type, pooled
from flora.layers.execution.pool import Entry
from flora.layers.weights.parameters import is_bare, is_plain
from flora.tuner.live import Ready
from flora.tuner.merging import MergeableWeight


class Given(NamedTuple):
    """What a layer has for a pool now.

    Attributes:
        adapter: its name. weight: W. parameters: the core and the factors. scale: what multiplies the core.
        marks: all that decides whether and how they are formed, beside the layer itself and the state that torch is in.
    """

    adapter: str
    weight: nn.Parameter
    parameters: tuple[Tensor, ...]
    scale: Tensor
    marks: tuple


class PooledWeight(MergeableWeight):
    """An adapted weight that can run together with others (``live``)."""

    def given(self) -> Given | None:
        """What this layer has for a model's pool; None if nothing, since it is not in an ordinary state."""
        active = self._active_adapter
        if self._disable_adapters or self.merged_adapters or len(active) != 1:
            return None
        # not by attributes of modules, which are slow
        adapter, modules = active[0], cast(dict[str, nn.Module], self._modules)
        base, space = modules["base_layer"], cast(CoreSpace | None, modules["tucker_space"]._modules.get(adapter))
        if space is None or self._dropout(adapter) > 0 or not is_bare(base) or not is_bare(space):
            return None
        weight = base._parameters.get("weight")
        if type(weight) is not nn.Parameter:
            return None
        parameters = cast(tuple[Tensor, ...], tuple(space._parameters.values()))
        # any of these changes when a ``.data`` is assigned
        own = [(type(tensor), tensor.shape, tensor.dtype, tensor.device) for tensor in (weight, *parameters)]
        whole = (weight.stride(), weight.requires_grad, hasattr(weight, "ds_id"), parameters[0].is_inference())
        marks = (own, whole, self.tucker_execution[adapter])
        scale, scaling = cast(Tensor, space._buffers["scale"]), self.tucker_scaling[adapter]
        return Given(adapter, weight, parameters, scale if scaling == 1 else scale * scaling, marks)

    def choice(self, given: Given, keeps: bool) -> tuple[str, torch.dtype] | None:
        """The form in which the layer takes part in a pool, and the type that it computes in; None if it should run on
        its own.

        Args:
            keeps: whether the pool keeps what it forms, and so wants thin tensors only.
        """
        weight, parameters = given.weight, given.parameters
        shapes = self.space(given.adapter).parameter_shapes
        # a type, a shape or a place of their own: sharded, swapped in by a function, or offloaded just now
        if not is_plain(weight) or weight.shape != self.weight_shape or parameters[0].is_inference():
            return None
        for parameter, shape in zip(parameters, shapes, strict=True):
            if type(parameter) is not nn.Parameter or parameter.shape != shape or parameter.device != weight.device:
                return None
        own = self.described(weight)
        if keeps:
            form = "factored" if own.kind == "matrix" else None
        else:
            form = pooled(own, self.tucker_execution[given.adapter])
        return None if form is None else (form, own.low)

    def entry(self, given: Given, form: str, low: torch.dtype) -> Entry:
        """What a pool forms of it."""
        parameters = given.parameters
        if form == "kernel":
            core, _, _, *kernels = parameters
            parameters = (core, *kernels)
        elif form == "factored" and self.kind.input_first:
            core, first, second = parameters
            parameters = (core.mT, second, first)
        return Entry(form, given.weight, parameters, given.scale, low)

    def described(self, weight: Tensor) -> Weight:
        """What decides how the layer runs with ``weight`` now."""
        kind = "matrix" if self.kind.is_matrix else "convolution"
        low = computing_dtype(weight)
        return Weight(weight.device.type, kind, self.weight_shape, weight.dtype, low, torch.is_grad_enabled())

    def from_pool(self, x: Tensor, ready: Ready) -> Tensor | None:
        """The output, by what the model's pool has formed for this layer; None if the input does not fit."""
        base = cast(nn.Module, self._modules["base_layer"])
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if (ready.autocast is None and x.dtype != cast(Tensor, weight).dtype) or self._dropout(ready.adapter) > 0:
            return None
        plain = cast(Callable[..., Tensor], self.kind.plain)
        if ready.form == "merged":
            return plain(base, x, ready.tensors[0], bias)
        if ready.form == "kernel" or (ready.form == "factored" and adds_in_place(x.device.type)):
            return self._by_itself(base, x, ready)
        if ready.autocast is not None:
            x = x.to(ready.autocast)
        if ready.form == "delta":
            return plain(base, x, weight, bias).add_(plain(base, x, ready.tensors[0], None))
        down, up = ready.tensors
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        output = plain(base, rows, weight, bias).addmm_(rows.mm(down), up)
        return output if x.ndim == 2 else output.view(*x.shape[:-1], output.shape[-1])

    def _by_itself(self, base: nn.Module, x: Tensor, ready: Ready) -> Tensor | None:
        """The output by the layer's own function, with all products done that are on weights alone."""
        core: Tensor | None = None
        if ready.form == "kernel":
            (core,) = ready.tensors
            space = cast(nn.Module, cast(nn.Module, self._modules["tucker_space"])._modules[ready.adapter])
            _, first, second, *_ = cast(tuple[Tensor, ...], tuple(space._parameters.values()))
        else:
            down, up = ready.tensors
            first, second = (down, up.mT) if self.kind.input_first else (up.mT, down)
        weight, bias = cast(Tensor, base._parameters["weight"]), base._parameters["bias"]
        tensors = of_one_type(x, weight, bias, first)
        if tensors is None or self.kind.fused is None:
            return None
        x, frozen, own = tensors
        execution = self.tucker_execution[ready.adapter]
        return self.kind.fused(base, frozen, own, core, (first, second), x, execution)
