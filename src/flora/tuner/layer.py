"""The wrapped layer: one class for every kind of layer and for raw parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from flora.layers import kinds
from flora.layers.core_space import CoreSpace, add_updates, drop_ranks, unified_scale
from flora.layers.cost import LOW_PRECISION, can_fuse, of_one_type
from flora.layers.stand_in import StandIn
from flora.tuner.peft_compat import gather_params_ctx


class FloraLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight ``parameter_name`` gets the update of one ``CoreSpace`` an adapter.

    ``name`` is for error messages; ``shared`` says that other modules hold the same weight: merging unties it then.
    Where several weights of one layer are adapted (attention's projections, a pair of expert stacks), one FloraLayer
    wraps another, each with its own weight.

    ``tucker_space[adapter]`` is the CoreSpace. ``tucker_scaling[adapter]`` is a run-time multiplier, 1 at first, which
    is not saved.
    """

    adapter_layer_names = ("tucker_space",)
    other_param_names = ("tucker_scaling", "tucker_dropout", "tucker_execution")

    def __init__(self, base_layer: nn.Module, name: str, parameter_name: str = "weight", shared: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.parameter_name = parameter_name
        self.tucker_space = nn.ModuleDict()
        self.tucker_scaling: dict[str, float] = {}
        self.tucker_dropout: dict[str, float] = {}
        self.tucker_execution: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self.shared = shared
        self._kept: list[nn.Parameter] = []  # a list, or torch would count it among the layer's parameters
        self._active_adapter: list[str] = []
        inner = self.get_base_layer()
        self.kind, self.weight_shape, self.roles = kinds.describe(inner, parameter_name)
        if self.kind is not None:  # PEFT's names for them, whatever the kind of layer
            self.in_features, self.out_features = kinds.features(inner, self.weight_shape, self.roles)
        self.factorable = self.kind is not None and self.kind.can_factor(inner)
        self.fusable = self.factorable and self.kind.fused is not None and base_layer is inner
        depth, layer = 0, base_layer
        while layer is not inner:
            depth, layer = depth + 1, layer.base_layer
        self._weight_path = "base_layer." * depth + parameter_name  # as seen from base_layer
        self.batch_mode = 0 if getattr(inner, "batch_first", True) else 1

    def __getattr__(self, name: str) -> Any:
        # models read in_features, kernel_size, embed_dim … of a layer: those are the base layer's
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return self._seen_from_outside(name)

    def _seen_from_outside(self, name: str) -> Any:
        """An attribute of the base layer; its weight with the updates in it, for the models that read a layer's weight
        and never call the layer (Swin's and EVA's attention)."""
        if name != self.parameter_name:
            return getattr(self.base_layer, name)
        off = self.disable_adapters or self.merged
        return self._weight_with([] if off else self._present(self.active_adapters))

    @property
    def weight(self) -> Tensor:
        return self._seen_from_outside("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._seen_from_outside("bias")

    @property
    def base_parameter(self) -> nn.Parameter:
        """The frozen weight itself."""
        return getattr(kinds.owner(self.get_base_layer(), self.parameter_name), kinds.leaf(self.parameter_name))

    # ------------------------------------------------------------------------------------------------- adapters

    def update_layer(
        self,
        adapter_name: str,
        ranks: Sequence[int],
        scale: float | str = "auto",
        init: str = "factor",
        dropout: float = 0.0,
        execution: str = "auto",
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one of that name."""
        weight = self.base_parameter
        if not self.tucker_space:
            self._active_adapter = [adapter_name]
        unit = scale == "auto"
        if unit:
            with gather_params_ctx(weight):
                fan_in = kinds.fan_in(self.weight_shape, self.roles)
                scale = 1.0 if weight.is_meta else unified_scale(weight, fan_in, ranks)
        space = CoreSpace(self.weight_shape, ranks, scale, device=weight.device, dtype=weight.dtype)
        space.start(init, kinds.output_mode(self.roles), unit)
        padding = getattr(self.get_base_layer(), "padding_idx", None)
        if padding is not None and self.kind is not None and not space.core.is_meta:
            space.factors[0].data[padding] = 0  # the padding row never learns, so it must not start
        self.tucker_space[adapter_name] = space
        self.tucker_scaling[adapter_name] = 1.0
        self.tucker_dropout[adapter_name] = dropout
        self.tucker_execution[adapter_name] = kinds.possible(
            execution, self.kind, self.get_base_layer(), self.weight_shape
        )
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.tucker_space and not self.tucker_space[adapter_name].core.is_meta:
            weight = self.base_parameter
            self.tucker_space[adapter_name].to(device or weight.device, dtype=weight.dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's update by ``scale`` from now on (1 is how it was trained)."""
        if adapter in self.tucker_scaling:
            self.tucker_scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the run-time multiplier of all active adapters."""
        for adapter in self._present(self.active_adapters):
            self.tucker_scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the run-time multiplier of all active adapters by ``scale``; without one, set it to 1."""
        for adapter in self._present(self.active_adapters):
            self.tucker_scaling[adapter] = 1.0 if scale is None else self.tucker_scaling[adapter] / scale

    def _present(self, adapters: Sequence[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.tucker_space]

    # -------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole update of the weight, in the weight's shape: (I_1, …, I_N)."""
        return self.tucker_space[adapter].delta() * self.tucker_scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the given (else the active) adapters to the weight.

        Summed in float32 at least and rounded once. Raises ValueError, with the weight left as it was, where an update
        is not finite; with ``safe_merge`` also where the merged weight is not.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if names:
            keep = not self._kept and (self.shared or getattr(self.get_base_layer(), "max_norm", None))
            merged = self._merged_weight(names, safe_merge, in_place=not (keep or safe_merge))
            if keep:
                # others must not see the merged weight; an embedding with max_norm rescales its rows as it looks them
                # up, so subtracting would not bring the old ones back
                self._kept = [self.base_parameter]
                self._replace_parameter(nn.Parameter(merged, requires_grad=self.base_parameter.requires_grad))
            else:
                self.base_parameter.data = merged
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def _merged_weight(self, adapters: Sequence[str], safe_merge: bool, in_place: bool = False) -> Tensor:
        self._check_numbers(adapters)
        weight = self.base_parameter
        merged = add_updates(weight.data, [self._scaled(adapter) for adapter in adapters], in_place)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: "
                f"layer {self.name!r}, shape {list(self.weight_shape)}, {weight.dtype} can't hold the sum"
            )
        return merged

    def _check_numbers(self, adapters: Sequence[str]) -> None:
        for adapter in adapters:
            space = self.tucker_space[adapter]
            if not all(torch.isfinite(tensor).all() for tensor in (space.core, *space.factors)):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: "
                    f"layer {self.name!r}, shape {list(self.weight_shape)}, its core or factors are not finite"
                )

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what ``merge`` would raise, and change nothing. Without ``safe_merge`` no full weight is formed."""
        names = [a for a in self._present(adapter_names or self.active_adapters) if a not in self.merged_adapters]
        if safe_merge and names:
            self._merged_weight(names, safe_merge)
        else:
            self._check_numbers(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the weight again."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            names, self.merged_adapters = self.merged_adapters, []
            if self._kept:
                self._replace_parameter(self._kept.pop())
            else:
                spaces = (self._scaled(name) for name in self._present(names))
                spaces = [(-core, factors) for core, factors in spaces]
                self.base_parameter.data = add_updates(self.base_parameter.data, spaces, in_place=True)

    def _replace_parameter(self, parameter: nn.Parameter) -> None:
        owner = kinds.owner(self.get_base_layer(), self.parameter_name)
        owner.register_parameter(kinds.leaf(self.parameter_name), parameter)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the updates merged if asked, its weights' identity kept."""
        layer: nn.Module = self
        while isinstance(layer, FloraLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own converter (``convert_to_lora``) can take it: it knows matrices of linear layers."""
        return self.kind is not None and self.kind.name in ("Linear", "Conv1D")

    # -------------------------------------------------------------------------------------------------- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(adapter_names, args, kwargs)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return self._adapted(self._present(self.active_adapters), args, kwargs)

    def _adapted(self, adapters: list[str], args: tuple, kwargs: dict, **inner: Any) -> Any:
        """The base layer with the updates of ``adapters``. ``inner`` is for the base layer alone.

        The first runs together with the base layer, where nothing speaks against it; else those that act as a weight
        are in the weight, and what is left is added beside the layer.
        """
        result, beside = None, adapters
        if adapters and len(args) + len(kwargs) == 1 and not inner:
            (x, *_), _ = self._input_first(args, kwargs)
            result, beside = self._fused(adapters[0], x), adapters[1:]
        if result is None:
            inside = [a for a in adapters if self._runs_merged(a)]
            beside = [a for a in adapters if a not in inside]
            if inside:
                weight = {self._weight_path: self._weight_or_stand_in(inside)}
                result = kinds.run_with_weights(self.base_layer, weight, args, {**kwargs, **inner})
            else:
                result = self.base_layer(*args, **kwargs, **inner)
        for adapter in beside:
            result = self._add_beside(result, adapter, args, kwargs)
        return result

    def _fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """Base layer and update in one. None where that can't be: the update can only act as a weight, calling the base
        layer does more than it seems, the update's own input is dropped out, or numbers of several types meet."""
        weight = self.base_parameter
        bare = self.fusable and kinds.is_plain(weight) and kinds.is_bare(self.base_layer)
        if not bare or self._dropout(adapter) > 0 or not can_fuse():
            return None
        tensors = of_one_type(x, weight, self.base_layer.bias, *self._scaled(adapter))
        if tensors is None:
            return None
        x, weight, bias, core, *factors = tensors
        return self.kind.fused(self.base_layer, weight, bias, core, factors, x, self.tucker_execution[adapter])

    def _dropout(self, adapter: str) -> float:
        return self.tucker_dropout[adapter] if self.training else 0.0

    def _scaled(self, adapter: str) -> tuple[Tensor, Sequence[Tensor]]:
        core, factors = self.tucker_space[adapter]()
        scaling = self.tucker_scaling[adapter]
        return (core if scaling == 1 else core * scaling), factors

    def _runs_merged(self, adapter: str) -> bool:
        if not self.factorable:
            return True
        # dropout is of the layer's input, which only the factored form has; where there is none, of the ranks
        if self._dropout(adapter) > 0:
            return False
        if self.tucker_execution[adapter] != "auto":
            return self.tucker_execution[adapter] == "merged"
        # thin layers are not thin in a grouped convolution: groups × rank channels
        return getattr(self.get_base_layer(), "groups", 1) > 1 and self.base_parameter.dtype not in LOW_PRECISION

    def _weight_or_stand_in(self, adapters: Sequence[str]) -> Tensor:
        """The weight with the updates in it; of a stack of matrices one that does not form it as long as it can."""
        weight, execution = self.base_parameter, self.tucker_execution[adapters[0]]
        stack = self.kind is None and execution != "merged"
        if stack and len(adapters) == 1 and can_fuse() and kinds.is_plain(weight):
            return StandIn.of(weight, *self._dropped(adapters[0]), execution)
        return self._weight_with(adapters)

    def _weight_with(self, adapters: Sequence[str]) -> Tensor:
        weight = self.base_parameter
        return add_updates(weight, [self._dropped(a) for a in adapters]) if adapters else weight

    def _dropped(self, adapter: str) -> tuple[Tensor, Sequence[Tensor]]:
        """Scaled core and factors, in training with ranks dropped out."""
        core, factors = self._scaled(adapter)
        p = self._dropout(adapter)
        return core, drop_ranks(factors, kinds.input_mode(self.roles), p) if p > 0 else factors

    def _add_beside(self, result: Tensor, adapter: str, args: tuple, kwargs: dict) -> Tensor:
        (x, *args), kwargs = self._input_first(args, kwargs)
        if x.is_floating_point():
            core, factors = self._scaled(adapter)
            x = F.dropout(self._cast_input_dtype(x, core.dtype), self._dropout(adapter))
        else:
            core, factors = self._dropped(adapter)
        update = self.kind.factored(self.get_base_layer(), core, factors, x, *args, **kwargs)
        return (result + update).to(result.dtype)

    @staticmethod
    def _input_first(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The layer's input as the first positional argument, also when it was passed by name."""
        if args:
            return args, kwargs
        name = next(n for n in ("input", "x") if n in kwargs)
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    def _mixed_batch(self, adapter_names: Sequence[str], args: tuple, kwargs: dict) -> Any:
        """Each sample with its own adapter ("__base__" for none): every adapter runs the whole batch or, for a layer
        with a single input, its own samples, and keeps its own rows."""
        self._check_mixed_batch(adapter_names, args, kwargs)
        single = len(args) + len(kwargs) == 1
        mode = self.batch_mode
        (x, *rest), kwargs = self._input_first(args, kwargs) if single else (args, kwargs)
        order: list[int] = []
        parts: list[tuple] = []
        for adapter in dict.fromkeys(adapter_names):
            mine = [n for n, name in enumerate(adapter_names) if name == adapter]
            rows = torch.tensor(mine, device=x.device)
            samples = x.index_select(mode, rows) if single else x
            inner = {}
            if isinstance(self.base_layer, FloraLayer):  # another weight of the same layer: it goes with this one
                inner["adapter_names"] = [adapter] * samples.shape[mode]
            part = self._adapted(self._present([adapter]), (samples, *rest), kwargs, **inner)
            outputs = part if isinstance(part, tuple) else (part,)
            # attention's weights, its second output, are batch first always
            axes = [mode] + [0] * (len(outputs) - 1)
            kept = [t if single or t is None else t.index_select(a, rows) for t, a in zip(outputs, axes, strict=True)]
            order += mine
            parts.append(tuple(kept))
        back = torch.tensor(order, device=x.device).argsort()
        whole = tuple(
            None if pieces[0] is None else torch.cat(pieces, axis).index_select(axis, back)
            for pieces, axis in zip(zip(*parts, strict=True), axes, strict=True)
        )
        return whole if isinstance(part, tuple) else whole[0]

    def _check_mixed_batch(self, adapter_names: Sequence[str], args: tuple, kwargs: dict) -> None:
        x = self._input_first(args, kwargs)[0][0] if args or "input" in kwargs or "x" in kwargs else None
        if x is None:
            raise ValueError(f"layer {self.name!r}: `adapter_names` needs the layer's input as a positional argument")
        if x.shape[self.batch_mode] != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {x.shape[self.batch_mode]} respectively (layer {self.name!r})."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def __repr__(self) -> str:
        return "flora." + super().__repr__()

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"
