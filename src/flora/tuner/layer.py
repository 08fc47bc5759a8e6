"""The wrapped layer: one class for every kind of layer and for raw parameters. Here is how it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.layers.batches import batch_mode
from flora.layers.execution.cost import LOW_PRECISION, can_fuse, in_graph, of_one_type
from flora.layers.execution.in_graph import delta_in_graph
from flora.layers.execution.stand_in import Refused, StandIn
from flora.layers.kinds import RAW
from flora.layers.sites import Site
from flora.layers.weights.offload import loaded
from flora.layers.weights.parameters import is_bare, is_plain, run_with_weights
from flora.layers.weights.sharded import in_parts, is_distributed, swapped
from flora.tuner.live import live
from flora.tuner.names import names_for
from flora.tuner.peft_compat import BaseTunerLayer
from flora.tuner.pooled_weight import PooledWeight


class FloraLayer(PooledWeight):
    """A layer that runs with the updates of its active adapters (paper section 4, equations 5 to 7).

    Where the kind of layer allows it, the first update runs together with the base layer (*fused*), and others beside
    it (*factored*); an update that can only act as a weight is in the weight (*merged*).
    """

    def __init__(self, base_layer: nn.Module, site: Site, shape: Sequence[int], shared: bool = False) -> None:
        super().__init__(base_layer, site, shape, shared)
        inner, layer, depth = self.get_base_layer(), base_layer, 0
        while isinstance(layer, BaseTunerLayer):
            layer, depth = layer.base_layer, depth + 1
        self.factorable = self.kind.can_factor(inner)
        fused = self.kind.fused is not None and not self.kind.quantizes(inner)
        self.fusable = self.factorable and fused and base_layer is inner
        self.poolable = self.fusable and self.kind.plain is not None
        self.batch_mode = batch_mode(inner)
        self.weight_path = "base_layer." * depth + site.parameter  # as seen from base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base layer's. ``adapter_names`` gives every sample of the batch an adapter of its own."""
        # not by attributes of modules, which are slow; nor in `_quick` and what it calls
        adapter_names = (kwargs.pop("adapter_names", None) if kwargs else None) or names_for(self)
        if self._disable_adapters or (self.merged_adapters and adapter_names is None):
            return cast(nn.Module, self._modules["base_layer"])(*args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(adapter_names, args, kwargs)
        if self.fusable and len(args) == 1 and not kwargs:
            result = self._quick(args[0])
            if result is not None:
                return result
        return self._adapted(self._present(self.active_adapters), args, kwargs)

    def _quick(self, x: Tensor) -> Tensor | None:
        """The output of a layer with one active adapter and nothing unusual about it; else None."""
        active = self._active_adapter
        if len(active) != 1:
            return None
        if self.poolable and not torch.compiler.is_compiling() and (pool := live()) is not None:
            ready = pool.of(self, x.device.type)
            if ready is not None and ready.adapter == active[0]:
                result = self.from_pool(x, ready)
                if result is not None:
                    return result
        has_it = active[0] in cast(nn.Module, self._modules["tucker_space"])._modules
        return self._fused(active[0], x) if has_it else None

    def _seen_from_outside(self, name: str) -> Any:
        if names_for(self) is None or name != self.parameter_name or self.is_quantized:
            return super()._seen_from_outside(name)
        why = f"layer {self.name!r}: its weight is read, not called: `adapter_names` can't give each sample its own"
        return Refused.of(self.base_parameter, why)

    # ---------------------------------------------------------------------------------------- one layer by itself

    def _adapted(self, adapters: list[str], args: tuple, kwargs: dict, **inner: Any) -> Any:
        """The base layer with the updates of ``adapters``. ``inner`` is for the base layer alone.

        The first runs fused with the base layer if it can. Otherwise, those that act as a weight are in the weight, and
        the others are added beside the layer.
        """
        result, beside = None, adapters
        if adapters and self.fusable and len(args) + len(kwargs) == 1 and not inner:
            (x, *_), _ = self._input_first(args, kwargs)
            result, beside = self._fused(adapters[0], x), adapters[1:]
        if result is None:
            inside = [a for a in adapters if self._form(a) == "merged"]
            beside = [a for a in adapters if a not in inside]
            if inside and in_parts(self.base_parameter, self.weight_shape):
                result = self._in_parts(inside, args, {**kwargs, **inner})
            elif inside:
                with loaded(self.get_base_layer()):
                    weight = {self.weight_path: self._weight_or_stand_in(inside)}
                    result = run_with_weights(self.base_layer, weight, args, {**kwargs, **inner})
            else:
                result = self.base_layer(*args, **kwargs, **inner)
        for adapter in beside:
            result = self._add_beside(result, adapter, args, kwargs)
        return result

    def _in_parts(self, adapters: list[str], args: tuple, kwargs: dict) -> Any:
        """The base layer with another weight, swapped between the hooks of the engine that keeps it in parts. If an
        update can run beside the layer, it is the weight of a second call: W + delta in half precision would round
        small updates away."""
        layer, name = self.get_base_layer(), self.parameter_name
        if not self.factorable or self.base_layer is not layer:
            with swapped(layer, name, partial(self._add_updates, adapters=adapters)):
                return self.base_layer(*args, **kwargs)
        result = self.base_layer(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(swapped(layer, name, partial(self._updates_like, adapters=adapters)))
            if getattr(layer, "bias", None) is not None:
                stack.enter_context(swapped(layer, "bias", torch.zeros_like))
            return result + self.base_layer(*args, **kwargs)

    def _fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """Base layer and update in one. None if that cannot be: the base layer has hooks, the update's input is dropped
        out, or the numbers are of several types."""
        base = cast(nn.Module, self._modules["base_layer"])
        weight = base._parameters.get("weight")
        weight = self.base_parameter if weight is None else weight
        if not is_plain(weight) or not is_bare(base) or self._dropout(adapter) > 0 or not can_fuse():
            return None
        core, factors = self._scaled(adapter)
        tensors = of_one_type(x, weight, cast(Any, base).bias, core)
        if tensors is None or self.kind.fused is None:
            return None
        x, frozen, bias = tensors
        return self.kind.fused(base, frozen, bias, core, factors, x, self.tucker_execution[adapter])

    def _form(self, adapter: str) -> str:
        """How an update runs that is not fused: "merged", in the weight; "delta", as the weight of a second call;
        "factored"."""
        # each process of tensor parallelism has its part of the input, or of the output: the update acts as a weight
        weight, execution = self.base_parameter, self.tucker_execution[adapter]
        if not self.factorable or is_distributed(weight):
            return "merged"
        # only the factored form has an input of its own to drop out; others drop ranks
        if self._dropout(adapter) > 0 or self.is_quantized or weight.is_meta:
            return "factored"
        if execution != "auto":
            return execution
        if torch.compiler.is_compiling() and self.poolable:
            form = in_graph(self.described(weight))
            if form is not None:
                return form
        # thin layers are not thin in a grouped convolution: groups × rank channels
        grouped = getattr(self.get_base_layer(), "groups", 1) > 1
        return "factored" if not grouped else "delta" if weight.dtype in LOW_PRECISION else "merged"

    def _weight_or_stand_in(self, adapters: Sequence[str]) -> Tensor:
        """The weight with the updates in it; for a stack of matrices a stand-in that forms only what it must."""
        weight, execution = self.base_parameter, self.tucker_execution[adapters[0]]
        stack = self.kind is RAW and execution != "merged"
        if stack and len(adapters) == 1 and can_fuse() and is_plain(weight):
            return StandIn.of(weight, *self._dropped(adapters[0], weight), execution)
        return self._weight_with(adapters)

    def _add_beside(self, result: Tensor, adapter: str, args: tuple, kwargs: dict) -> Tensor:
        (x, *others), kwargs = self._input_first(args, kwargs)
        layer = self.get_base_layer()
        if x.is_floating_point() and self._form(adapter) == "delta":
            plain = cast(Callable[..., Tensor], self.kind.plain)
            own = self.described(self.base_parameter)
            if torch.compiler.is_compiling() and own.low != own.dtype and in_graph(own) == "delta":
                delta = delta_in_graph(*self._scaled(adapter), own.low)
            else:
                delta = self.get_delta_weight(adapter).to(x.dtype)
            return result + plain(layer, x, delta, None)
        if x.is_floating_point():
            core, factors = self._scaled(adapter)
            # beside a half-precision input the factors are cast, which are thin. Not by PEFT's method, which no
            # compiler before torch 2.12 can follow from a module with a __getattr__
            stays = x.dtype in LOW_PRECISION or not getattr(self, "cast_input_dtype_enabled", True)
            x = F.dropout(x if stays else x.to(core.dtype), self._dropout(adapter))
        else:
            core, factors = self._dropped(adapter, self.base_parameter)
        factored = cast(Callable[..., Tensor], self.kind.factored)  # `factorable` says so
        update = factored(layer, core, factors, x, *others, **kwargs)
        return (result + update).to(result.dtype)

    def input_of(self, args: tuple, kwargs: dict) -> Tensor:
        """The layer's input among the arguments of a call."""
        return self._input_first(args, kwargs)[0][0]

    def _input_name(self, kwargs: dict) -> str:
        """The keyword that the layer's input was passed by; a subclass may give it another name."""
        return self.kind.input_name if self.kind.input_name in kwargs or not kwargs else next(iter(kwargs))

    def _input_first(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The layer's input as the first positional argument, even if it was passed by name."""
        if args:
            return args, kwargs
        name = self._input_name(kwargs)
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    def _mixed_batch(self, adapter_names: Sequence[str], args: tuple, kwargs: dict) -> Any:
        """Each sample with its own adapter ("__base__" for none). Every adapter runs its own samples (or the whole
        batch, if the layer has several inputs) and keeps its own rows."""
        x, mode = self._batch(adapter_names, args, kwargs), self.batch_mode
        single = len(args) + len(kwargs) == 1
        order: list[int] = []
        parts: list[tuple] = []
        for adapter in dict.fromkeys(adapter_names):
            own = [n for n, name in enumerate(adapter_names) if name == adapter]
            rows = torch.tensor(own, device=x.device)
            inner = {}
            if isinstance(self.base_layer, FloraLayer):  # another weight of the same layer, with adapters of its own
                inner["adapter_names"] = [adapter] * len(own if single else adapter_names)
            if single:
                samples = x.index_select(mode, rows)
                args, kwargs = ((samples,), {}) if args else ((), {self._input_name(kwargs): samples})
            part = self._adapted(self._present([adapter]), args, kwargs, **inner)
            outputs = part if isinstance(part, tuple) else (part,)
            # attention's second output, its weights, is always batch first
            axes = [mode] + [0] * (len(outputs) - 1)
            kept = [t if single or t is None else t.index_select(a, rows) for t, a in zip(outputs, axes, strict=True)]
            order += own
            parts.append(tuple(kept))
        back = torch.tensor(order, device=x.device).argsort()
        whole = tuple(
            None if pieces[0] is None else torch.cat(pieces, axis).index_select(axis, back)
            for pieces, axis in zip(zip(*parts, strict=True), axes, strict=True)
        )
        return whole if isinstance(part, tuple) else whole[0]

    def _batch(self, adapter_names: Sequence[str], args: tuple, kwargs: dict) -> Tensor:
        """The layer's input. Raises ValueError unless it has as many samples as there are names."""
        if not args and not kwargs:
            raise ValueError(f"layer {self.name!r}: `adapter_names` needs the layer's input")
        (x, *others), rest = self._input_first(args, kwargs)
        samples = self.kind.samples(self.get_base_layer(), x, *others[:1], **rest)
        if samples is None:
            raise ValueError(
                f"layer {self.name!r}: `adapter_names` needs a batch, got one sample of shape {list(x.shape)}"
            )
        if samples != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {samples} respectively (layer {self.name!r})."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        return x
