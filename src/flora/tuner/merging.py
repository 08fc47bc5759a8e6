"""Merging: updates added to the weight itself, and taken out again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flora.layers.core_space import add_updates, is_finite, surely_finite
from flora.layers.weights.fingerprint import Fingerprint, fingerprint
from flora.layers.weights.offload import loaded
from flora.layers.weights.parameters import leaf, owner
from flora.layers.weights.sharded import gathered, has_engine, in_parts, is_distributed, is_flat, overwrite, whole
from flora.tuner import quantized
from flora.tuner.adapted_weight import AdaptedWeight
from flora.tuner.peft_compat import check_adapters_to_merge


class MergeableWeight(AdaptedWeight):
    """An adapted weight that its updates can be merged into, also while an engine keeps it in parts."""

    # of the merged weight, unless it is quantized, or a table that renormalizes itself whenever it is called
    _written: Fingerprint | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep: bool = True) -> None:
        """Add the updates of the given (else the active) adapters to the weight.

        The sum is formed in float32 at least and rounded once. Raises ValueError, and leaves the weight as it was, if
        an update is not finite; with ``safe_merge`` also if the merged weight is not.

        The weight as it was is kept for ``unmerge`` to put back: as many bytes as the weight has, on its own device
        while half of an accelerator's memory is free, and else in the computer's memory. Without ``keep``, as in
        ``merge_and_unload``, it is not. A quantized weight is dequantized, and the sum quantized anew; what it was
        stays where it is.
        """
        self.check_mergeable(adapter_names, safe_merge)
        if keep and self._kept and self._to_merge(adapter_names):
            self.check_unchanged()
        self.merge_checked(adapter_names, keep)

    def merge_checked(self, adapter_names: list[str] | None, keep: bool) -> None:
        """As ``merge``, after its checks."""
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if self.is_quantized:
            with self._gathered(names):
                return quantized.merge(self, names, keep)
        merged_before = bool(self._kept)
        alone = not self.shared or merged_before  # else other holders must not see the merged weight
        with self._gathered(names, write=True):
            weight = self.base_parameter
            kept = [] if merged_before or not keep else [_copy(weight) if alone else weight]
            merged = self._merged_weight(names, alone and all(before.device != weight.device for before in kept))
            if alone:
                overwrite(weight, merged)
            else:
                self._replace_parameter(nn.Parameter(merged, requires_grad=weight.requires_grad))
            renormalizes = getattr(self.get_base_layer(), "max_norm", None) is not None
            self._written = fingerprint(self.base_parameter) if keep and not renormalizes else None
        self._kept += kept
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def _merged_weight(self, adapters: Sequence[str], in_place: bool = False) -> Tensor:
        weight = quantized.numbers(self) if self.is_quantized else whole(self.base_parameter.data)
        return add_updates(weight, [self._whole(adapter) for adapter in adapters], in_place)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise the errors of ``merge``, and change nothing. It forms a full weight only where a bound can't tell."""
        names = self._to_merge(adapter_names)
        if self.is_quantized and names:
            quantized.check_mergeable(self)
        if surely_mergeable([self], adapter_names, safe_merge):
            return
        with self._gathered(names), torch.no_grad():
            for adapter in names:
                if not is_finite(*self._whole(adapter)):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: "
                        f"layer {self.name!r}, shape {list(self.weight_shape)}, its update is not finite"
                    )
            if safe_merge and names and not torch.isfinite(self._merged_weight(names)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: layer "
                    f"{self.name!r}, shape {list(self.weight_shape)}, {self.base_parameter.dtype} can't hold the sum"
                )

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        present = self._present(adapter_names or self.active_adapters)
        return [adapter for adapter in present if adapter not in self.merged_adapters]

    def is_whole(self, adapters: Sequence[str]) -> bool:
        """Whether the weight and the core spaces are ordinary tensors, whole and in memory."""
        if self.is_quantized:
            return False
        tensors: list[tuple[Tensor, Sequence[int]]] = [(self.base_parameter, self.weight_shape)]
        for space in map(self.space, adapters):
            tensors += zip((space.core, *space.factors), space.parameter_shapes, strict=True)
        return all(
            type(tensor) is nn.Parameter
            and tensor.shape == shape
            and not (tensor.is_meta or hasattr(tensor, "ds_id") or is_flat(tensor, shape))
            for tensor, shape in tensors
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight as it was before the first merge, to the bit: whatever has become of the adapters.

        Raises ValueError if the weight itself has changed since it was merged: the change would be lost.
        """
        self.check_unchanged()
        self.put_back()

    @torch.no_grad()
    def check_unchanged(self) -> None:
        """Raise ValueError if the weight is not what the last merge has written."""
        if self._written is None:
            return
        with self._gathered([]):
            if not self._written.fits(self.base_parameter):
                raise ValueError(
                    f"layer {self.name!r}: its weight of shape {list(self.weight_shape)} has changed while adapters "
                    "were merged into it (trained, or loaded?), and unmerging would undo the change; unmerge first "
                    "next time, or keep both by model.merge_and_unload()"
                )

    @torch.no_grad()
    def put_back(self) -> None:
        """As ``unmerge``, without its check."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
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
        self._written, self.merged_adapters = None, []

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
        scaling = self.tucker_scaling[adapter]
        core = whole(space.core)
        core = core.float() if core.dtype.itemsize < 4 else core  # its type may not hold the scaled core
        core = core * (space.scale if scaling == 1 else space.scale * scaling)
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
                layer.merge_checked(adapter_names, keep=False)
            for encoder in layer.without_nested_tensors:
                encoder.use_nested_tensor = True  # type: ignore[assignment]
            layer = layer.base_layer
        return layer


@torch.no_grad()
def surely_mergeable(layers: Sequence[MergeableWeight], adapter_names: list[str] | None, safe_merge: bool) -> bool:
    """Whether one look at all the layers shows that each can be merged: one number is read from the device."""
    own = [(layer, layer._to_merge(adapter_names)) for layer in layers]
    if not all(layer.is_whole(names) for layer, names in own):
        return False
    pairs = [(layer, name) for layer, names in own for name in names]
    spaces = [layer.space(name) for layer, name in pairs]
    if not spaces:
        return True
    return surely_finite(
        [space.core for space in spaces],
        [space.factors for space in spaces],
        [space.scale for space in spaces],
        math.hypot(*(layer.tucker_scaling[name] for layer, name in pairs)),  # at least the largest, and NaN if one is
        [layer.base_parameter for layer, names in own if names] if safe_merge else (),
    )


def _copy(weight: Tensor) -> Tensor:
    """The weight's numbers as they are; from an accelerator that is half full, on the CPU unless distributed."""
    if is_distributed(weight):
        return weight.data.clone()
    # without an engine, merging gives the weight a new memory
    return weight.data.to(weight.device if _half_free(weight.device) else "cpu", copy=has_engine())


def _half_free(device: torch.device) -> bool:
    """Whether half of an accelerator's memory is free; always of the computer's own."""
    if device.type == "cpu":
        return True
    memory = getattr(torch.get_device_module(device), "mem_get_info", None)
    if memory is None:
        return False
    free, total = memory(device)
    return 2 * free >= total
