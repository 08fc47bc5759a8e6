"""Merging: updates added to the weight itself, and taken out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flora.layers.core_space import add_updates, is_finite
from flora.layers.weights.offload import loaded
from flora.layers.weights.parameters import leaf, owner
from flora.layers.weights.sharded import gathered, has_engine, in_parts, is_distributed, is_flat, overwrite, whole
from flora.tuner import quantized
from flora.tuner.adapted_weight import AdaptedWeight
from flora.tuner.peft_compat import check_adapters_to_merge


class MergeableWeight(AdaptedWeight):
    """An adapted weight that its updates can be merged into, also while an engine keeps it in parts."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep: bool = True) -> None:
        """Add the updates of the given (else the active) adapters to the weight.

        The sum is formed in float32 at least and rounded once. Raises ValueError, and leaves the weight as it was, if
        an update is not finite; with ``safe_merge`` also if the merged weight is not.

        The weight as it was stays in the computer's memory, never an accelerator's, for ``unmerge`` to put back: it
        takes as many bytes as the weight. Without ``keep``, as in ``merge_and_unload``, it does not. A quantized weight
        is dequantized, and the sum quantized anew; what it was stays where it is.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self.is_quantized:
            with self._gathered(names):
                return quantized.merge(self, names, safe_merge, keep)
        merged_before = bool(self._kept)
        alone = not self.shared or merged_before  # else other holders must not see the merged weight
        with self._gathered(names, write=True):
            weight = self.base_parameter
            kept = [] if merged_before or not keep else [_copy(weight) if alone else weight]
            free = alone and all(before.device != weight.device for before in kept)
            merged = self._merged_weight(names, safe_merge, in_place=free and not safe_merge)
            if alone:
                overwrite(weight, merged)
            else:
                self._replace_parameter(nn.Parameter(merged, requires_grad=weight.requires_grad))
        self._kept += kept
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def _merged_weight(self, adapters: Sequence[str], safe_merge: bool, in_place: bool = False) -> Tensor:
        self._check_numbers(adapters)
        weight = quantized.numbers(self) if self.is_quantized else whole(self.base_parameter.data)
        merged = add_updates(weight, [self._whole(adapter) for adapter in adapters], in_place)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: "
                f"layer {self.name!r}, shape {list(self.weight_shape)}, {self.base_parameter.dtype} can't hold the sum"
            )
        return merged

    @torch.no_grad()
    def _check_numbers(self, adapters: Sequence[str]) -> None:
        for adapter in adapters:
            if not is_finite(*self._whole(adapter)):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: "
                    f"layer {self.name!r}, shape {list(self.weight_shape)}, its update is not finite"
                )

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise the errors of ``merge``, and change nothing. Without ``safe_merge`` it forms no full weight."""
        names = [a for a in self._present(adapter_names or self.active_adapters) if a not in self.merged_adapters]
        if self.is_quantized and names:
            quantized.check_mergeable(self)
        with self._gathered(names):
            if safe_merge and names:
                self._merged_weight(names, safe_merge)
            else:
                self._check_numbers(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight as it was before the first merge, to the bit: whatever has become of the adapters."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept = self._kept[0]
        if isinstance(kept, dict):
            quantized.unmerge(self, kept)
        elif isinstance(kept, nn.Parameter):
            self._replace_parameter(kept)
        else:
            with self._gathered([], write=True):
                overwrite(self.base_parameter, kept)
        self._kept.clear()
        self.merged_adapters = []

    @contextmanager
    def _gathered(self, adapters: Sequence[str], write: bool = False) -> Iterator[None]:
        """Within it, weight and core spaces are here and whole, whatever the engine. Raises ValueError if that cannot
        be."""
        with loaded(self, write):
            parts: list[tuple[Tensor, Sequence[int]]] = [(self.base_parameter, self.weight_shape)]
            for space in map(self.space, adapters):
                parts += zip((space.core, *space.factors), space.parameter_shapes, strict=True)
            with gathered([tensor for tensor, _ in parts], write):
                self._refuse_parts(parts)
                yield

    def _refuse_parts(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
        weight, place = self.base_parameter, f"layer {self.name!r}, weight of shape {list(self.weight_shape)}"
        if any(tensor.is_meta for tensor, _ in parts):
            raise ValueError(f"{place}: it or its adapter is on the meta device, without numbers; load both first")
        if in_parts(weight, self.weight_shape) and self.shared:
            raise ValueError(
                f"{place}: it is shared with other modules and kept in parts; save the adapter, and merge it in one "
                "process"
            )
        if any(is_flat(tensor, shape) for tensor, shape in parts):
            raise ValueError(
                f"{place}: only a part of it is here; merge and unmerge within "
                "FullyShardedDataParallel.summon_full_params(model, writeback=True)"
            )

    def _whole(self, adapter: str) -> tuple[Tensor, list[Tensor]]:
        """As ``_scaled``, without a call of the core space, which engines do not allow outside a forward."""
        space = self.space(adapter)
        core = whole(space.core) * (space.scale * self.tucker_scaling[adapter])
        return core, [whole(factor) for factor in space.factors]

    def _replace_parameter(self, parameter: nn.Parameter) -> None:
        holder = owner(self.get_base_layer(), self.parameter_name)
        holder.register_parameter(leaf(self.parameter_name), parameter)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer itself, with the updates in its weights if ``merge``."""
        layer: nn.Module = self
        while isinstance(layer, MergeableWeight):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, keep=False)
            for encoder in layer.without_nested_tensors:
                encoder.use_nested_tensor = True  # type: ignore[assignment]
            layer = layer.base_layer
        return layer


def _copy(weight: Tensor) -> Tensor:
    """The weight's numbers as they are, on the CPU unless they are distributed."""
    if is_distributed(weight):
        return weight.data.clone()
    return weight.data.to("cpu", copy=has_engine())  # without an engine, merging gives the weight a new memory
