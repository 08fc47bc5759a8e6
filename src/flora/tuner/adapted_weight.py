"""A frozen weight and its core spaces: adding adapters, their scale, and what models see of the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flora.layers import kinds
from flora.layers.core_space import CoreSpace, add_updates, drop_ranks
from flora.layers.execution.cost import can_fuse
from flora.layers.execution.lazy import LazyWeight
from flora.layers.kinds import RAW
from flora.layers.sites import Site
from flora.layers.weights.offload import loaded
from flora.layers.weights.parameters import is_bare, leaf, owner
from flora.layers.weights.sharded import is_distributed, part_like
from flora.layers.weights.storage import dtype_of, storage_of, tensor_of
from flora.tuner import quantized
from flora.tuner.peft_compat import BaseTunerLayer


class AdaptedWeight(nn.Module, BaseTunerLayer):
    """A layer whose weight of shape (I_1, …, I_N) gets the update of one ``CoreSpace`` per adapter.

    Several weights of one layer (attention's projections, a pair of expert stacks) are adapted by several of these, one
    around the other, each with its own weight.

    Args:
        base_layer: the layer, or the ``AdaptedWeight`` of another weight of it.
        site: which weight of which layer, for the kind of layer and for error messages.
        shape: the weight's.
        shared: whether other modules hold the same weight. Merging then gives this layer a weight of its own.

    Attributes:
        tucker_space: adapter name -> its ``CoreSpace``.
        tucker_scaling: adapter name -> a run-time multiplier, 1 at first, which is not saved.
        merge_loss: sums of squares: of what a quantized weight lost in its last merge, of the update, of their sum.
    """

    merge_loss: tuple[float, ...] = ()

    adapter_layer_names = ("tucker_space",)
    other_param_names = ("tucker_scaling", "tucker_dropout", "tucker_execution")
    cast_input_dtype_enabled = True  # diffusers' layerwise casting turns it off during a forward

    def __init__(self, base_layer: nn.Module, site: Site, shape: Sequence[int], shared: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site, self.name, self.parameter_name = site, site.name, site.parameter
        self.kind, self.weight_shape = site.kind, tuple(shape)
        self.roles = site.kind.roles_of(self.weight_shape)
        self.shared = shared
        self.tucker_space = nn.ModuleDict()
        self.tucker_scaling: dict[str, float] = {}
        self.tucker_dropout: dict[str, float] = {}
        self.tucker_execution: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._kept: list[Any] = []  # the weight before a merge; a list, or torch would count it among our parameters
        self.without_nested_tensors: list[nn.Module] = []  # encoders whose fast path was closed for this layer
        self._active_adapter: list[str] = []
        self._was_quantized = self.is_quantized
        if self.kind is not RAW:  # PEFT's names for them, whatever the kind of layer
            self.in_features, self.out_features = kinds.features(self.get_base_layer(), self.weight_shape, self.roles)

    # -------------------------------------------------------------------------------------------- seen from outside

    def __getattr__(self, name: str) -> Any:
        # models read in_features, kernel_size, embed_dim … of a layer: those are the base layer's
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = vars(self).get("kind")  # None before __init__ has set it, and while a copy is being made
            if kind is None or name == "base_layer" or (name.startswith("_") and name not in kind.private):
                raise
            return self._seen_from_outside(name)

    def _seen_from_outside(self, name: str) -> Any:
        """An attribute of the base layer. Its weight has the updates in it, for models that read a layer's weight and
        never call the layer (Swin's and EVA's attention); one that other modules hold is itself, for ``tie_weights``.
        """
        if name != self.parameter_name:
            return getattr(self.base_layer, name)
        if self.shared:
            return self._kept[0] if self._kept and not self.is_quantized else self.base_parameter
        off = self.disable_adapters or self.merged
        if self.is_quantized and not self.base_parameter.dtype.is_floating_point:
            return getattr(self.base_layer, name)  # a model can only look at its type
        adapters = [] if off else self._present(self.active_adapters)
        weight = self.base_parameter
        parameters = [weight, *(p for adapter in adapters for p in self.space(adapter).parameters())]
        plain = weight.shape == self.weight_shape and all(type(p) is nn.Parameter for p in parameters)
        plain = plain and not self.is_quantized
        if not adapters or not plain or not can_fuse():
            return self._weight_with(adapters)
        trained = [p for p in parameters if p.requires_grad]  # for a gradient start the weight, too
        return LazyWeight.of(weight, partial(self._weight_with, adapters), trained)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, with the active updates in it."""
        return self._seen_from_outside("weight")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Assigning a weight replaces the base layer's, as ``tie_weights`` does."""
        if name != self.parameter_name or "base_layer" not in self._modules:
            return super().register_parameter(name, param)
        if param is None or tuple(param.shape) != self.weight_shape:
            shape = None if param is None else list(param.shape)
            raise ValueError(f"layer {self.name!r}: a weight of shape {list(self.weight_shape)} is needed, got {shape}")
        if self.merged and param is not self.frozen_weight:
            raise ValueError(f"layer {self.name!r}: unmerge before giving it another weight")
        if not self.merged:
            owner(self.get_base_layer(), name).register_parameter(leaf(name), param)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self._seen_from_outside("bias")

    @property
    def base_parameter(self) -> nn.Parameter:
        """The frozen weight itself, (I_1, …, I_N); of a quantized weight the tensor that keeps it."""
        return tensor_of(self.get_base_layer(), self.parameter_name)

    @property
    def is_quantized(self) -> bool:
        """Whether the layer keeps its weight in one of ``storage.STORAGES``."""
        if torch.compiler.is_compiling():  # compilers don't follow the search
            return self._was_quantized
        return storage_of(self.get_base_layer(), self.parameter_name) is not None

    @property
    def frozen_weight(self) -> Tensor:
        """The weight that the layer computes with without any update, even while updates are merged into it."""
        if self.is_quantized:
            return quantized.frozen(self)
        return self._kept[0] if self._kept else self.base_parameter

    # ----------------------------------------------------------------------------------------------------- adapters

    def update_layer(
        self,
        adapter_name: str,
        ranks: Sequence[int],
        scale: float = 1.0,
        dropout: float = 0.0,
        execution: str = "auto",
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one with that name. ``start_adapter`` gives it its numbers.

        Args:
            ranks: (r_1, …, r_N).
            scale: the s of equation 5.
            execution: as ``kinds.possible`` gives it for this layer.
        """
        layer, weight_dtype = self.get_base_layer(), dtype_of(self.get_base_layer(), self.parameter_name)
        if not self.tucker_space:
            self._active_adapter = [adapter_name]
        with loaded(layer):
            device = self.base_parameter.device
        self.tucker_space[adapter_name] = CoreSpace(self.weight_shape, ranks, scale, device, weight_dtype)
        self.tucker_scaling[adapter_name] = 1.0
        self.tucker_dropout[adapter_name] = dropout
        self.tucker_execution[adapter_name] = execution
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.tucker_space and not self.space(adapter_name).core.is_meta:
            dtype = dtype_of(self.get_base_layer(), self.parameter_name)
            self.tucker_space[adapter_name].to(device or self.base_parameter.device, dtype=dtype)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's. Disabling takes merged updates out of the weight."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

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

    def space(self, adapter: str) -> CoreSpace:
        """The adapter's core space."""
        return cast(CoreSpace, cast(nn.Module, self._modules["tucker_space"])._modules[adapter])

    def _present(self, adapters: Sequence[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.tucker_space]

    # -------------------------------------------------------------------------------------------- updates as tensors

    def _dropout(self, adapter: str) -> float:
        return self.tucker_dropout[adapter] if self.training else 0.0

    def _scaled(self, adapter: str) -> tuple[Tensor, Sequence[Tensor]]:
        """The core with both scales in it, and the factors."""
        space, scaling = self.space(adapter), self.tucker_scaling[adapter]
        tensors = tuple(space._parameters.values())
        # `isinstance` with this class is slow, and so is a call of the space, which would do the same
        ordinary = all(type(p) is nn.Parameter or isinstance(p, nn.Parameter) for p in tensors)
        if tensors and ordinary and is_bare(space):
            core, *factors = cast(tuple[Tensor, ...], tensors)
            core = core * cast(Tensor, space._buffers["scale"])
        else:
            core, factors = space()
        return (core if scaling == 1 else core * scaling), factors

    def _dropped(self, adapter: str, weight: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Scaled core and factors, in training with ranks dropped out; as suits the weight that they are added to."""
        core, factors = self._scaled(adapter)
        p = self._dropout(adapter)
        return core, drop_ranks(factors, kinds.input_mode(self.roles), p, weight) if p > 0 else factors

    def _weight_with(self, adapters: Sequence[str]) -> Tensor:
        weight = self.frozen_weight if adapters and self.is_quantized else self.base_parameter
        return self._add_updates(weight, adapters) if adapters else weight

    def _add_updates(self, weight: Tensor, adapters: Sequence[str]) -> Tensor:
        if is_distributed(weight):
            return weight + self._updates_like(weight, adapters)
        return add_updates(weight, [self._dropped(adapter, weight) for adapter in adapters])

    def _updates_like(self, weight: Tensor, adapters: Sequence[str]) -> Tensor:
        """The sum of the updates in the weight's type, distributed as the weight is."""
        zeros = torch.zeros(self.weight_shape, dtype=weight.dtype, device=weight.device)
        return part_like(add_updates(zeros, [self._dropped(adapter, weight) for adapter in adapters]), weight)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole update of the weight, in the weight's shape: (I_1, …, I_N)."""
        delta, scaling = self.space(adapter).delta(), self.tucker_scaling[adapter]
        return delta if scaling == 1 else delta * scaling

    def with_zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros in the place of a quantized weight (I_1, …, I_N), and the output of the layer without its bias: the
        gradient of a weight does not depend on its numbers. The kind of layer must have a ``plain`` form."""
        zeros = torch.zeros(self.weight_shape, device=x.device, requires_grad=True)
        plain = cast(Callable[..., Tensor], self.kind.plain)
        return zeros, plain(self.get_base_layer(), x.float() if x.is_floating_point() else x, zeros, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own converter (``convert_to_lora``) accepts it: it knows matrices of linear layers only."""
        return self.kind.is_matrix

    def __repr__(self) -> str:
        return "flora." + super().__repr__()

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"
